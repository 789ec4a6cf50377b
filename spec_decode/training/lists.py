"""A vocabulary in lists of equal size, so that a step looks at some lists and not at every token.

In: a learner that has learnt. Out: its `masked_embedding`: which tokens stand in which list, and a centroid for each
list whose product with the drafter's output tells whether to look there. The lists gather rows of the head that point
the same way; the centroids are fitted to what the target wants.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .assistant import Learner, with_lists
from .data import Texts
from .train import Training, aside, packed, rounds

BANDS = (1 / 12, 1 / 4)  # of the lists: those of the most frequent tokens, and those of the frequent ones after that


def sort_vocabulary(
    learner: Learner, texts: Texts, lists: int, chosen: int, training: Training, most: int = 60_000
) -> float:
    """Fits `lists` lists to the drafter; returns how often the target's favourite stands in the `chosen` best lists.

    Args:
        most: drafter outputs to learn from.
    """
    learning, judging = aside(texts, training.validation)
    rng = random.Random(training.seed)
    rng.shuffle(learning)
    x, ids, p = _outputs(learner, texts, learning, most)
    frequent = torch.zeros(len(learner.head)).index_add_(0, ids.flatten(), p.flatten())
    # Rare tokens among frequent ones would be looked at again and again for nothing.
    ranks = frequent.argsort(descending=True, stable=True)
    size = len(ranks) // lists
    cuts = [0, *(max(round(lists * share), 1) * size for share in BANDS), len(ranks)]
    bands = [ranks[a:b] for a, b in pairwise(cuts)]
    order = torch.cat(
        [band[balanced(learner.head[band], frequent[band], len(band) // size, training.seed)] for band in bands]
    )
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) // (len(order) // lists)
    wanted = torch.zeros(len(x), lists).scatter_add_(1, place[ids], p)
    wanted /= wanted.sum(1, keepdim=True).clamp_min(1e-6)
    share = frequent + 1e-3 * frequent.mean()
    mean = torch.zeros(lists, x.shape[1]).index_add_(0, place, learner.head * share[:, None])
    weight = (mean / torch.zeros(lists).index_add_(0, place, share)[:, None]).requires_grad_()
    with torch.enable_grad():
        optimizer = torch.optim.AdamW([weight], 3e-3, weight_decay=0.0)
        generator = torch.Generator().manual_seed(training.seed)
        epochs, size = 6, 512
        total = epochs * -(-len(x) // size)
        for step in range(total):
            if step % -(-len(x) // size) == 0:
                shuffled = torch.randperm(len(x), generator=generator)
            part = shuffled[step % -(-len(x) // size) * size :][:size]
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / total)
            loss = -(wanted[part] * (x[part] @ weight.T).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with_lists(learner, order, weight.detach(), chosen)
    x, ids, _ = _outputs(learner, texts, judging, most)
    picked = (x @ weight.detach().T).topk(chosen).indices
    return float((picked == place[ids[:, :1]]).any(1).float().mean())


def balanced(rows: Tensor, frequent: Tensor, lists: int, seed: int, turns: int = 8) -> Tensor:
    """An order of the rows `[V]` in which each run of V / `lists` is a cluster of directions.

    k-means, weighed by how `frequent` a token is; then every token, the frequent first, goes to the nearest cluster
    that has room.
    """
    unit = F.normalize(rows - rows.mean(0), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    weight = (frequent + 0.1 * frequent.mean() + 1e-9).sqrt()
    centers = unit[torch.multinomial(weight, lists, generator=generator)]
    for _ in range(turns):
        nearest = (unit @ centers.T).argmax(-1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, unit * weight[:, None])
        empty = torch.bincount(nearest, minlength=lists) == 0
        centers = F.normalize(torch.where(empty[:, None], centers, sums), dim=-1)
    room = [len(rows) // lists] * lists
    members: list[list[int]] = [[] for _ in range(lists)]
    near = (unit @ centers.T).topk(min(lists, 64)).indices
    left = []
    for token in frequent.argsort(descending=True, stable=True).tolist():
        for cluster in near[token].tolist():
            if room[cluster]:
                room[cluster] -= 1
                members[cluster].append(token)
                break
        else:
            left.append(token)
    free = (cluster for cluster, n in enumerate(room) for _ in range(n))
    for token, cluster in zip(left, free, strict=True):
        members[cluster].append(token)
    return torch.tensor([token for cluster in members for token in cluster])


@torch.no_grad()
def _outputs(learner: Learner, texts: Texts, chosen: list[int], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """x `[n, width]` of the first two steps inside answers, with the target's favourites there and their shares."""
    xs: list[Tensor] = []
    ids: list[Tensor] = []
    ps: list[Tensor] = []
    for begin in range(0, len(chosen), 8):
        batch = texts.batch(chosen[begin : begin + 8], learner.shape.layers)
        everywhere = torch.arange(batch.ids.shape[1])
        inside = (everywhere >= batch.answers[:, None]) & (everywhere + 1 < batch.lengths[:, None])
        if not inside.any():
            continue
        places, real = packed(inside)
        process: Any = rounds(learner, batch, 2, places, real)
        for step, (x, _, _, _) in enumerate(process):
            row, column = real.nonzero(as_tuple=True)
            place = places[row, column] + step
            xs.append(x[row, column])
            ids.append(batch.top_ids[row, place])
            ps.append(batch.top_logs[row, place].exp())
        if sum(map(len, xs)) >= most:
            break
    return torch.cat(xs), torch.cat(ids), torch.cat(ps)
