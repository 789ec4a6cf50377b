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
_ROUGH = 0.2  # the same where weights or activations are rounded to fewer bits: above that rounding, below a wrong mask


def check_rollback(target: Target, name: str, how: How | None = None) -> None:
    """Compares predictions after a rollback with those of a single pass, on a cache of fixed size.

    They differ for models that keep a state or a count of positions outside the cache, and for models with
    bidirectional attention. Logits are compared in unquantized float32 only, since rounding to fewer bits can differ as
    much; in other precisions the passes must succeed.

    Not every class uses the masks of `Target.masks` as they are. The single pass has those of transformers, so this
    comparison shows it, in every precision: such a model is tried again with those of transformers, and keeps them.

    Raises:
        ModelError: the predictions differ, or a pass fails.
    """
    if target.masks is not None:
        try:
            difference, exact = _difference(target, how)
            if difference <= (_TOLERANCE if exact else _ROUGH):
                return
        except Exception as error:
            if is_out_of_memory(error):
                raise
        target.masks = None
    try:
        difference, exact = _difference(target, how)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"{name} cannot be used: a pass over a cache of fixed size fails ({said}).") from error
    if exact and difference > _TOLERANCE:
        raise ModelError(
            f"{name} cannot be used: after a rollback it predicts something else than before, so it keeps a state "
            "beside its cache or reads text in both directions."
        )


def _difference(target: Target, how: How | None) -> tuple[float, bool]:
    """Of logits after a rollback from those of a single pass, relative to their spread, and whether that is exact to
    the rounding of float32. The median over positions, since a mixture of experts may choose another expert at a
    near-tie."""
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
    exact = found.dtype == torch.float32 and not (how and how.precision)
    expected, found = expected.float(), found.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / spread).median()), exact
