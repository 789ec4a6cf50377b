"""Attention masks of a pass, made from the positions of its tokens on the device.

In: a model, and the positions of each pass. Out: masks up to the bucket, a row of the batch each, in the form that the
model's attention takes. transformers makes masks from a position that the host knows, the same for all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import LONGEST_ROUND
from .cpu.llama import ROWWISE

GROUPED = "grouped_sdpa"  # `attention.grouped`
_TAKE_MASKS = ("sdpa", "eager", ROWWISE, GROUPED)


class Masks:
    """Masks for one model.

    Args:
        implementation: of its attention, as transformers names it.
        dtype: of its hidden states.
        kinds: `full_attention` or `sliding_attention` for every layer.
        window: positions that sliding attention sees, the token's own among them; None without such layers.
        groups: by the kind of layer, how often the mask of a pass over several tokens is repeated along its rows.
    """

    def __init__(
        self,
        implementation: str,
        dtype: torch.dtype,
        kinds: Sequence[str],
        window: int | None,
        groups: Mapping[str, int] | None = None,
    ) -> None:
        self.additive = implementation != "sdpa"
        self.lowest = torch.finfo(dtype).min if implementation == "eager" else -torch.inf
        self.dtype = dtype
        self.windows = {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
        self.groups = groups or {}

    @classmethod
    def of(cls, model: PreTrainedModel, kinds: Sequence[str]) -> Masks | None:
        """None where the attention takes no such masks or reads text in both directions: transformers makes the masks
        of such a model."""
        config = model.config.get_text_config(decoder=True)
        both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
        if both_ways or not getattr(config, "is_causal", True) or config._attn_implementation not in _TAKE_MASKS:
            return None
        dtype = model.get_input_embeddings().weight.dtype
        groups = _groups(model, kinds) if config._attn_implementation == GROUPED else {}
        return cls(config._attn_implementation, dtype, kinds, getattr(config, "sliding_window", None), groups)

    def __call__(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """`[rows, 1, k, width]` for queries at positions `[rows, k]`; a dict of them by the kind of layer where there
        are two. With a group of G, `[rows, 1, G · k, width]`, once for all layers of a round's pass."""
        masks = {kind: self._mask(positions, width, window) for kind, window in self.windows.items()}
        if 1 < positions.shape[1] <= LONGEST_ROUND:
            for kind, group in self.groups.items():
                masks[kind] = masks[kind].repeat(1, 1, group, 1)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, positions: Tensor, width: int, window: int | None) -> Tensor:
        """Position i sees those up to itself, and of them the last `window`."""
        keys, queries = torch.arange(width, device=positions.device), positions[:, None, :, None]
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        if not self.additive:
            return seen
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill_(~seen, self.lowest)


def _groups(model: PreTrainedModel, kinds: Sequence[str]) -> dict[str, int]:
    """Query heads of a K/V head by the kind of layer, where all layers of the kind have as many, and more than one."""
    found: dict[str, set[int]] = {}
    for module in model.modules():
        group, layer = getattr(module, "num_key_value_groups", None), getattr(module, "layer_idx", None)
        if isinstance(group, int) and isinstance(layer, int):
            found.setdefault(kinds[layer], set()).add(group)
    return {kind: min(sizes) for kind, sizes in found.items() if len(sizes) == 1 and max(sizes) > 1}
