"""Vocabulary lists of equal size: a draft step scores the tokens of a few lists and not the whole vocabulary.

In: a trained learner. Out: its `masked_embedding`: the tokens of each list, and a centroid for each list. A step scores
the lists whose centroids have the largest products with the drafter's output. Lists are clusters of rows of the head
with similar directions; the centroids are fitted to the target's distributions.
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

BANDS = (1 / 12, 1 / 4)  # shares of the lists for the most frequent tokens, and for the next most frequent ones


def sort_vocabulary(
    learner: Learner, texts: Texts, lists: int, chosen: int, training: Training, most: int = 60_000
) -> float:
    """Fits `lists` vocabulary lists to the drafter. Returns how often the target's argmax is in one of the `chosen`
    best lists on the validation texts.

    Args:
        most: number of drafter outputs to fit to.
    """
    train_texts, validation_texts = aside(texts, training.validation)
    rng = random.Random(training.seed)
    rng.shuffle(train_texts)
    x, ids, p = _outputs(learner, texts, train_texts, most)
    frequent = torch.zeros(len(learner.head)).index_add_(0, ids.flatten(), p.flatten())
    # Lists have tokens of similar frequency, since rare tokens in an often chosen list would be scored in vain.
    ranks = frequent.argsort(descending=True, stable=True)
    size = len(ranks) // lists
    cuts = [0, *(max(round(lists * share), 1) * size for share in BANDS), len(ranks)]
    bands = [ranks[a:b] for a, b in pairwise(cuts)]
    order = torch.cat(
        [band[balanced(learner.head[band], frequent[band], len(band) // size, training.seed)] for band in bands]
    )
    list_of = torch.empty_like(order)
    list_of[order] = torch.arange(len(order)) // (len(order) // lists)
    mass = torch.zeros(len(x), lists).scatter_add_(1, list_of[ids], p)
    mass /= mass.sum(1, keepdim=True).clamp_min(1e-6)
    weights = frequent + 1e-3 * frequent.mean()
    mean = torch.zeros(lists, x.shape[1]).index_add_(0, list_of, learner.head * weights[:, None])
    centroids = (mean / torch.zeros(lists).index_add_(0, list_of, weights)[:, None]).requires_grad_()
    with torch.enable_grad():
        optimizer = torch.optim.AdamW([centroids], 3e-3, weight_decay=0.0)
        generator = torch.Generator().manual_seed(training.seed)
        epochs, size = 6, 512
        total = epochs * -(-len(x) // size)
        for step in range(total):
            if step % -(-len(x) // size) == 0:
                shuffled = torch.randperm(len(x), generator=generator)
            part = shuffled[step % -(-len(x) // size) * size :][:size]
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / total)
            loss = -(mass[part] * (x[part] @ centroids.T).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with_lists(learner, order, centroids.detach(), chosen)
    x, ids, _ = _outputs(learner, texts, validation_texts, most)
    picked = (x @ centroids.detach().T).topk(chosen).indices
    return float((picked == list_of[ids[:, :1]]).any(1).float().mean())


def balanced(rows: Tensor, frequent: Tensor, lists: int, seed: int, iterations: int = 8) -> Tensor:
    """An order of the rows, int64 `[V]`; each block of V / `lists` is a cluster of rows with similar directions.

    k-means, weighted by token frequency. Then each token, the most frequent first, is assigned to the nearest cluster
    with room.
    """
    unit = F.normalize(rows - rows.mean(0), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    weight = (frequent + 0.1 * frequent.mean() + 1e-9).sqrt()
    centers = unit[torch.multinomial(weight, lists, generator=generator)]
    for _ in range(iterations):
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
    """Drafter outputs `[n, width]` of the first two draft steps inside answers, and the ids and probabilities
    `[n, TOP]` of the target's most likely tokens there."""
    xs: list[Tensor] = []
    ids: list[Tensor] = []
    ps: list[Tensor] = []
    for begin in range(0, len(chosen), 8):
        batch = texts.batch(chosen[begin : begin + 8], learner.shape.layers)
        index = torch.arange(batch.ids.shape[1])
        inside = (index >= batch.answers[:, None]) & (index + 1 < batch.lengths[:, None])
        if not inside.any():
            continue
        positions, real = packed(inside)
        process: Any = rounds(learner, batch, 2, positions, real)
        for step, (x, _, _, _) in enumerate(process):
            row, column = real.nonzero(as_tuple=True)
            position = positions[row, column] + step
            xs.append(x[row, column])
            ids.append(batch.top_ids[row, position])
            ps.append(batch.top_logs[row, position].exp())
        if sum(map(len, xs)) >= most:
            break
    return torch.cat(xs), torch.cat(ids), torch.cat(ps)
