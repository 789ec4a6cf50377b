"""Which linear layers of a model bitsandbytes quantizes on a device, and the bytes this saves.

In: a model, with or without storage, a precision of `catalog.PRECISIONS`, a device. Out: names of layers, bytes, a
sentence. Loads nothing.

On processors with AVX512-BF16, bitsandbytes (0.49 and later) reorders 4-bit weights in the first pass, for kernels of
its own. It packs `PACKED` outputs together and requires whole blocks of `BLOCK` weights, one scale each, in every row;
`_convert_weight_packed_for_cpu` raises for any other shape. Layers of other shapes are not quantized there.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

PACKED = 32
BLOCK = 64
TAKES = f"it takes multiples of {PACKED} outputs and {BLOCK} inputs here"


def packs(device: torch.device) -> bool:
    """Whether bitsandbytes reorders 4-bit weights on `device`."""
    if device.type != "cpu" or importlib.util.find_spec("bitsandbytes") is None:
        return False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package that downloads code
    from bitsandbytes import functional

    return bool(getattr(functional, "has_avx512bf16", bool)())


def kept(model: PreTrainedModel) -> list[str]:
    """Patterns of the modules that transformers never quantizes in `model`, such as its head."""
    return [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers, by name, that transformers gives to bitsandbytes and that are not quantized yet."""
    patterns = kept(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, patterns)
    }


def left_out(model: PreTrainedModel, precision: str | None, device: torch.device) -> list[str]:
    """Names of the `linears` that bitsandbytes cannot quantize to `precision` on `device`."""
    if precision != "nf4" or not packs(device):
        return []
    shapes = {name: _shape(layer) for name, layer in linears(model).items()}
    return [name for name, (outputs, inputs) in shapes.items() if outputs % PACKED or inputs % BLOCK]


def saved(model: PreTrainedModel, dtype: torch.dtype, precision: str, device: torch.device) -> int:
    """Bytes that quantization saves over `dtype`, after the first pass of the model."""
    left, packed = set(left_out(model, precision, device)), packs(device)
    shapes = [_shape(layer) for name, layer in linears(model).items() if name not in left]
    return sum(n * m * dtype.itemsize - _size(n, m, precision, packed) for n, m in shapes)


def sentence(names: list[str], precision: str, role: str, dtype: torch.dtype) -> str:
    """A sentence about the layers that `left_out` named, grouped where they differ in the layer's number only.

    Args:
        role: target or drafter.
        dtype: that the layers keep.
    """
    numbers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        kind = name.replace(number[0], ".*.", 1) if number else name
        numbers.setdefault(kind, []).extend([int(number[1])] if number else [])
    kinds = [f"{kind} (* = {', '.join(map(str, which))})" if which else kind for kind, which in numbers.items()]
    floats = str(dtype).removeprefix("torch.")
    return (
        f"bitsandbytes cannot hold {len(names)} linear layers of the {role} in {precision} on this processor "
        f"({TAKES}), so they stay in {floats}: {', '.join(kinds)}"
    )


def _shape(layer: Any) -> tuple[int, int]:
    """(outputs, inputs); a `Conv1D` of GPT-2 stores its weights transposed."""
    outputs, inputs = layer.weight.shape
    return (inputs, outputs) if isinstance(layer, Conv1D) else (outputs, inputs)


def _size(outputs: int, inputs: int, precision: str, packed: bool) -> int:
    if precision == "int8":
        return outputs * inputs + 4 * outputs  # a float32 scale per row
    blocks = -(-outputs * inputs // BLOCK)
    # The scales of blocks are quantized in turn, or bfloat16 where weights are packed.
    return -(-outputs * inputs // 2) + (2 * blocks if packed else blocks + 4 * -(-blocks // 256))
