"""Loading pairs: from a hub and offline, quantized, at a revision, over several GPUs, and what is refused."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as pieces
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Lfm2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from spec_decode.draft_length import EarlyStop
from spec_decode.drafters import Draft
from spec_decode.drafters.lookup import LookupDrafter
from spec_decode.drafters.mtp import MTPDrafter
from spec_decode.errors import ModelError, OutOfMemory, SettingsError, UserError
from spec_decode.events import SPECULATIVE
from spec_decode.loading import checkpoints, checksums, embedded, measure, memory
from spec_decode.loading import pair as models
from spec_decode.loading.checkpoints import How, load_assistant, load_model, read_config
from spec_decode.loading.drafter import SHIPPED
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.sources.local import LocalSource, Race
from spec_decode.state import State
from spec_decode.target import Target
from spec_decode.text import encode_chat

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% if enable_thinking %}w1 {% endif %}{% for turn in messages %}"
    "{{ 'w2' if turn.role == 'system' else 'w3' }} {{ turn.content }} {% endfor %}w4"
)
PROMPT = "w10 w11 w12 w13"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = Tokenizer(pieces.WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=template)


def multimodal(text: PreTrainedModel) -> PreTrainedModel:
    """A Gemma 4 in the format of Google's checkpoints: the text model inside a multimodal one."""
    if text.config.model_type == "gemma4_unified_text":
        whole: Any = Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(text_config=text.config))
    else:
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"num_key_value_heads": 2, "head_dim": 8}
        whole = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text.config, vision_config=vision))
    whole.model.language_model.load_state_dict(text.model.state_dict())  # type: ignore[union-attr]
    whole.tie_weights()
    return whole


@pytest.fixture(scope="module")
def pair_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny `target`, multimodal, its `assistant`, and the configuration of a `hybrid`."""
    home = tmp_path_factory.mktemp("pair")
    text, assistant = tiny.gemma4("shared")
    whole = multimodal(text)
    whole.generation_config.eos_token_id = [5, 7]
    whole.save_pretrained(home / "target")
    tokenizer().save_pretrained(home / "target")
    assistant.generation_config.num_assistant_tokens = 3
    assistant.save_pretrained(home / "assistant")
    (home / "hybrid").mkdir()
    layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
    Lfm2Config(**layers, hidden_size=32, num_attention_heads=4).save_pretrained(home / "hybrid")
    return home


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair whose target has both layers that bitsandbytes can pack and layers that it cannot."""
    home = tmp_path_factory.mktemp("wide")
    for name, model in zip(("target", "assistant"), tiny.gemma4("shared", hidden_size=64), strict=True):
        model.save_pretrained(home / name)
    tokenizer().save_pretrained(home / "target")
    return home


def load(home: Path, **options: Any) -> models.Pair:
    return models.load_pair(str(home / "target"), str(home / "assistant"), **{"device": "cpu", **options})


# Checkpoints


@pytest.mark.parametrize("kind", ["shared", "moe", "unified"])
def test_of_a_multimodal_checkpoint_the_text_model_is_loaded(kind: str, tmp_path: Path) -> None:
    text, _ = tiny.gemma4(kind)
    multimodal(text).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), CPU, "float32")
    assert type(loaded) is type(text)
    tokens = torch.arange(1, 60)
    cache = Target(loaded).new_cache(100)
    torch.testing.assert_close(Target(loaded).prefill(tokens, cache).logits[0], text(tokens[None]).logits[0, -1])


def test_a_pair_is_loaded_and_raced(pair_dir: Path) -> None:
    lines: list[str] = []
    pair = load(pair_dir, progress=lines.append)
    assert isinstance(pair.drafter, MTPDrafter) and pair.info["drafter"] == "assistant"
    assert pair.draft_length == 3 and any("draft length of 3" in line for line in lines)
    assert pair.target.eos == {5, 7}
    for settings in (Settings(max_new_tokens=20), Settings(max_new_tokens=20, temperature=1, rule="coupled")):
        race = Race(pair, Request(PROMPT, settings))
        list(race)
        assert race.trace.identical
        ids = race.trace.token_ids(SPECULATIVE)
        assert len(ids) == 20 or ids[-1] in (5, 7)
        assert not set(ids[:-1]) & {5, 7}
    pair.use_drafter("lookup")
    assert pair.draft_length is None


def test_what_is_loaded_is_left_out_of_garbage_collections_until_the_next_pair(pair_dir: Path) -> None:
    pair = load(pair_dir)
    model = weakref.ref(pair.target.model)
    inside = {id(part) for part in gc.get_objects()}
    assert id(pair.target.model) not in inside, "a full collection would visit it during a race"
    circle: list[Any] = [pair]
    circle.append(circle)  # only the garbage collector finds that nobody holds it
    del pair, circle
    load(pair_dir)
    assert model() is None


def test_any_of_the_end_of_turn_ids_ends_a_text(pair_dir: Path) -> None:
    pair = load(pair_dir)
    pair.target.eos = frozenset()
    free = Race(pair, Request(PROMPT, Settings(max_new_tokens=12)))
    list(free)
    ids = free.trace.token_ids(SPECULATIVE)
    for end in ids[1:8:3]:
        pair.target.eos = frozenset({end, 10**6})
        race = Race(pair, Request(PROMPT, Settings(max_new_tokens=12)))
        list(race)
        assert race.trace.token_ids(SPECULATIVE) == ids[: ids.index(end) + 1]
        assert set(race.trace.finish.values()) == {"stop"}


def test_an_incomplete_checkpoint_is_refused(pair_dir: Path, tmp_path: Path) -> None:
    """transformers would initialize the missing weights at random."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(pair_dir / "target", tmp_path / "target")
    file = tmp_path / "target" / "model.safetensors"
    kept = load_file(file)
    del kept["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not a complete checkpoint.*1 weights are missing.*up_proj"):
        load_model(str(tmp_path / "target"), CPU, "float32")
    file.unlink()
    torch.save(kept, tmp_path / "target" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds its weights as pytorch_model\.bin; only safetensors"):
        load_model(str(tmp_path / "target"), CPU, "float32")


def test_a_missing_file_is_one_sentence(pair_dir: Path, tmp_path: Path) -> None:
    for broken, sentence in (
        ("config.json", "has no config.json that can be used"),
        ("tokenizer.json", "has no tokenizer that can be read; it takes a tokenizer.json beside its weights."),
        ("model.safetensors", "is not a usable safetensors checkpoint"),
    ):
        home = tmp_path / broken
        for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(b"{")):
            shutil.copytree(pair_dir / "target", home, dirs_exist_ok=True)
            damage(home / broken)
            with pytest.raises(ModelError) as caught:
                models.load_pair(str(home), "lookup", device="cpu")
            message = str(caught.value)
            assert message.startswith(f"{home} {sentence}") and "\n" not in message and message.endswith(".")
    with pytest.raises(ModelError, match=r"^There is no directory '.*nowhere' on this disk\.$"):
        models.load_pair(str(tmp_path / "nowhere"), device="cpu")


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}})
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        read_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_an_assistant_of_another_target_is_refused(pair_dir: Path, tmp_path: Path) -> None:
    _, other = tiny.gemma4("shared", hidden_size=64)
    other.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="made for a target 64 wide"):
        models.load_pair(str(pair_dir / "target"), str(tmp_path), device="cpu")


# Revisions


def test_revisions_of_local_directories(pair_dir: Path, tmp_path: Path) -> None:
    """A sum is given only where it was compared with the file."""
    pair = load(pair_dir)
    unknown = {"revision": None, "sha256": None}
    assert pair.revisions == {
        "target": {"id": str(pair_dir / "target"), **unknown},
        "drafter": {"id": str(pair_dir / "assistant"), **unknown},
    }
    shutil.copytree(pair_dir / "assistant", tmp_path / "assistant")
    checksums.write(tmp_path / "assistant")
    pair.use_drafter(str(tmp_path / "assistant"))
    weights = (tmp_path / "assistant" / "model.safetensors").read_bytes()
    assert pair.revisions["drafter"] == {
        "id": str(tmp_path / "assistant"),
        "revision": None,
        "sha256": {"model.safetensors": hashlib.sha256(weights).hexdigest()},
    }
    pair.use_drafter("lookup")
    assert pair.revisions["drafter"] == {"id": "lookup", **unknown}
    shutil.copytree(pair_dir / "target", tmp_path / "target")
    checksums.write(tmp_path / "target")  # which nothing compares for a target
    assert load(tmp_path).revisions["target"]["sha256"] is None
    named = load(pair_dir, target_revision="v2", drafter_revision="v3").revisions
    assert (named["target"]["revision"], named["drafter"]["revision"]) == ("v2", "v3")


def test_revisions_of_the_embedded_pair(embedded_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure_costs", "choose_chunks", "choose_threads"):
        monkeypatch.setattr(models, name, lambda *_, **__: None)
    found = models.load_pair(device="cpu", dtype="float32").revisions
    sums = {
        role: {"model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
        for role, folder in (("target", embedded_dir), ("drafter", SHIPPED))
    }
    assert found["drafter"] == {"id": "mtp", "revision": None, "sha256": sums["drafter"]}
    from_hub = sums["target"]["model.safetensors"] == embedded.HUB_WEIGHTS_SHA256
    revision = embedded.HUB_REVISION if from_hub else embedded.REQUIREMENT
    assert found["target"] == {"id": embedded.NAME, "revision": revision, "sha256": sums["target"]}


def test_mtp_is_refused_where_there_is_none(pair_dir: Path) -> None:
    with pytest.raises(ModelError, match="no MTP drafter"):
        models.load_pair(str(pair_dir / "target"), "mtp", device="cpu")


# Precision and placement


@pytest.mark.parametrize(
    ("quantize", "target_class", "drafter_class", "dtype"),
    [
        ("nf4", "Linear4bit", "Linear", "float32 (target nf4)"),
        ("target=int8", "Linear8bitLt", "Linear", "float32 (target int8)"),
        ("target=nf4,drafter=int8", "Linear4bit", "Linear8bitLt", "float32 (target nf4, drafter int8)"),
    ],
)
def test_bitsandbytes(
    wide_dir: Path, quantize: str, target_class: str, drafter_class: str, dtype: str, packed: bool
) -> None:
    lines: list[str] = []
    pair = load(wide_dir, quantize=quantize, progress=lines.append)
    layer: Any = pair.target.model.model.layers[0]  # type: ignore[union-attr, index]
    assert type(layer.mlp.up_proj).__name__ == target_class
    assert type(pair.drafter.model.pre_projection).__name__ == drafter_class  # type: ignore[attr-defined]
    assert pair.info["dtype"] == dtype
    assert any("slowly" in line for line in lines)
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=8)))
    list(race)
    assert len(race.trace.token_ids(SPECULATIVE)) in range(1, 9)
    narrow = packed and target_class == "Linear4bit"  # 16 outputs of k_proj: no multiple of 32
    assert type(layer.self_attn.k_proj).__name__ == ("Linear" if narrow else target_class)
    reported = [line for line in lines if "cannot hold" in line]
    assert len(reported) == narrow
    if narrow:
        left = [name for name, module in pair.target.model.named_modules() if type(module) is torch.nn.Linear]
        left.remove("lm_head")
        assert f" {len(left)} linear layers of the target in nf4" in reported[0] and "stay in float32" in reported[0]
        assert "model.layers.*.self_attn.k_proj (* = 0, 2)" in reported[0]


def test_a_model_none_of_whose_layers_can_be_packed_is_refused(wide_dir: Path, packed: bool) -> None:
    how = {"quantize": "target=nf4,drafter=nf4"}
    if packed:
        with pytest.raises(ModelError, match=r"none of the linear layers of .*assistant in nf4 on this processor"):
            load(wide_dir, **how)
    else:
        assert load(wide_dir, **how).left_out() == []


def test_dtype_attention_and_placement_reach_the_models(pair_dir: Path) -> None:
    pair = load(pair_dir, dtype="bfloat16", attention="eager", drafter_device="cpu", device_map="auto")
    for model in (pair.target.model, pair.drafter.model):  # type: ignore[attr-defined]
        assert model.dtype == torch.bfloat16 and model.config.get_text_config()._attn_implementation == "eager"
    race = Race(pair, Request(PROMPT, Settings(max_new_tokens=8)))
    list(race)
    assert race.trace.rounds


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"quantize": "int3"}, SettingsError, "Cannot quantize"),
        ({"attention": "flash_attention_2"}, SettingsError, "takes a mask"),
        ({"device_map": "balanced"}, ModelError, "Unknown device map"),
        ({"dtype": "int8", "quantize": "nf4"}, ModelError, "quantization of its own"),
        ({"drafter_device": "toaster"}, ModelError, "Unknown device"),
        ({"drafter_device": "cuda"}, ModelError, "No CUDA device"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    pair_dir: Path, options: Any, kind: type[Exception], sentence: str
) -> None:
    if options.get("drafter_device") == "cuda" and torch.cuda.is_available():
        return
    with pytest.raises(kind, match=sentence) as caught:
        load(pair_dir, **options)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_before_it_is_loaded(pair_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    pair = load(pair_dir)
    monkeypatch.setattr(checkpoints, "_from_pretrained", never)
    monkeypatch.setattr(memory, "free_on", lambda *_: 1000)
    with pytest.raises(ModelError, match="too few"):
        load(pair_dir)
    with pytest.raises(ModelError, match="too few"):
        pair.use_drafter(str(pair_dir / "assistant"))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


def fail_at(call: int, forward: Any, error: Exception, held: list[Any] | None = None) -> Any:
    """`forward`, but its `call`-th call raises while it holds a tensor, to which `held` gets a weak reference."""
    calls = iter(range(10**6))

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            activations = torch.zeros(1000)
            if held is not None:
                held.append(weakref.ref(activations))
            raise error
        return forward(*args, **options)

    return failing


def test_out_of_memory_ends_the_race_and_not_the_pair(pair_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load(pair_dir)
    for error in OUT_OF_MEMORY:
        for model in (pair.drafter.model.model, pair.target.model):  # type: ignore[attr-defined]
            held: list[Any] = []
            with monkeypatch.context() as patch:
                patch.setattr(model, "forward", fail_at(3, model.forward, error, held))
                race = Race(pair, Request(PROMPT, Settings(max_new_tokens=20, draft_length=3)))
                with pytest.raises(OutOfMemory, match="out of memory"):
                    list(race)
            assert held[0]() is None, "activations are freed although the exception is still referenced"
            assert "cancelled" in race.trace.finish.values()
            again = Race(pair, Request(PROMPT, Settings(max_new_tokens=20, draft_length=3)))
            list(again)
            assert again.trace.identical


def test_an_error_that_mentions_memory_need_not_be_out_of_memory(
    pair_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, error = load(pair_dir), RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(pair.target.model, "forward", fail_at(3, pair.target.model.forward, error))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(Race(pair, Request(PROMPT, Settings(max_new_tokens=20))))


def test_the_app_continues_after_out_of_memory(pair_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine and the stream of the page: in a race, and while a drafter is loaded."""
    from spec_decode.session.device import Engine
    from spec_decode.session.feed import Feed
    from spec_decode.session.stream import run

    pair = load(pair_dir)
    engine = Engine(lambda _: LocalSource(pair, own=str(pair_dir / "assistant"), drafters=("lookup",)))
    engine.start()
    while engine.status().phase == "loading":
        time.sleep(0.01)
    asked = Request(PROMPT, Settings(max_new_tokens=20))

    def finished() -> bool:
        trace = list(run(engine, "v", asked, Feed()))[-1].trace
        return trace is not None and trace.identical and trace.pair["drafter"] == "assistant"

    for error in OUT_OF_MEMORY:
        with monkeypatch.context() as patch:
            patch.setattr(pair.target.model, "forward", fail_at(5, pair.target.model.forward, error))
            last = list(run(engine, "v", asked, Feed()))[-1]
        assert "out of memory" in str(last.problem) and json.loads(last.batch)["phase"] == "failed"
        assert last.trace is not None and last.trace.rounds, "what came before is kept"
        assert finished()
    list(run(engine, "v", replace(asked, drafter="lookup"), Feed()))
    with monkeypatch.context() as patch:
        patch.setattr(models, "measure_costs", fail_at(0, models.measure_costs, OUT_OF_MEMORY[0]))
        with pytest.raises(ModelError, match="ran out of memory while it was loaded"):
            list(run(engine, "v", replace(asked, drafter="assistant"), Feed()))
    assert pair.drafter.name == "lookup"
    assert finished()


# Chat


def test_the_history_of_a_conversation_stands_before_the_prompt() -> None:
    words = tokenizer("{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} {% endfor %}w3")
    assert encode_chat(words, "w9") == [1, 9, 3]
    assert encode_chat(words, "w9", history=(("w5", "w6"), ("w7", "w8"))) == [1, 5, 2, 6, 1, 7, 2, 8, 1, 9, 3]
    bare = tokenizer(None)
    assert encode_chat(bare, "w9", "w4", history=(("w5", "w6"),)) == [4, 5, 6, 9]


def test_thinking_is_switched_where_there_is_a_switch() -> None:
    words = tokenizer()
    assert encode_chat(words, "w9") == [3, 9, 4]
    assert encode_chat(words, "w9", "w8", thinking=True) == [1, 2, 8, 3, 9, 4]
    for template in (TEMPLATE.replace("enable_thinking", "false"), None):
        with pytest.raises(UserError, match="no thinking mode"):
            encode_chat(tokenizer(template), "w9", thinking=True)
    always = tokenizer("{% if enable_thinking is not defined or enable_thinking %}w1 {% endif %}w4")
    assert encode_chat(always, "w9") == [4]


def test_a_race_thinks(pair_dir: Path) -> None:
    pair = load(pair_dir)
    assert Race(pair, Request(PROMPT, thinking=True)).ids == [1, *Race(pair, Request(PROMPT)).ids]


def test_the_app_offers_the_switch_where_there_is_one(pair_dir: Path, tmp_path: Path) -> None:
    from spec_decode.session.device import Engine

    shutil.copytree(pair_dir / "target", tmp_path / "target")
    shutil.copytree(pair_dir / "assistant", tmp_path / "assistant")
    tokenizer(None).save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").unlink()
    for home, switch in ((pair_dir, True), (tmp_path, None)):
        pair = load(home)
        engine = Engine(lambda _, pair=pair: LocalSource(pair), thinking=True)
        engine.start()
        while engine.status().phase == "loading":
            time.sleep(0.01)
        assert engine.status().thinking is switch
    with pytest.raises(UserError, match="no thinking mode"):
        engine.open("v", Request(PROMPT, thinking=True))
    engine = Engine(lambda _: LocalSource(load(pair_dir)))
    engine.start()
    while engine.status().phase == "loading":
        time.sleep(0.01)
    assert engine.status().thinking is False
    opened = engine.open("v", Request(PROMPT, Settings(max_new_tokens=2), thinking=True))
    assert opened.trace.prompt_tokens == len(encode_chat(tokenizer(), PROMPT, thinking=True))
    engine.close("v", opened)


# The Hub


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that its client needs to download two repositories."""

    home: Path
    asked: list[str]
    revision = "1" * 40
    old = "2" * 40

    def _answer(self, body: bool) -> None:
        path, token = self.path.split("?")[0], self.headers.get("authorization", "")
        self.asked.append(path)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, revision = "/".join(parts[:2]), parts[3] if parts[2:3] == ["resolve"] else ""
        file = self.home / parts[1] / "/".join(parts[4:]) if revision else self.home / "none"
        code, kind, content = 404, "EntryNotFound", b""
        if "wrong-token" in token:
            code, kind = 401, ""
        elif name == "tiny/gated":
            code, kind = 403, "GatedRepo"
        elif name == "tiny/closed":
            code, kind = 403, ""
        elif name == "tiny/busy":
            code, kind = 501, ""  # one that its client does not try again
        elif name == "tiny/hollow":
            pass
        elif name not in ("tiny/target", "tiny/assistant", "tiny/hybrid"):
            kind = "RepoNotFound"
        elif revision and revision not in ("main", self.revision, self.old):
            kind = "RevisionNotFound"
        elif file.is_file():
            code, kind, content = 200, "", file.read_bytes()
            if revision == self.old and file.name == "generation_config.json":
                content = content.replace(b": 3", b": 9")
        self.send_response(code)
        if code == 200:
            self.send_header("X-Repo-Commit", self.revision if revision == "main" else revision)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", kind)
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header" if code == 401 else kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(pair_dir: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of a hub with tiny/target, tiny/assistant and tiny/gated, and what it is asked for."""
    handler = type("Handler", (Hub,), {"home": pair_dir, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
    server.shutdown()


SCRIPT = """
import json, sys
from spec_decode.errors import ModelError
from spec_decode.loading.pair import load_pair
from spec_decode.request import Request
from spec_decode.sources.local import Race
from spec_decode.settings import Settings
for options in json.loads(sys.argv[1]):
    try:
        pair = load_pair(**{"target": "tiny/target", "drafter": "tiny/assistant", "device": "cpu", **options})
        race = Race(pair, Request("w10 w11 w12", Settings(max_new_tokens=6)))
        list(race)
        found = {"length": pair.draft_length, "identical": race.trace.identical, "revisions": pair.revisions}
        print(json.dumps({**pair.info, **found}))
    except ModelError as error:
        print(json.dumps(str(error)))
"""


def elsewhere(home: Path, cases: list[dict[str, Any]], **environment: str) -> list[Any]:
    """Loads pairs in a process of its own, since the Hub's client reads its environment once."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    env |= {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    out = subprocess.run(run, env=env | environment, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    return [json.loads(line) for line in out.stdout.splitlines()]


@pytest.mark.slow
def test_a_pair_comes_from_the_hub_once_and_then_from_the_disk(
    hub: tuple[str, list[str]], pair_dir: Path, tmp_path: Path
) -> None:
    address, asked = hub
    pinned = {"target_revision": Hub.old, "drafter_revision": Hub.old}
    first, second, gone = elsewhere(tmp_path, [{}, pinned, {"target_revision": "no-such"}], HF_ENDPOINT=address)
    assert first["target"] == "tiny/target" and first["drafter"] == "assistant" and first["identical"]
    assert (first["length"], second["length"]) == (3, 9)
    for loaded, commit in ((first, Hub.revision), (second, Hub.old)):
        for role, name in (("target", "target"), ("drafter", "assistant")):
            weights = hashlib.sha256((pair_dir / name / "model.safetensors").read_bytes()).hexdigest()
            wanted = {"id": f"tiny/{name}", "revision": commit, "sha256": {"model.safetensors": weights}}
            assert loaded["revisions"][role] == wanted
    assert "has no revision 'no-such'" in gone
    repositories = {"/".join(path.replace("/api/models", "").split("/")[1:3]) for path in asked}
    assert repositories == {"tiny/target", "tiny/assistant"}
    assert not any(path.endswith((".bin", ".py")) for path in asked)

    asked.clear()
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": address}
    again, older, never = elsewhere(tmp_path, [{}, pinned, {"target_revision": "3" * 40}], **offline)
    assert again == first and older == second
    assert "at revision 333" in never and "not on this disk" in never
    assert asked == []


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_sentence(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    names = ["tiny/gated", "tiny/nothing", "google/gemma-4-9b-it", "tiny/closed", "tiny/hollow", "tiny/busy"]
    cases = [{"target": name} for name in names] + [{"drafter": "google/gemma-4-2b-it-draft"}]
    cases += [{role: "tiny/hybrid"} for role in ("target", "drafter")]
    gated, missing, misnamed, closed, hollow, busy, helper, *hybrid = elsewhere(tmp_path, cases, HF_ENDPOINT=address)
    for sentence in hybrid:
        assert sentence.startswith("tiny/hybrid cannot be used: lfm2 has conv layers, whose state cannot roll back")
    fetched = {Path(path).name for path in asked if "tiny/hybrid/" in path}
    assert fetched == {"config.json"}, "no weights were fetched"
    assert closed.startswith("Your token may not read tiny/closed;")
    assert hollow.startswith("tiny/hollow has no config.json that can be used")
    assert busy == "The Hugging Face Hub answers with error 501, so tiny/busy cannot be read; try again later."
    assert "is gated: accept its licence" in gated
    assert (
        missing == "There is no model 'tiny/nothing' on the Hub or on this disk (a private one needs `hf auth login`)."
    )
    assert misnamed.endswith("; the nearest real name is google/gemma-4-12B-it.")
    assert helper.endswith("; the nearest real name is google/gemma-4-E2B-it-assistant.")
    (refused,) = elsewhere(tmp_path, [{}], HF_ENDPOINT=address, HF_TOKEN="hf_wrong-token")
    assert "does not accept your token" in refused
    (unreachable,) = elsewhere(tmp_path, [{}], HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hugging Face Hub cannot be reached" in unreachable
    for sentence in (gated, missing, misnamed, closed, hollow, busy, helper, *hybrid, refused, unreachable):
        assert "\n" not in sentence and sentence.endswith(".")


def test_a_head_may_be_left_out_only_where_it_is_the_targets(pair_dir: Path, tmp_path: Path) -> None:
    assert load_assistant(str(pair_dir / "assistant"), CPU, "float32", How()).config.model_type == "gemma4_assistant"
    shutil.copytree(pair_dir / "assistant", tmp_path / "headless")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "headless" / "model.safetensors"
    kept = {
        name: weight for name, weight in load_file(file).items() if "embed_tokens" not in name and "lm_head" not in name
    }
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        load_assistant(str(tmp_path / "headless"), CPU, "float32")
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    (tmp_path / "headless" / "config.json").write_text(json.dumps({**config, "shares_target_head": True}))
    load_assistant(str(tmp_path / "headless"), CPU, "float32")


def test_costs_separate_the_first_draft_step_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only passes and drafts advance."""
    now = [0.0]

    class Clocked(LookupDrafter):
        def draft_on_host(self, state: State, length: int, stop: EarlyStop | None = None) -> Draft:
            now[0] += 2 + 0.5 * length
            return Draft(torch.zeros(1, length, dtype=torch.long))

    target = Target(tiny.model("llama"))
    verify = target.verify

    def clocked(tokens: torch.Tensor, cache: Any, hidden: bool = False) -> Any:
        now[0] += 10 + tokens.shape[-1]
        return verify(tokens, cache, hidden)

    monkeypatch.setattr(target, "verify", clocked)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    costs = measure.measure_costs(target, Clocked())
    assert costs.step_seconds == pytest.approx(11)
    assert costs.verify_ratio == pytest.approx([(11 + g) / 11 for g in range(17)])
    assert costs.draft_ratio == pytest.approx(0.5 / 11) and costs.draft_start == pytest.approx(2 / 11)
    assert costs.round(0) == pytest.approx(1) and costs.round(4) == pytest.approx((15 + 4) / 11)


def test_costs_do_not_fall_with_width_and_state_their_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock by which the machine is three times slower for a while, and 3 tokens are cheaper than 2."""
    now, passes = [0.0], [0]

    target = Target(tiny.model("llama"))
    verify = target.verify
    costs = {1: 10.0, 2: 14.0, 3: 11.0, 4: 13.0, 5: 14.0}

    def clocked(tokens: torch.Tensor, cache: Any, hidden: bool = False) -> Any:
        passes[0] += 1
        busy = 3.0 if 40 <= passes[0] < 62 else 1.0  # a bit more than a sweep
        now[0] += busy * costs.get(tokens.shape[-1], 12.0 + tokens.shape[-1])
        return verify(tokens, cache, hidden)

    monkeypatch.setattr(target, "verify", clocked)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = measure.measure_costs(target, LookupDrafter(), repeats=7)
    assert found.step_seconds == pytest.approx(10) and found.verify_ratio[0] == 1
    assert found.verify_ratio[1:5] == pytest.approx([1.267, 1.267, 1.3, 1.4], abs=0.04)
    assert list(found.verify_ratio) == sorted(found.verify_ratio)
    assert found.doubt < 0.02
