"""Estimates of memory: weights and caches are exact, and the alternatives that a shortfall names fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

from spec_decode.draft_length import RECORDED
from spec_decode.errors import ModelError
from spec_decode.graphs import Recorder
from spec_decode.loading import catalog, memory, quantized
from spec_decode.loading.checkpoints import How, load_assistant, load_model
from spec_decode.loading.pair import _check_recordings
from spec_decode.target import Target

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("kind", tiny.GEMMA4)
def test_weights_and_caches_are_exact(kind: str) -> None:
    model, assistant = tiny.gemma4(kind)
    empty = memory.empty(model.config)
    assert memory.weights(empty, torch.float32) == sum(w.numel() * 4 for w in model.parameters())
    target = Target(model)
    cache = target.new_cache(600)
    target.prefill(torch.arange(1, 30), cache)
    used = [layer for layer in cache.layers if layer.is_initialized]
    stored = sum(part.numel() * 4 for layer in used for part in (layer.keys, layer.values))
    assert memory.cache_per_token(empty, torch.float32) * cache.capacity == stored
    helper = memory.Part(memory.empty(assistant.config), CPU, torch.bfloat16, caches=False)
    assert helper.need.total == sum(w.numel() * 2 for w in assistant.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_caches_of_other_families(kind: str) -> None:
    model = tiny.model(kind)
    target = Target(model)
    cache = target.new_cache(10)
    target.prefill(torch.arange(1, 9), cache)
    stored = sum(part.numel() * 4 for layer in cache.layers for part in (layer.keys, layer.values))
    assert memory.cache_per_token(memory.empty(model.config), torch.float32) * cache.capacity == stored


def stored(model: PreTrainedModel) -> int:
    """Bytes of a loaded model's weights and scales, with 4-bit weights packed as in the first pass."""
    size = sum(w.numel() * w.element_size() for w in model.parameters())
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if (scales := getattr(weight, "SCB", None)) is not None:
            size += scales.numel() * 4
        if (state := getattr(weight, "quant_state", None)) is not None:
            if module.support_avx512bf16_for_cpu:
                _, state = bitsandbytes.functional._convert_weight_packed_for_cpu(weight.data, state)
                size += state.absmax.numel() * state.absmax.element_size()
            else:
                size += state.absmax.numel() + state.state2.absmax.numel() * 4
    return size


@pytest.mark.parametrize("kind", ["shared", "moe"])
@pytest.mark.parametrize("precision", catalog.PRECISIONS)
def test_quantized_weights_are_exact(kind: str, precision: str, tmp_path: Path, packed: bool) -> None:
    """Compared with bitsandbytes, for shapes that it can pack. Embeddings, head and experts are not quantized."""
    pair = tiny.gemma4(kind, hidden_size=64, intermediate_size=256, ordered=kind == "moe")
    for model in pair:
        model.save_pretrained(tmp_path / type(model).__name__)
        if model is pair[1] and packed and precision == "nf4":
            continue  # none of its layers can be packed: see test_models
        load = load_assistant if model is pair[1] else load_model
        loaded = load(str(tmp_path / type(model).__name__), CPU, "float32", How(precision=precision))
        size = stored(loaded)
        assert memory.weights(memory.empty(model.config), torch.float32, precision, CPU) == size
        assert size < sum(w.numel() * 4 for w in model.parameters())
        assert type(loaded.get_output_embeddings()) is nn.Linear


def test_no_layer_of_the_catalog_is_left_out(packed: bool) -> None:
    for entry in catalog.GEMMA4:
        for model in (memory.of_catalog(entry), memory.drafter_of_catalog(entry)):
            assert quantized.left_out(model, "nf4", CPU) == []


def part(name: str, precision: str | None = None, device: torch.device = META) -> memory.Part:
    entry = catalog.find(name)
    assert entry is not None
    return memory.Part(memory.of_catalog(entry), device, torch.bfloat16, precision)


@pytest.fixture(scope="module")
def helper() -> memory.Part:
    _, assistant = tiny.gemma4("dense")
    return memory.Part(memory.empty(assistant.config), META, torch.bfloat16, caches=False)


@pytest.mark.parametrize(
    ("name", "room", "advice"),
    [
        ("gemma-4-31B", 45, "--quantize int8 would fit"),
        ("gemma-4-31B", 30, "--quantize nf4 would fit"),
        ("gemma-4-31B", 24, "--pair gemma-4-12B --quantize int8 would fit"),
        ("gemma-4-12B", 20, "--quantize int8 would fit"),
        ("gemma-4-12B", 11.5, "--quantize nf4 would fit"),
        ("gemma-4-E4B", 8.5, "--pair gemma-4-E2B --quantize int8 would fit"),
        ("gemma-4-E4B", 7.5, "--pair gemma-4-E2B --quantize nf4 would fit"),
        ("gemma-4-E2B", 2, "nothing of this kind would fit"),
    ],
)
def test_a_shortfall_states_its_size_and_an_alternative_that_fits(
    name: str, room: float, advice: str, helper: memory.Part
) -> None:
    target = part(name)
    needed = target.need.total + helper.need.total
    with pytest.raises(ModelError) as caught:
        memory.check(name, target, helper, lambda _: int(room * 1e9))
    sentence = str(caught.value)
    assert advice in sentence and "\n" not in sentence
    assert f"needs about {needed / 1e9:.1f} GB" in sentence and f"{needed / 1e9 - room:.1f} GB too few" in sentence


def test_a_pair_that_fits_exactly_passes() -> None:
    target = part("gemma-4-31B", "nf4")
    memory.check("x", target, None, lambda _: target.need.total)
    with pytest.raises(ModelError):
        memory.check("x", target, None, lambda _: target.need.total - 1)


def test_a_drafter_on_another_device_counts_there() -> None:
    """One byte too few for both on the GPU, so the message advises to put the drafter on the CPU."""
    target, drafter = part("gemma-4-E2B"), part("gemma-4-E2B")
    both = target.need.total + drafter.need.total
    with pytest.raises(ModelError, match="--drafter-device cpu would fit"):
        memory.check("x", target, drafter, lambda _: both - 1)
    aside = part("gemma-4-E2B", device=CPU)
    memory.check("x", target, aside, lambda _: target.need.total)
    with pytest.raises(ModelError, match="on cpu"):
        memory.check("x", None, aside, lambda _: aside.need.total - 1)


def test_half_precision_is_advised_before_quantizing() -> None:
    model = tiny.model("llama", hidden_size=512, intermediate_size=2048)
    whole = memory.Part(memory.empty(model.config), CPU, torch.float32)
    with pytest.raises(ModelError, match="--dtype bfloat16 would fit"):
        memory.check("x", whole, None, lambda _: whole.need.total - 1)


def test_free_memory_of_this_machine() -> None:
    assert 10**8 < memory.free_on(CPU) < 10**14


def test_what_pytorch_keeps_on_a_gpu_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 40)
    gpu = torch.device("cuda", 0)
    assert (memory.free_on(gpu), memory.free_on(gpu, spread=True)) == (130, 260)


def test_recordings_are_counted_on_gpus_and_refuse_no_pair() -> None:
    """Each lane's second cache, and rows of logits in the pool; a pair that fits without them is not refused."""
    for name in ("gemma-4-E2B", "gemma-4-31B"):
        gpu, cpu = part(name), part(name, device=CPU)
        need = gpu.need
        assert cpu.need.recordings == 0 and cpu.need.total == need.total
        logits = sum(2 * n + 2 for n in RECORDED) * 262_144 * 4
        assert need.cache + logits < need.recordings < need.cache + 8 * logits
        memory.check(name, gpu, None, lambda _, total=need.total: total)


def test_recording_is_given_up_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    recorders = {"baseline": Recorder(lambda: None), "speculative": Recorder(lambda: None)}  # type: ignore[arg-type,return-value]
    plan = SimpleNamespace(dtype="float32")
    made: Any = SimpleNamespace(target=Target(model), plan=plan, recorders=recorders)
    made.target.device = META  # counts as a GPU
    need = memory.Part(model, META, torch.float32).need
    wanted = need.cache + need.workspace + need.recordings
    for there, refused in ((wanted, False), (wanted - 1, True)):
        monkeypatch.setattr(memory, "free_on", lambda device, there=there: there)
        _check_recordings(made)
        assert all(bool(recorder.refused) == refused for recorder in recorders.values())
    assert "of memory" in recorders["baseline"].refused
