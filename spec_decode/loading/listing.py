"""What `python -m spec_decode models` prints: the pairs of the catalog, their sizes, and which of them fit.

In: a device or a size of memory. Out: rows of plain values, and a table of them as text. Loads and downloads nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from . import catalog, memory
from .checkpoints import advised_length


def listing(device: torch.device, room: float | None = None) -> list[dict[str, Any]]:
    """The pairs of the catalog: names, classes, sizes, and the highest precision at which each fits.

    Args:
        room: gigabytes to fit into; None for the free memory of `device`.
    """
    free = memory.free_on(device) if room is None else int(room * memory.GB)
    rows = []
    for entry in catalog.GEMMA4:
        models = {"target": memory.of_catalog(entry), "drafter": memory.drafter_of_catalog(entry)}
        row: dict[str, Any] = {"pair": entry.name, "target": entry.target, "drafter": entry.drafter}
        for role, model in models.items():
            prefix = "" if role == "target" else "drafter_"
            sizes = {name: memory.weights(model, torch.bfloat16, name) for name in (None, *catalog.PRECISIONS)}
            row[f"{prefix}class"] = type(model).__name__
            row[f"{prefix}parameters"] = sum(weight.numel() for weight in model.parameters())
            row[f"{prefix}bytes"] = {name or "bfloat16": size for name, size in sizes.items()}
        row["cache_bytes_per_token"] = memory.cache_per_token(models["target"], torch.bfloat16)
        row["draft_length"] = advised_length(entry.drafter) or catalog.DRAFT_LENGTH
        row["fits"] = memory.best_fit(entry, free)
        row["note"] = entry.note
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `listing` as text."""
    heads = ("bfloat16", "int8", "nf4", "cache/1k", "drafter")
    lines = [f"{'pair':16} {'parameters':>10} " + " ".join(f"{head:>9}" for head in heads) + f" {'draft':>6}  fits in"]
    for row in rows:
        sizes = [memory.gigabytes(size) for size in row["bytes"].values()]
        sizes.append(f"{row['cache_bytes_per_token'] / 1000:.0f} MB")
        sizes.append(memory.gigabytes(row["drafter_bytes"]["bfloat16"]))
        cells = " ".join(f"{size:>9}" for size in sizes)
        lines.append(
            f"{row['pair']:16} {row['parameters'] / 1e9:>9.1f}B {cells} {row['draft_length']:>6}  {row['fits'] or '–'}"
        )
    for row in rows:
        lines += ["", f"{row['pair']}: {row['note']}"]
        lines += [f"  {row[role]} ({row[kind]})" for role, kind in (("target", "class"), ("drafter", "drafter_class"))]
    lines += [
        "",
        "bfloat16, int8, nf4: weights of the target's text model; drafter: its weights in bfloat16. `fits in` counts",
        "both, the caches of two lanes of 4,096 tokens, and some workspace. draft: the draft length in the drafter's",
        "generation config.",
    ]
    return "\n".join(lines)
