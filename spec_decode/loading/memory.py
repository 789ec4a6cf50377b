"""How much memory a pair needs, estimated before it is loaded.

In: configurations. Out: bytes of weights, KV caches and workspace, and bytes that are free. Weights are counted on a
model without storage (PyTorch's meta device), so they are exact for every architecture and precision, and so are caches
for a given number of positions; the workspace is a rule of thumb. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..cache import bucket
from ..draft_length import RECORDED
from ..drafters import kinds
from ..errors import ModelError
from ..settings import MAX_DRAFT_LENGTH
from . import quantized
from .catalog import GEMMA4, PRECISIONS, Entry

ROOM = 4096  # positions of a lane's KV cache
LANES = 2
GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes of weights, of the KV caches of both lanes at `ROOM` positions, of workspace, and on GPUs of recordings
    (`recordings`)."""

    weights: int
    cache: int = 0
    workspace: int = 0
    recordings: int = 0

    @property
    def total(self) -> int:
        """All but recordings, without which a pair can race: rounds stay eager where they do not fit."""
        return self.weights + self.cache + self.workspace


@dataclass(frozen=True)
class Part:
    """One model of a pair, and how it is loaded.

    Attributes:
        model: from `empty`.
        precision: of its quantized linear layers, int8 or nf4; None where they are not quantized.
        caches: it has a KV cache of its own; an MTP drafter reads its target's.
        spread: over all GPUs.
    """

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    precision: str | None = None
    caches: bool = True
    spread: bool = False

    @property
    def need(self) -> Need:
        kept = weights(self.model, self.dtype, self.precision, self.device)
        if not self.caches:
            return Need(kept)
        cache = LANES * bucket(ROOM) * cache_per_token(self.model, self.dtype)
        recorded = 0 if self.device.type in ("cpu", "mps") else recordings(self.model, self.dtype)
        return Need(kept, cache, _workspace(self.model, self.dtype), recorded)


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, without storage.

    Raises:
        ModelError: no model can be built from it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"{config.name_or_path or 'This model'} has a config.json of which no {config.model_type} model can be "
            f"made ({type(error).__name__}: {said})."
        ) from error


def weights(
    model: PreTrainedModel, dtype: torch.dtype, precision: str | None = None, device: torch.device | None = None
) -> int:
    """Bytes of the weights on `device`; None stands for any device but a CPU. Embeddings, the head, the experts of a
    mixture and the layers that `quantized.left_out` names keep `dtype`, as with transformers and bitsandbytes."""
    total = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if precision is None:
        return total
    return total - quantized.saved(model, dtype, precision, device or torch.device("meta"))


def cache_per_token(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one position."""
    config: Any = model.config.get_text_config(decoder=True)
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "k_proj")]
    if found:
        return sum(2 * module.k_proj.out_features for module in found) * dtype.itemsize
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head * dtype.itemsize


def _workspace(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes for reading a prompt of `ROOM` tokens: some hidden states, the widest MLP, attention masks of both kinds,
    logits and the distributions computed from them."""
    config: Any = model.config.get_text_config(decoder=True)
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    mlp = max(mlp) if isinstance(mlp, list) else mlp
    passing = ROOM * (8 * config.hidden_size + 3 * mlp) * dtype.itemsize
    masks = 2 * ROOM * bucket(ROOM) * dtype.itemsize
    return passing + masks + 6 * (MAX_DRAFT_LENGTH + 1) * config.vocab_size * 4


def recordings(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes that recorded rounds keep (`graphs`): each lane's state, which holds a second cache beside the one that the
    prompt was read into, and the pool of the graphs. Intermediate results share the pool, so it holds those of the
    widest pass, and what each recording leaves: logits, distributions and what is computed from them, for every length
    of `draft_length.RECORDED`, of the draft and of the pass, and for the baseline's step."""
    config: Any = model.config.get_text_config(decoder=True)
    states = LANES * bucket(ROOM) * cache_per_token(model, dtype)
    rows = 1 + sum(2 * length + 1 for length in RECORDED)
    widest = (max(RECORDED) + 1) * bucket(ROOM) * dtype.itemsize
    return states + 6 * rows * config.vocab_size * 4 + widest


def free(part: Part) -> int:
    """Bytes free on the device of a part."""
    return free_on(part.device, part.spread)


def free_on(device: torch.device, spread: bool = False) -> int:
    """Bytes free on `device`; with `spread`, on all GPUs together. Memory that PyTorch keeps for reuse counts as
    free."""
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count()) if spread else [device]
        kept = sum(torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu) for gpu in gpus)
        return kept + sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    return int(psutil.virtual_memory().available)


def check(name: str, target: Part | None, drafter: Part | None, free: Callable[[Part], int]) -> None:
    """Refuses a pair that cannot fit.

    Args:
        name: of the target.
        target: None where it is loaded already.
        drafter: None where it has no weights.
        free: bytes free on the device of a part.

    Raises:
        ModelError: by how much it is too large, and what would fit instead.
    """
    for part in filter(None, (target, drafter)):
        needed, there = _needed(part, target, drafter), free(part)
        if needed <= there:
            continue
        where = "all GPUs together" if part.spread else part.device
        alternative = None if target is None else _alternative(target, drafter, free)
        raise ModelError(
            f"{name} needs about {gigabytes(needed)} on {where} ({part.dtype}".replace("torch.", "")
            + f", {ROOM:,} tokens a lane) and {gigabytes(there)} are free: {gigabytes(needed - there)} too few; "
            + (f"{alternative} would fit." if alternative else "nothing of this kind would fit.")
        )


def _needed(part: Part, *parts: Part | None) -> int:
    """Bytes that `parts` need together on the device of `part`."""
    return sum(other.need.total for other in parts if other and other.device == part.device)


def _fits(target: Part, drafter: Part | None, free: Callable[[Part], int]) -> bool:
    parts = [part for part in (target, drafter) if part]
    return all(_needed(part, *parts) <= free(part) for part in parts)


def _alternative(target: Part, drafter: Part | None, free: Callable[[Part], int]) -> str | None:
    """Flags with which it would fit, the one with the least loss of quality and speed first; None if there are
    none."""
    changes: list[tuple[str, Part, Part | None]] = []
    if target.dtype == torch.float32:
        half = torch.bfloat16
        changes.append(("--dtype bfloat16", replace(target, dtype=half), drafter and replace(drafter, dtype=half)))
    aside = None
    if drafter and drafter.device == target.device != torch.device("cpu"):
        aside = replace(drafter, device=torch.device("cpu"))
        changes.append(("--drafter-device cpu", target, aside))
    if target.precision is None:
        for precision in PRECISIONS:
            smaller = replace(target, precision=precision)
            changes.append((f"--quantize {precision}", smaller, drafter))
            if aside:
                changes.append((f"--quantize {precision} --drafter-device cpu", smaller, aside))
    for flags, one, two in changes:
        if _fits(one, two, free):
            return flags
    size = weights(target.model, target.dtype)
    for entry in reversed(GEMMA4):
        other = of_catalog(entry)
        if weights(other, target.dtype) >= size:
            continue
        helper = _drafter_part(entry, target.device, target.dtype)
        for choice in (None, *PRECISIONS):
            if _fits(replace(target, model=other, precision=choice), helper, free):
                return f"--pair {entry.name}" + (f" --quantize {choice}" if choice else "")
    return None


def of_catalog(entry: Entry) -> PreTrainedModel:
    """The target of a catalog entry, without storage."""
    return empty(CONFIG_MAPPING[entry.kind](**entry.shape))


def drafter_of_catalog(entry: Entry) -> PreTrainedModel:
    """The drafter of a catalog entry, without storage."""
    return empty(CONFIG_MAPPING[entry.drafter_kind](**entry.drafter_shape))


def _drafter_part(entry: Entry, device: torch.device, dtype: torch.dtype) -> Part:
    caches = kinds.of_checkpoint(entry.drafter_kind).caches
    return Part(drafter_of_catalog(entry), device, dtype, caches=caches)


def best_fit(entry: Entry, room: int) -> str | None:
    """The highest precision at which a pair of the catalog fits into `room` bytes, or None."""
    part = Part(of_catalog(entry), torch.device("meta"), torch.bfloat16)
    helper = _drafter_part(entry, part.device, part.dtype)
    for precision in (None, *PRECISIONS):
        if _fits(replace(part, precision=precision), helper, lambda _: room):
            return precision or "bfloat16"
    return None


def gigabytes(size: float) -> str:
    """Bytes as text, in units of 10⁹ bytes."""
    return f"{size / GB:.1f} GB"
