"""How OpenVINO GenAI holds the weights of the embedded target's GGUF file, and how far they are from the file's.

    python -m spec_decode check openvino-weights

Needs the packages of requirements-peers.txt. OpenVINO GenAI saves the model that its GGUF reader makes; the check
multiplies scales, zero points and weights out and compares the values with those of the file. The reader reorders the
rows of the query and key projections, so those two are left out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..loading import embedded
from . import package

SAME = 0.5  # relative error above which two matrices are taken to be different ones


def integers(constant: Any) -> np.ndarray:
    """The values of a constant of unsigned integers of 4 or 8 bits, float32, in the constant's shape."""
    shape = list(constant.get_output_shape(0))
    raw = np.frombuffer(np.ascontiguousarray(constant.data).tobytes(), np.uint8)
    if constant.get_output_element_type(0).get_type_name() == "u4":
        raw = np.stack([raw & 15, raw >> 4], -1).reshape(-1)[: np.prod(shape)]
    return raw.reshape(shape).astype(np.float32)


def under(node: Any) -> Any:
    """The constant below a conversion."""
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input(0).get_source_output().get_node()
    return node


def matrices(model: Any) -> list[tuple[str, np.ndarray]]:
    """(element types in words, values float32 `[outputs, inputs]`) of every (weights − zero points) × scales, in the
    order of the graph."""
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply":
            continue
        shifted, scales = (node.input(i).get_source_output().get_node() for i in range(2))
        if shifted.get_type_name() != "Subtract" or under(scales).get_type_name() != "Constant":
            continue
        weights, zeros = (under(shifted.input(i).get_source_output().get_node()) for i in range(2))
        kinds = [part.get_output_element_type(0).get_type_name() for part in (weights, zeros, under(scales))]
        steps = np.array(under(scales).data, np.float32).reshape(list(under(scales).get_output_shape(0)))
        values = (integers(weights) - integers(zeros)) * steps
        told = f"weights {kinds[0]}, zero points {kinds[1]}, scales {kinds[2]}, blocks of {values.shape[-1]}"
        found.append((told, values.reshape(len(values), -1)))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`check openvino-weights` has no options."""


def run(options: argparse.Namespace) -> None:
    """Prints how many matrices are held in which way, then their relative errors by kind of matrix."""
    openvino = package("openvino", "openvino-weights")
    openvino_genai = package("openvino_genai", "openvino-weights")
    from gguf import GGUFReader, dequantize

    path = embedded.gguf(print)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name  # the reader saves beside the file
        os.symlink(path, copy)
        openvino_genai.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
        held = matrices(openvino.Core().read_model(Path(folder) / "openvino_model.xml"))
    own = {tensor.name: tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) == 2}
    print(f"openvino-genai {openvino_genai.__version__}, {path.name}")
    for told, count in Counter(told for told, _ in held).items():
        print(f"{count:4d} matrices: {told}")
    errors: dict[str, list[float]] = defaultdict(list)
    for index, (_, values) in enumerate(held):
        layer = f"blk.{(index - 1) // 7}." if index else "token_embd."
        best = (SAME, "")
        for name, tensor in own.items():
            if name.startswith(layer) and tuple(tensor.shape[::-1]) == values.shape:
                exact = dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
                error = float(np.sqrt(np.mean((values - exact) ** 2) / np.mean(exact**2)))
                best = min(best, (error, f"{name.removeprefix(layer)} ({tensor.tensor_type.name})"))
        if best[1]:
            errors[best[1]].append(best[0])
    print("relative error (root mean square), median over layers:")
    for name, found in errors.items():
        print(f"  {name}: {median(found):.4f} over {len(found)}")
