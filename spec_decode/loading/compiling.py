"""`--compile`: parts of the target's layers through `torch.compile`.

In: a loaded target. Out: the same target, whose norms and MLPs are compiled for the passes of rounds. These are the
parts of a layer that do not see the cache, and without matrix products most of its operators. A compiled part is a
function of tensors alone, so nothing of the host's is baked in and no bucket compiles it anew; it is compiled for one
row of as many tokens as a recorded round has (`draft_length.RECORDED`), here and not within a race. Prompts, other
lengths and batches run as they were. CUDA graphs are recorded of what was compiled before; the compiler makes none.

Both lanes use the same compiled functions. As with any kernel whose order of sums depends on the number of rows, the
last bits of a token's logits may depend on the tokens beside it, so in floating point two lanes may part at a near-tie,
with and without this option.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..draft_length import RECORDED
from ..errors import ModelError, is_out_of_memory
from ..target import Target
from .embedded import cache_dir

KINDS = ("RMSNorm", "MLP")  # how the names of the classes end
COUNTS = frozenset(length + 1 for length in RECORDED)  # tokens of a pass
SHAPES = 1024  # that one function may be compiled for: all counts, of norms of every width


def compile_layers(target: Target, backend: str = "inductor") -> int:
    """Compiles norms and MLPs of the target's layers; returns how many there are. What is compiled is kept in the cache
    directory, for the next start.

    Raises:
        ModelError: there is no compiler, or the model has no such parts or cannot be compiled; the target is as before.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    layers = getattr(target.model.base_model, "layers", nn.ModuleList())
    parts = [part for part in layers.modules() if type(part).__name__.endswith(KINDS) and not list(part.buffers())]
    if not parts:
        raise ModelError("--compile finds nothing to compile in this model; leave it out.")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, SHAPES)
    chosen = _Chosen()
    hook = target.model.register_forward_pre_hook(chosen.look, with_kwargs=True)
    for part in parts:
        part.forward = _either(part, backend, chosen)
    try:
        _warm_up(target)
    except Exception as error:
        hook.remove()
        for part in parts:
            del part.forward
        if is_out_of_memory(error):
            raise
        cause = getattr(error, "inner_exception", error)  # the compiler's own, where PyTorch wraps it
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"--compile cannot be used here: torch.compile failed ({said}); leave it out.") from error
    return len(parts)


class _Chosen:
    """Whether the pass under way is one of those that are compiled. A part cannot tell: some norms get heads before
    tokens."""

    def __init__(self) -> None:
        self.now = False

    def look(self, model: nn.Module, args: Any, options: dict[str, Any]) -> None:
        rows, count = options["input_ids"].shape
        self.now = rows == 1 and count in COUNTS


def _either(part: nn.Module, backend: str, chosen: _Chosen) -> Callable[..., Any]:
    """The part's forward, compiled in the passes that are chosen."""
    plain = part.forward
    compiled = torch.compile(plain, dynamic=False, fullgraph=True, backend=backend)
    return lambda *args, **options: (compiled if chosen.now else plain)(*args, **options)


def _warm_up(target: Target) -> None:
    """One pass of every count, after a token."""
    tokens = torch.arange(max(COUNTS), device=target.device) % target.vocabulary
    cache = target.new_cache(2 * len(tokens))
    try:
        for count in sorted(COUNTS):
            target.verify(tokens[:count], cache)
            cache.rollback(0)
    finally:
        cache.free()
