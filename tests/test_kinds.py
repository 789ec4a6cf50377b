"""The table of drafter kinds: names, what is offered for a target, and that one entry and one module make a drafter."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from test_models import PROMPT, tokenizer

from spec_decode import flags
from spec_decode.drafters import kinds
from spec_decode.drafters.kinds import Kind
from spec_decode.errors import ModelError
from spec_decode.events import SPECULATIVE
from spec_decode.loading import catalog, embedded, memory
from spec_decode.loading.drafter import Choice, choose_drafter, load_drafter
from spec_decode.loading.pair import Pair, load_pair
from spec_decode.loading.placement import make_plan
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.sources.local import Race
from spec_decode.target import Target

LOOKUP = kinds.named("lookup")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Gemma 4 `target` and its `assistant`, and a `llama` with the same tokenizer."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, model in zip(("target", "assistant"), tiny.gemma4("shared"), strict=True):
        model.save_pretrained(folder / name)
    tiny.model("llama").save_pretrained(folder / "llama")
    for name in ("target", "llama"):
        tokenizer().save_pretrained(folder / name)
    return folder


def load(home: Path, drafter: str) -> Pair:
    return load_pair(str(home / "target"), drafter, device="cpu")


def test_the_table_and_the_flags_need_neither_torch_nor_numpy() -> None:
    code = "import sys, spec_decode.flags, spec_decode.drafters.kinds; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("name", "first", "combined"),
    [
        ("mtp", "mtp", ()),
        ("mtp+lookup", "mtp", (LOOKUP,)),
        ("google/gemma-4-E2B-it-assistant+lookup", "google/gemma-4-E2B-it-assistant", (LOOKUP,)),
        ("lookup+lookup+lookup", "lookup", (LOOKUP,)),
        ("+lookup", "", (LOOKUP,)),
        ("/models/a+b", "/models/a+b", ()),
        ("lookup+mtp", "lookup+mtp", ()),
        ("mtp+model", "mtp+model", ()),
    ],
)
def test_names_are_taken_apart(name: str, first: str, combined: tuple[Kind, ...]) -> None:
    assert kinds.split(name) == (first, combined)


def test_a_checkpoint_belongs_to_one_kind() -> None:
    for entry in catalog.GEMMA4:
        assert kinds.of_checkpoint(entry.drafter_kind).name == "mtp"
        assert kinds.of_checkpoint(entry.kind).name == "model"
    claimed = [model_type for kind in kinds.KINDS for model_type in kind.model_types]
    assert len(claimed) == len(set(claimed)) and kinds.ANY[0] in claimed
    assert kinds.named("model") is None, "a Hub id or a directory names the checkpoint"


def test_what_is_offered_beside_the_drafter_of_a_target() -> None:
    plain = tuple(kind.name for kind in kinds.KINDS if kind.by_name and not kind.model_types)
    combined = tuple(f"mtp+{kind.name}" for kind in kinds.KINDS if kind.combines)
    assert "lookup" in plain and "mtp+lookup" in combined
    assert catalog.own_drafter("embedded") == "mtp+lookup"
    assert catalog.drafters("embedded") == (*combined, "mtp", *plain)
    assert catalog.own_drafter("google/gemma-4-E4B-it") == "google/gemma-4-E4B-it-assistant"
    assert catalog.drafters("google/gemma-4-E4B-it") == (*combined, *plain)
    assert catalog.own_drafter("somewhere/else") == "lookup" and catalog.drafters("somewhere/else") == plain


@pytest.mark.parametrize(
    ("name", "kind", "shown", "drafter"),
    [
        ("lookup", "lookup", "lookup", "lookup"),
        ("assistant", "mtp", "assistant", "assistant"),
        ("assistant+lookup", "mtp", "assistant", "assistant+lookup"),
        ("llama", "model", "llama", "llama"),
    ],
)
def test_every_kind_is_what_its_entry_says(home: Path, name: str, kind: str, shown: str, drafter: str) -> None:
    """Whether it reads hidden states, has a cache, and advises a length; and what it is called."""
    named = str(home / name) if name != "lookup" else name
    target = Target(tiny.gemma4("shared")[0])
    choice = choose_drafter(named, "x", target.config)
    assert choice.kind.name == kind and Path(choice.name).name == shown
    loaded = load_drafter(choice, target, tokenizer(), make_plan("x", "cpu", "float32", {}))
    assert Path(loaded.drafter.name).name == drafter
    assert loaded.drafter.needs_hidden == bool(choice.kind.hidden_layers)
    reading = loaded.drafter.start([1, 2, 3], Settings(), 100)
    assert (reading is not None) == choice.kind.caches
    loaded.drafter.close()
    assert (loaded.model is None) == (not choice.kind.model_types)
    assert loaded.revision["id"] == (named.removesuffix("+lookup"))


def test_names_stand_for_the_targets_own_drafter(embedded_dir: Path) -> None:
    def chosen(name: str | None, target: str = "embedded", width: int = 576) -> tuple[str, str, tuple[str, ...]]:
        found = choose_drafter(name, target, argparse.Namespace(vocab_size=49152, hidden_size=width))
        return found.kind.name, found.name, tuple(kind.name for kind in found.combined)

    own = ("mtp", "mtp", ("lookup",))
    assert chosen(None) == chosen("") == chosen("+lookup") == chosen("mtp+lookup") == own
    assert chosen("mtp") == chosen("mtp", "a-copy") == ("mtp", "mtp", ())
    assert chosen("embedded") == chosen(str(embedded_dir)) == ("model", embedded.NAME, ())
    assert chosen(None, "a-copy") == chosen("lookup+lookup") == ("lookup", "lookup", ())
    with pytest.raises(ModelError, match=r"^This target has no MTP drafter here; train one \(train-drafter\), or"):
        chosen("mtp+lookup", "a-copy", 64)


def test_the_estimate_of_memory_counts_a_cache_where_the_kind_has_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[bool] = []
    check = memory.check

    def watch(name: str, target: Any, drafter: Any, free: Any) -> None:
        caches.append(drafter is not None and drafter.caches)
        check(name, target, drafter, free)

    monkeypatch.setattr(memory, "check", watch)
    pair = load(home, "lookup")
    for name in ("assistant+lookup", "llama"):
        pair.use_drafter(str(home / name))
    assert caches == [False, False, True]


def test_a_drafter_is_one_module_and_one_entry(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, combined, offered and described, with nothing changed elsewhere."""
    asked: list[Choice] = []

    def make(context: Any) -> Any:
        asked.append(context.choice)
        parrot = tiny.ScriptedDrafter(lambda tokens, length: [tokens[-1]] * length)
        parrot.name = "parrot"
        return parrot

    module: Any = ModuleType("spec_decode.drafters.parrot")
    module.load = make
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parrot = Kind("parrot", "parrot", "parrot", "Parrot: the last token is guessed to follow again.", combines=True)
    before, offered = catalog.drafters("x"), set(catalog.drafters("embedded"))
    monkeypatch.setattr(kinds, "KINDS", (*kinds.KINDS, parrot))

    pair = load(home, "parrot")
    assert pair.info["drafter"] == "parrot" and asked == [Choice(parrot, "parrot")]
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=8, draft_length=2)))
    list(race)
    assert race.trace.identical and any(r.drafted for r in race.trace.lane(SPECULATIVE))
    pair.use_drafter("parrot+lookup")
    assert pair.info["drafter"] == "parrot+lookup"
    assert pair.revisions["drafter"] == {"id": "parrot", "revision": None, "sha256": None}
    assert pair.drafters == (*before, "parrot")
    assert set(catalog.drafters("embedded")) - offered == {"mtp+parrot", "parrot"}
    parser = argparse.ArgumentParser()
    flags.add(parser)
    text = " ".join(parser.format_help().split())
    assert "mtp, parrot, a Hub id or a directory; with +lookup" in text and "or +parrot after it" in text


def test_a_drafter_that_shares_the_targets_head_stays_on_its_device(home: Path) -> None:
    choice = choose_drafter(str(home / "assistant"), "x", None)
    choice.config.shares_target_head = True
    plan = make_plan("x", "cpu", "float32", {})
    for where, refused in ((torch.device("meta"), True), (torch.device("cpu"), False)):
        context: Any = argparse.Namespace(choice=choice, plan=argparse.Namespace(**{**vars(plan), "device": where}))
        context.target = Target(tiny.gemma4("shared")[0])
        context.assistant = lambda: tiny.gemma4("shared")[1]
        if refused:
            with pytest.raises(ModelError, match="uses the target's head, so it must be on the target's device"):
                choice.kind.load(context)
        else:
            assert choice.kind.load(context).name == "assistant"
