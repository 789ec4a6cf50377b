"""What `python -m spec_decode models` prints: the pairs of the catalog, their sizes, and which of them fit.

In: a device or a size of memory. Out: rows of plain values, and the same for the eye. Loads nothing, fetches nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from . import catalog, memory
from .checkpoints import advised_length


def listing(device: torch.device, room: float | None = None) -> list[dict[str, Any]]:
    """The pairs of the catalog: names, classes, sizes, and the highest precision in which each fits.

    Args:
        room: gigabytes to fit into; None for what is free on `device`.
    """
    free = memory.free_on(device) if room is None else int(room * memory.GB)
    rows = []
    for entry in catalog.GEMMA4:
        model = memory.of_catalog(entry)
        held = {name: memory.weights(model, torch.bfloat16, name) for name in (None, *catalog.PRECISIONS)}
        rows.append(
            {
                "pair": entry.name,
                "target": entry.target,
                "drafter": entry.drafter,
                "class": type(model).__name__,
                "parameters": sum(weight.numel() for weight in model.parameters()),
                "bytes": {name or "bfloat16": size for name, size in held.items()},
                "cache_bytes_per_token": memory.cache_per_token(model, torch.bfloat16),
                "draft_length": advised_length(entry.drafter),
                "fits": memory.best_fit(entry, free),
                "note": entry.note,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """`listing` for the eye."""
    lines = [
        f"{'pair':16} {'parameters':>10} {'bfloat16':>9} {'int8':>9} {'nf4':>9} {'cache/1k':>9} {'draft':>6}  fits in"
    ]
    for row in rows:
        sizes = " ".join(f"{memory.gigabytes(size):>9}" for size in row["bytes"].values())
        cache = f"{row['cache_bytes_per_token'] / 1000:.0f} MB"
        draft, fits = row["draft_length"] or "–", row["fits"] or "–"
        lines.append(f"{row['pair']:16} {row['parameters'] / 1e9:>9.1f}B {sizes} {cache:>9} {draft:>6}  {fits}")
    lines += ["", *(f"{row['pair']}: {row['target']} + {row['drafter']}; {row['note']}." for row in rows)]
    lines += [
        "",
        "Weights of the text model; a drafter adds at most 1 GB, and two lanes of 4,096 tokens their caches and some",
        "workspace: `fits in` counts them all. draft: the drafter's own draft length, known once it was downloaded.",
    ]
    return "\n".join(lines)
