"""Milliseconds of the linear layers of SmolLM2-135M at few rows, the head included, in PyTorch's kernels and in ours.

    python -m spec_decode check kernels

Random weights of the model's shapes, a matrix of its own for each layer, so that weights are read from memory as they
are in a pass. Prints a Markdown table: milliseconds for all 121 layers at M rows, the median of repeats; and whether
row 0 of M = 8 has the same bits as at M = 1. The last line is a whole pass of our engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ..cpu.llama import Int8Linear, quantize
from ..loading.placement import machine
from ..target import Target

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)] * 30 + [(49152, 576)]  # [out, in], q/k/v and gate/up fused
ROWS = (1, 2, 4, 5, 8, 17)
REPEATS = 15
Layer = Callable[[Tensor], Tensor]


def float32(weight: Tensor) -> Layer:
    return lambda x: torch.nn.functional.linear(x, weight)


def bfloat16(weight: Tensor) -> Layer:
    weight = weight.bfloat16()
    return lambda x: torch.nn.functional.linear(x.bfloat16(), weight)


def dynamic_int8(weight: Tensor) -> Layer:
    """fbgemm with one activation scale for the whole tensor, as `torch.ao.quantization.quantize_dynamic` uses it."""
    scale = (weight.abs().amax(1) / 127).double()
    zero = torch.zeros(len(scale), dtype=torch.long)
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8), None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)


def ours(weight: Tensor) -> Layer:
    """8-bit weights, 14-bit activations with a scale for every row; see `spec_decode/cpu/kernels`."""
    return Int8Linear(weight)


def rows_int8(weight: Tensor) -> Layer:
    """fbgemm with a scale for every row. Without VNNI it adds pairs of products in 16 bits, so weights have 7 bits."""
    scale = (weight.abs().amax(1) / 63).double()
    zero = torch.zeros(len(scale), dtype=torch.long)
    packed = torch.ops.quantized.linear_prepack(torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8), None)

    def layer(x: Tensor) -> Tensor:
        row_scale = x.abs().amax(-1, keepdim=True)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / row_scale, 1 / 127, 128, packed)
        return y * row_scale

    return layer


def int_mm(weight: Tensor) -> Layer:
    scale = weight.abs().amax(1) / 127
    quantized = (weight / scale[:, None]).round().to(torch.int8).t()

    def layer(x: Tensor) -> Tensor:
        row_scale = x.abs().amax(-1, keepdim=True) / 127
        return torch._int_mm((x / row_scale).round().to(torch.int8), quantized) * row_scale * scale

    return layer


def int8_weights(weight: Tensor) -> Layer:
    """`_weight_int8pack_mm`: int8 weights, bfloat16 activations."""
    scale = (weight.abs().amax(1) / 127).bfloat16()
    quantized = (weight / scale[:, None]).round().to(torch.int8)
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), quantized, scale)


def onednn_int8(weight: Tensor) -> Layer:
    """`onednn.qlinear_pointwise`, the successor of the fbgemm kernels, with a scale for every row as in ours."""
    scale = weight.abs().amax(1) / 127
    packed = torch.ops.onednn.qlinear_prepack((weight / scale[:, None]).round().to(torch.int8), None)
    zero = torch.zeros(len(scale), dtype=torch.int32)

    def layer(x: Tensor) -> Tensor:
        row_scale = x.abs().amax(-1, keepdim=True) / 127
        q = (x / row_scale + 128).round().to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y * row_scale

    return layer


KINDS: dict[str, Callable[[Tensor], Layer]] = {
    "float32 (MKL)": float32,
    "bfloat16": bfloat16,
    "int8, one activation scale per tensor (fbgemm dynamic)": dynamic_int8,
    "int8, one activation scale per row (fbgemm)": rows_int8,
    "**8-bit weights, 14-bit activations, one scale per row, ours**": ours,
    "int8, one activation scale per row (`_int_mm`)": int_mm,
    "int8, one activation scale per row (`onednn.qlinear_pointwise`)": onednn_int8,
    "int8 weights, bfloat16 activations (`_weight_int8pack_mm`)": int8_weights,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`check kernels` has no options."""


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    """Prints what it ran on and the table."""
    warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    print(json.dumps(machine(torch.device("cpu"))))
    print(f"\n| kernel | {' | '.join(f'M = {m}' for m in ROWS)} | rows independent |")
    print(f"| --- | {'---: | ' * len(ROWS)}--- |")
    inputs = {m: {n: torch.randn(m, n) for n in {n for _, n in SHAPES}} for m in ROWS}
    for name, kind in KINDS.items():
        layers = [(n, kind(torch.randn(out, n) / n**0.5)) for out, n in SHAPES]
        cells = [f"{_milliseconds(layers, inputs[m]):.0f}" for m in ROWS]
        x = torch.randn(8, 576)
        x[1:] *= 10
        layer = kind(torch.randn(960, 576))
        same = torch.equal(layer(x)[0], layer(x[:1].clone())[0])
        print(f"| {name} | {' | '.join(cells)} | {'yes' if same else 'no'} |", flush=True)
    print(f"| **the same in one call, attention and all else included** | {' | '.join(_passes())} | yes |")


def _passes() -> list[str]:
    """Milliseconds of a pass over M tokens of a random model of those shapes, after 64 positions."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.set_num_threads(1)  # as in the app: our kernels have threads of their own
    target = Target(quantize(LlamaForCausalLM(config)))
    cache, tokens = target.new_cache(128), torch.arange(64)
    target.prefill(tokens, cache)

    def seconds(m: int) -> float:
        begun = time.perf_counter()
        target.verify(tokens[:m], cache)
        spent = time.perf_counter() - begun
        cache.rollback(64)
        return spent

    return [f"{1e3 * statistics.median(seconds(m) for _ in range(REPEATS)):.0f}" for m in ROWS]


def _milliseconds(layers: list[tuple[int, Layer]], inputs: dict[int, Tensor]) -> float:
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        for n, layer in layers:
            layer(inputs[n])
        seconds.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(seconds)
