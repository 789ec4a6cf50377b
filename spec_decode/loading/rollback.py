"""Whether a model predicts the same after its cache was rolled back: speculative decoding relies on that."""

from __future__ import annotations

import torch

from ..errors import ModelError, is_out_of_memory
from ..target import Target
from .checkpoints import How

_HALF = 8  # tokens before the position that is rolled back to, and after it
# Tolerated difference of logits, relative to their spread: above the rounding of float32, below the effect of a state
# that is not rolled back.
_TOLERANCE = 0.01


def check_rollback(target: Target, name: str, how: How | None = None) -> None:
    """Compares predictions after a rollback with those of a single pass, on a cache of fixed size.

    They differ for models that keep a state or a count of positions outside the cache, and for models with
    bidirectional attention. Logits are compared in unquantized float32 only, since rounding to fewer bits can differ as
    much; in other precisions the passes must succeed.

    A model that fails with the masks of `Target.masks`, which need not be used as they are by every class, is tried
    again with those of transformers, and keeps them.

    Raises:
        ModelError: the predictions differ, or a pass fails.
    """
    comparable = not (how and how.precision)
    if target.masks is not None:
        try:
            if _difference(target, comparable) <= _TOLERANCE:
                return
        except Exception as error:
            if is_out_of_memory(error):
                raise
        target.masks = None
    try:
        difference = _difference(target, comparable)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"{name} cannot be used: a pass over a cache of fixed size fails ({said}).") from error
    if difference > _TOLERANCE:
        raise ModelError(
            f"{name} cannot be used: after a rollback it predicts something else than before, so it keeps a state "
            "beside its cache or reads text in both directions."
        )


def _difference(target: Target, comparable: bool) -> float:
    """Of logits after a rollback from those of a single pass, relative to their spread; 0 where the precision allows no
    comparison. The median over positions, since a mixture of experts may choose another expert at a near-tie."""
    tokens = (7 * torch.arange(2 * _HALF, device=target.device) + 3) % target.vocabulary
    before, after = tokens.chunk(2)
    straight, detour = (target.new_cache(len(tokens)) for _ in range(2))
    try:
        expected = target.verify(tokens, straight).logits[_HALF:]
        target.prefill(before, detour)
        target.verify(after.flip(0), detour)
        detour.rollback(_HALF)
        found = target.verify(after, detour).logits
    finally:
        straight.free()
        detour.free()
    if found.dtype != torch.float32 or not comparable:
        return 0.0
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / spread).median())
