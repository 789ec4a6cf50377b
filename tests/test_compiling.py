"""`--compile`: the same texts from compiled parts, nothing compiled within a race, and refusals of one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import test_rounds
import tiny
import torch

from spec_decode import decode
from spec_decode.draft_length import Fixed
from spec_decode.errors import ModelError
from spec_decode.loading import compiling
from spec_decode.loading.compiling import compile_layers
from spec_decode.settings import Settings
from spec_decode.target import Target
from spec_decode.text import TextStream

pytest.importorskip("setuptools")  # PyTorch's compiler loads it, which fails once a test has loaded distutils
pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = test_rounds.PROMPT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def texts(target: Target, drafter: Any, **options: Any) -> list[list[int]]:
    settings = Settings(max_new_tokens=24, draft_length=3, **options)
    text = TextStream(tiny.Characters(), PROMPT)
    lanes = (
        decode.baseline(target, PROMPT, text.fork(), settings),
        decode.speculative(target, drafter, Fixed(3), PROMPT, text, settings),
    )
    return [[token.id for done in lane for token in done.emitted] for lane in lanes]


def compiled(kind: str, backend: str) -> tuple[Target, Target, Any]:
    """A target, the same compiled, and a drafter for either."""
    plain, drafter = test_rounds.parts(kind, "mtp")
    model = tiny.gemma4(kind)[0] if kind in tiny.GEMMA4 else tiny.model(kind)
    target = Target(model)
    assert compile_layers(target, backend) >= 3 * len(model.model.layers)
    return plain, target, drafter


@pytest.mark.parametrize("kind", test_rounds.KINDS)
def test_texts_are_those_of_the_model_and_nothing_is_compiled_in_a_race(kind: str, cache: Path) -> None:
    """With a compiler that runs the traced operations as they are: what is traced is the whole of each part."""
    plain, target, drafter = compiled(kind, "eager")
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for options in ({}, {"temperature": 0.8, "rule": "rejection"}):
        assert texts(target, drafter, **options) == texts(plain, drafter, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("kind", ["llama", "shared"])
def test_compiled_code_computes_the_same(kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COUNTS", frozenset([1, 4]))
    plain, target, drafter = compiled(kind, "inductor")
    logits = []
    for model in (plain, target):
        held = model.new_cache(80)
        model.prefill(torch.tensor(PROMPT), held)
        logits.append(model.verify(torch.tensor(PROMPT[:4]), held).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(*logits) or any(cache.iterdir())
    slow, fast = texts(target, drafter)
    assert slow == fast == texts(plain, drafter)[0]
    assert any(cache.iterdir()), "what was compiled is kept"


def test_a_missing_compiler_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found.\nSet TORCHDYNAMO_VERBOSE=1")

    torch._dynamo.register_backend(name="missing_compiler")(missing)
    target = Target(tiny.model("llama"))
    held = target.new_cache(8)
    before = target.verify(torch.tensor([1, 2, 3]), held).logits
    with pytest.raises(
        ModelError, match=r"^--compile cannot be used here: .*No working C\+\+ compiler.*leave it out\.$"
    ):
        compile_layers(target, "missing_compiler")
    held.reset()
    assert torch.equal(target.verify(torch.tensor([1, 2, 3]), held).logits, before), "it runs as before"


def test_a_model_without_such_parts_is_refused() -> None:
    target = Target(tiny.model("llama"))
    target.model.base_model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="finds nothing to compile"):
        compile_layers(target)
