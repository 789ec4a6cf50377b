"""Operators and bytes of a baseline step and of a round, at full size, and the milliseconds they predict.

    python -m spec_decode check operators                         # all pairs of the catalog
    python -m spec_decode check operators gemma-4-E4B --draft-length 8 --context 32768 --json

In: shapes from the catalog, in bfloat16, as fake CUDA tensors, which have a shape and a device and no memory. It needs
a PyTorch that was built with CUDA, and no GPU, driver, weights or download. Out, for a baseline step and for a round of
γ drafted tokens: how many operators reach the device, the bytes of weights and of keys and values that matrix products
and attention read, and two predictions from these and the assumptions printed above the table.

- Eager: an operator takes a fixed time to launch, and the device works meanwhile, so the longer of the two counts:
  launching, or reading the bytes.
- In a CUDA graph: reading the bytes, and a fixed time for every operator.

Operators that only make a view are left out. Keys and values, or weights of experts, that are copied before they are
read count with what the copy reads and writes. A mixture of experts reads as many experts as if no two rows of a pass
chose the same. Nothing is timed: the predictions leave out arithmetic and the bytes of activations.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import rules
from ..attention import use
from ..decode import Lane, decode_round, judge
from ..draft_length import Fixed
from ..drafters import Draft, NoDrafter
from ..drafters.mtp import MTPDrafter
from ..errors import UserError
from ..events import BASELINE, SPECULATIVE
from ..loading import catalog
from ..narrate import gathered
from ..settings import MAX_DRAFT_LENGTH, Settings
from ..state import State
from ..target import Target
from .shapes import shaped

aten = torch.ops.aten
MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"}
GROUPED = {"_grouped_mm"}  # rows sorted by expert
ATTENTION = {"scaled_dot_product_attention"}
COPIES = {"clone", "_to_copy", "index", "index_select", "cat"}
CAPABILITY = (9, 0)  # compute capability of an H100 or H200
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}


@dataclass(frozen=True)
class Assumptions:
    """launch: µs to launch an operator. replay: µs of an operator inside a CUDA graph beside reading its bytes.
    bandwidth: of the memory, TB/s."""

    launch: float
    replay: float
    bandwidth: float

    def __str__(self) -> str:
        return (
            f"{self.launch:g} µs to launch an operator, {self.replay:g} µs for each inside a CUDA graph, "
            f"memory read at {self.bandwidth:g} TB/s"
        )


@dataclass(frozen=True)
class Work:
    """What a baseline step (`draft_length` 0) or a round dispatches.

    Attributes:
        operators: that do work on the device.
        weight_bytes, cache_bytes: weights, and keys and values, that matrix products and attention read.
    """

    draft_length: int
    operators: int
    weight_bytes: int
    cache_bytes: int

    def predict(self, assumed: Assumptions) -> dict[str, float]:
        """Milliseconds: `launching` all operators, reading the bytes (`memory`), `eager` and `captured`."""
        launching = self.operators * assumed.launch / 1e3
        memory = (self.weight_bytes + self.cache_bytes) / assumed.bandwidth / 1e9
        captured = memory + self.operators * assumed.replay / 1e3
        return {"launching": launching, "memory": memory, "eager": max(launching, memory), "captured": captured}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check operators`."""
    names = [entry.name for entry in catalog.GEMMA4]
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=f"of the catalog (default: {', '.join(names)})")
    parser.add_argument("--draft-length", type=int, default=4, metavar="N", help="γ (default: %(default)s)")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens before (default: %(default)s)")
    for name, default, told in (
        ("--launch", 5.0, "µs to launch an operator"),
        ("--replay", 1.5, "µs of an operator inside a CUDA graph"),
        ("--bandwidth", 4.8, "TB/s of the memory; the default is an H200's"),
    ):
        parser.add_argument(name, type=_positive, default=default, metavar="X", help=f"{told} (default: %(default)s)")
    parser.add_argument(
        "--attention", choices=tuple(catalog.ATTENTION), default="grouped", help="of the target (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def run(options: argparse.Namespace) -> None:
    """Prints the table, or with `--json` one object.

    Raises:
        UserError: this PyTorch has no CUDA, or there is no such pair, draft length or context.
    """
    if torch.version.cuda is None:
        raise UserError(
            f"check operators needs a PyTorch that was built with CUDA, which {torch.__version__} was not; install "
            "one in an environment of its own, `pip install torch==2.12.0 -r requirements.txt`; no GPU or driver is "
            "needed."
        )
    assumed = Assumptions(options.launch, options.replay, options.bandwidth)
    known = {entry.name: entry for entry in catalog.GEMMA4}
    entries = [known[_name(name)] for name in options.pairs or known]
    if not 1 <= options.draft_length <= MAX_DRAFT_LENGTH:
        raise UserError(f"--draft-length takes 1 to {MAX_DRAFT_LENGTH}, not {options.draft_length}.")
    longest = min(entry.shape["max_position_embeddings"] for entry in entries) - 2 * MAX_DRAFT_LENGTH
    if not 1 <= options.context <= longest:
        raise UserError(f"--context takes 1 to {longest}, not {options.context}.")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    conditions = {"dtype": "bfloat16", "context": options.context, "temperature": 0, "attention": options.attention}
    if not options.json:
        print(
            f"Pairs of the catalog in bfloat16, {options.context} tokens before, temperature 0, "
            f"{options.attention} attention; {_listed(versions)}."
        )
        print(f"Assumed: {assumed}. Nothing was timed.\n")
        print("| pair | | operators | weights, GB | K/V, GB | eager, ms | in a CUDA graph, ms |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for entry in entries:
        works = count(entry, options.draft_length, options.context, options.attention)
        told = [{**vars(work), "milliseconds": work.predict(assumed)} for work in works]
        rows.append({"pair": entry.name, "baseline_step": told[0], "round": told[1]})
        if not options.json:
            print(*(_line(entry.name, work, assumed) for work in works), sep="\n", flush=True)
    if options.json:
        print(json.dumps({"versions": versions, "conditions": conditions, "assumed": vars(assumed), "pairs": rows}))


def _name(name: str) -> str:
    """A pair's name as the catalog writes it.

    Raises:
        UserError: it is no pair of the catalog with a shape.
    """
    entry = catalog.find(name)
    if entry is None:
        known = ", ".join(entry.name for entry in catalog.GEMMA4)
        raise UserError(f"The catalog has no shapes of a pair {name!r}; it has those of {known}.")
    return entry.name


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _line(name: str, work: Work, assumed: Assumptions) -> str:
    predicted = work.predict(assumed)
    what = f"round, γ = {work.draft_length}" if work.draft_length else "baseline step"
    read = f"{work.weight_bytes / 1e9:.2f} | {work.cache_bytes / 1e9:.2f}"
    times = f"{predicted['eager']:.1f} | {predicted['captured']:.1f}"
    return f"| {name} | {what} | {work.operators:,} | {read} | {times} |"


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors made here are fake, and CUDA is a device of `CAPABILITY`, which transformers asks for before it chooses
    how to multiply experts."""
    with FakeTensorMode(), patch.object(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY):
        yield


def count(entry: catalog.Entry, draft_length: int, context: int, attention: str = "grouped") -> tuple[Work, Work]:
    """The work of a baseline step and of a round of `draft_length` tokens, after `context` tokens, with an attention of
    `catalog.ATTENTION`."""
    with fake_gpu():
        model, assistant = shaped(entry.name, torch.device("cuda"))
        use(model, catalog.ATTENTION[attention])
        target = Target(model)
        settings = Settings(draft_length=draft_length)
        drafter = MTPDrafter(assistant, target)
        rule = rules.default(settings.temperature)
        lanes = (
            Lane(BASELINE, target, NoDrafter(), Fixed(0), rule, settings),
            Lane(SPECULATIVE, target, drafter, Fixed(draft_length), rule, settings),
        )
        weights = [*model.parameters(), *assistant.parameters()]
        return counted(lanes[0], 0, context, weights), counted(lanes[1], draft_length, context, weights)


@torch.inference_mode()  # as in a pass; otherwise autograd takes attention apart before it is counted
def counted(lane: Lane, length: int, context: int, weights: Iterable[Tensor]) -> Work:
    """The work of one eager round of a lane after `context` tokens, its copy to the host included."""
    target, drafter = lane.target, lane.drafter
    prompt, capacity = [0] * context, context + MAX_DRAFT_LENGTH + 2
    cache = target.new_cache(capacity)
    passed = target.prefill(torch.tensor(prompt, device=target.device), cache, drafter.needs_hidden)
    drafter.start(prompt, lane.settings, capacity)
    state = State.after(prompt, capacity, cache, target.device)
    judge(lane, state, Draft.none(state), passed)
    state.advance(1)
    with OperatorCount(weights, target.device.type) as seen:
        outcome = decode_round(lane, state, length, None if length else Draft.none(state))
        gathered(outcome).join()
    drafter.close()
    cache.free()
    return Work(length, seen.operators.total(), seen.weight_bytes, seen.cache_bytes)


class OperatorCount(TorchDispatchMode):
    """Counts the operators that do work on a device, and the bytes that matrix products and attention read.

    Args:
        weights: the parameters of all models.
        device: the type of the device whose tensors count.

    Attributes:
        operators: how often each operator, by name, did work.
        weight_bytes: of `weights`, read by matrix products.
        cache_bytes: of keys and values, read by attention.
    """

    def __init__(self, weights: Iterable[Tensor], device: str = "cuda") -> None:
        super().__init__()
        self._device = device
        self.operators: Counter[str] = Counter()
        self.weight_bytes = self.cache_bytes = 0
        self._weights = {_storage(weight) for weight in weights}
        # Copies by storage: whether of a weight, and the bytes that were read and written to make them.
        self._copies: dict[int, tuple[bool, int]] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "overloadpacket", function).__name__
        if function is torch.ops.prim.device.default:  # a question that no kernel answers
            return function(*args, **kwargs)
        if isinstance(function, OpOverload) and name not in ATTENTION:
            with self:  # an operator made of others is counted as those
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        inputs, outputs = (self._counting(tree) for tree in ((args, kwargs), result))
        before = {_storage(tensor) for tensor in inputs}
        made = [tensor for tensor in outputs if _storage(tensor) not in before]
        for tensor in made:
            self._copies.pop(_storage(tensor), None)  # a storage may stand where another was freed
        mutates = isinstance(function, OpOverload) and function._schema.is_mutable
        if name in ALLOCATIONS or not (made or (mutates and inputs)):
            return result
        self.operators[name] += 1
        if name in COPIES and made:
            self._copied(inputs, made[0])
        elif name in MATRIX_PRODUCTS:
            for matrix in inputs:
                self._read(matrix)
        elif name in GROUPED:
            rows, experts = args[0].shape[0], args[1].shape[0]
            self._read(args[1], min(rows, experts) / experts)
        elif name in ATTENTION:
            for tensor in args[1:3]:
                self.cache_bytes += _size(tensor) + self._copies.get(_storage(tensor), (False, 0))[1]
        return result

    def _counting(self, tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == self._device]

    def _copied(self, inputs: list[Tensor], copy: Tensor) -> None:
        """`copy` was made of `inputs`: of as many of their bytes as it has at most."""
        weight, earlier = self._copies.get(_storage(inputs[0]), (_storage(inputs[0]) in self._weights, 0))
        moved = min(sum(_size(tensor) for tensor in inputs), _size(copy)) + _size(copy)
        self._copies[_storage(copy)] = weight, earlier + moved

    def _read(self, matrix: Tensor, share: float = 1.0) -> None:
        """A matrix product reads `share` of `matrix`, which counts if it is a weight or a copy of one."""
        weight, moved = self._copies.get(_storage(matrix), (_storage(matrix) in self._weights, 0))
        if weight:
            self.weight_bytes += round(share * _size(matrix)) + moved


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Bytes of the entries that are stored: one that was expanded is stored once."""
    stored = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        stored *= length if stride else 1
    return stored * tensor.element_size()
