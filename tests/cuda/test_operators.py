"""`check operators` on fake CUDA tensors: what it counts is what the shapes say. Needs a PyTorch built with CUDA."""

from __future__ import annotations

import pytest
import torch

from spec_decode.check.operators import OperatorCount, count, fake_gpu
from spec_decode.check.shapes import shaped
from spec_decode.loading import catalog

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA")

SIZE = 2  # bytes of a bfloat16
HEAD = {"sliding_attention": 256, "full_attention": 512}  # entries of a key


def matrices(name: str) -> int:
    """Bytes of all matrices that a step of the target multiplies with, each once."""
    with fake_gpu():
        model, _ = shaped(name, torch.device("cuda"))
        linear = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return SIZE * sum(weight.numel() for weight in linear)


def cached(name: str, positions: int) -> int:
    """Bytes of keys and values that the layers read at this many positions, each layer its own or another's."""
    entry = catalog.find(name)
    assert entry is not None
    shape, total = entry.shape, 0
    for kind in shape["layer_types"]:
        heads = shape["num_key_value_heads"]
        if kind == "full_attention":
            heads = shape.get("num_global_key_value_heads", heads)
        total += 2 * SIZE * positions * heads * HEAD[kind]
    return total


@pytest.mark.parametrize("name", ["gemma-4-E2B", "gemma-4-12B"])
def test_a_baseline_step_reads_every_matrix_and_the_cache_once(name: str) -> None:
    entry = catalog.find(name)
    assert entry is not None
    step, fast = count(entry, 4, 1000)
    assert step.weight_bytes == matrices(name) and step.cache_bytes == cached(name, 1024)
    assert fast.weight_bytes > step.weight_bytes and fast.cache_bytes > step.cache_bytes
    assert fast.operators > step.operators > 1000


def test_a_mixture_of_experts_reads_the_chosen_experts_only() -> None:
    entry = catalog.find("gemma-4-26B-A4B")
    assert entry is not None
    step, fast = count(entry, 1, 1000)
    shape = entry.shape
    expert = 3 * SIZE * shape["hidden_size"] * shape["moe_intermediate_size"] * shape["num_hidden_layers"]
    # Batched, an expert's weights are copied first: read, written, and read by the product.
    assert step.weight_bytes == matrices(entry.name) + 3 * shape["top_k_experts"] * expert
    assert fast.weight_bytes > step.weight_bytes + 3 * shape["top_k_experts"] * expert  # two rows, and the drafter


def test_copies_of_what_is_read_count_with_it() -> None:
    with fake_gpu(), torch.inference_mode():
        weight = torch.empty(8, 64, 32, dtype=torch.bfloat16, device="cuda")  # of 8 experts
        rows = torch.empty(3, 1, 32, dtype=torch.bfloat16, device="cuda")
        query, key = (torch.empty(1, heads, 5, 16, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
        chosen = torch.zeros(3, dtype=torch.long, device="cuda")
        with OperatorCount([weight]) as counted:
            torch.bmm(rows, weight.transpose(1, 2)[chosen])
            repeated = key[:, :, None].expand(1, 2, 2, 5, 16).reshape(1, 4, 5, 16)
            torch.nn.functional.scaled_dot_product_attention(query, repeated, repeated)
    assert dict(counted.operators) == {"index": 1, "bmm": 1, "clone": 1, "scaled_dot_product_attention": 1}
    assert counted.weight_bytes == 3 * 3 * 64 * 32 * SIZE  # read, written, read again
    assert counted.cache_bytes == 2 * (key.numel() + 2 * repeated.numel()) * SIZE
