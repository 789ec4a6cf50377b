"""Training of a drafter: unrolled draft steps from all positions of a text at once.

In: texts as `data` stores them, and a `Learner`. Out: a trained learner, a curve, checkpoints. Each position t is a
round, as at inference: its query is at position t, attends to keys and values before t, and starts from the hidden
state that produced token t. Later steps use the drafter's own output and the text's next token, which equals the draft
where it was correct (training-time test, EAGLE-3, arXiv:2503.01840). A round whose draft differs from the text ends
there, except for a share of them, so that later steps see the inputs they have at inference. Independent of how texts
are generated.
"""

from __future__ import annotations

import csv
import math
import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from .assistant import KINDS, Learner
from .data import Batch, Texts

Say = Callable[[str], None]

MOST_UNROLLED = 8


@dataclass(frozen=True)
class Training:
    """Hyperparameters.

    steps: number of updates, with `texts` texts each.
    rate: peak learning rate, reached after `warmup` steps, held, and decayed to zero over the last `cooldown` share.
    unroll: draft steps of a round.
    vocabulary: maximum number of tokens in the softmax of an update.
    stray: share of rounds that continue after a wrong draft.
    prompt: share of the positions in user turns that are trained on.
    regression: loss weight of the distance between the hidden state fed back and the target's.
    average: horizon, in updates, of the moving average of weights that is evaluated and saved.
    validation: share of the texts held out for validation.
    check: updates between evaluations.
    patience: evaluations without progress before training stops.
    seconds: after which a call stops; the next one goes on from there.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 4000
    texts: int = 8
    rate: float = 1e-3
    warmup: int = 100
    cooldown: float = 0.3
    weight_decay: float = 0.01
    unroll: int = 4
    vocabulary: int = 3072
    stray: float = 0.1
    prompt: float = 0.3
    regression: float = 0.2
    average: int = 200
    validation: float = 0.03
    check: int = 250
    patience: int = 8
    seed: int = 0
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.steps < 1 or self.texts < 1:
            raise UserError("Training needs at least one step, of at least one text.")
        if not 0 < self.rate < math.inf:
            raise UserError(f"The learning rate must be above 0, not {self.rate}.")
        if not 1 <= self.unroll <= MOST_UNROLLED:
            raise UserError(f"The number of unrolled draft steps must be from 1 to {MOST_UNROLLED}, not {self.unroll}.")
        if not 0 <= self.prompt <= 1:
            raise UserError(f"The share of user turns must be from 0 to 1, not {self.prompt}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"The seed must be from 0 to {2**32 - 1}, not {self.seed}.")


@dataclass
class Progress:
    """The progress of a run.

    epoch, at: the current pass over the texts and the next batch of it.
    shards: number of shards in the current pass.
    best, stale: highest tokens per target pass so far, and evaluations since then.
    tokens, seconds: trained tokens and time so far.
    """

    step: int = 0
    epoch: int = 0
    at: int = 0
    shards: int | None = None
    best: float = 0.0
    stale: int = 0
    tokens: int = 0
    seconds: float = 0.0


Round = tuple[Tensor, Tensor, Tensor, Tensor]
Going = tuple[Tensor, Tensor]


def rounds(
    learner: Learner, batch: Batch, steps: int, positions: Tensor, real: Tensor
) -> Generator[Round, Going | None, None]:
    """Unrolls draft steps from all given positions; after each step the caller selects the rounds that continue.

    Args:
        positions: int64 `[B, n]`, position t of the first token of each round.
        real: bool `[B, n]`, false for padding.

    Yields:
        (x `[B, n, width]`, the drafter's output; hidden `[B, n, H]`, the state it feeds back; positions; real).
        Receives (indices `[B, m]` into n of the rounds that continue, and `real` for them), or None if all continue.
    """
    assistant: Any = learner.assistant
    kv = {kind: batch.kv[layer] for kind, layer in assistant.config.target_kv_layers.items()}
    key_positions = torch.arange(batch.ids.shape[1], device=positions.device)
    hidden = _at(batch.hidden, (positions - 1).clamp_min(0))
    for step in range(steps):
        token = batch.ids.gather(1, (positions + step).clamp_max(batch.ids.shape[1] - 1))
        visible = (key_positions < positions[..., None])[:, None]
        x = assistant.model(
            inputs_embeds=assistant.pre_projection(torch.cat([F.embedding(token, learner.embed), hidden], -1)),
            attention_mask=dict.fromkeys(KINDS, visible),
            position_ids=positions,
            shared_kv_states=kv,
            use_cache=False,
            logits_to_keep=key_positions,  # the default makes transformers 5.24 slice per-layer inputs, None here
        ).last_hidden_state
        hidden = assistant.post_projection(x)
        going = yield x, hidden, positions, real
        if going is not None:
            index, real = going
            positions, hidden = positions.gather(1, index), _at(hidden, index)


def losses(learner: Learner, batch: Batch, training: Training, rng: torch.Generator) -> tuple[Tensor, list[list[int]]]:
    """The loss of a batch, and for each draft step the number of rounds that reach it and of correct drafts there."""
    device = batch.ids.device
    positions, real = _beginnings(batch, training.prompt, rng)
    tokens = _competitors(batch, real, positions, training.vocabulary)
    slot = torch.full((len(learner.head),), -1, dtype=torch.long, device=device)
    slot[tokens] = torch.arange(len(tokens), device=device)
    head = learner.head[tokens]
    scale = batch.hidden.square().mean().sqrt()
    total = torch.zeros((), device=device)
    whole = real.sum().clamp_min(1)
    counts = []
    process = rounds(learner, batch, training.unroll, positions, real)
    x, hidden, positions, real = next(process)
    for step in range(training.unroll):
        row, column = real.nonzero(as_tuple=True)
        position = positions[row, column] + step
        logits = (x[row, column] @ head.T).float()
        logs = logits.log_softmax(-1)
        slots = slot[batch.top_ids[row, position]]
        p = batch.top_logs[row, position].exp() * (slots >= 0)
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-6)
        loss = -(p * logs.gather(-1, slots.clamp_min(0))).sum()
        distance = F.smooth_l1_loss(hidden[row, column] / scale, batch.hidden[row, position] / scale, reduction="none")
        total = total + (loss + training.regression * distance.mean(-1).sum()) / whole
        with torch.no_grad():
            drafted = tokens[logits.argmax(-1)]
            counts.append([len(row), int((drafted == batch.top_ids[row, position, 0]).sum())])
            if step + 1 == training.unroll:
                break
            after = (position + 1).clamp_max(batch.ids.shape[1] - 1)
            stray = torch.rand(len(row), generator=rng).to(device) < training.stray
            continues = torch.zeros_like(real)
            continues[row, column] = ((drafted == batch.ids[row, after]) | stray) & (position + 1 < batch.lengths[row])
            if not continues.any():
                break
            going = packed(continues)
        x, hidden, positions, real = process.send(going)
    return total, counts


@torch.no_grad()
def chains(learner: Learner, batch: Batch, steps: int, tokens: Tensor) -> list[list[int]]:
    """The number of accepted tokens of a greedy draft from each token of each text's answer.

    Drafts are limited to the ids `tokens` and compared with the text, which should be the target's greedy output. Entry
    0 is the round that starts with the answer's first token.
    """
    head = learner.head[tokens]
    width = int((batch.lengths - batch.answers).max())
    positions = batch.answers[:, None] + torch.arange(width, device=batch.ids.device)
    real = positions + 1 < batch.lengths[:, None]
    positions = positions.clamp_max(batch.ids.shape[1] - 1)
    alive, run = real.clone(), torch.zeros_like(positions)
    process = rounds(learner, batch, steps, positions, real)
    for step, (x, _, _, _) in enumerate(process):
        drafted = tokens[(x @ head.T).argmax(-1)]
        after = positions + step + 1
        here = batch.ids.gather(1, after.clamp_max(batch.ids.shape[1] - 1))
        alive &= (drafted == here) & (after < batch.lengths[:, None])
        run += alive
    return [line[:n].tolist() for line, n in zip(run, (batch.lengths - batch.answers).tolist(), strict=True)]


def judge(learner: Learner, texts: Texts, chosen: list[int], steps: int, size: int = 8) -> dict[str, Any]:
    """Replays greedy decoding on texts that the target generated greedily: tokens per target pass and acceptance by
    position in the draft, for all texts and by category. The drafter's argmax is over the tokens that occur in the
    batch."""
    tally: dict[str, list[int]] = {}
    for begin in range(0, len(chosen), size):
        part = chosen[begin : begin + size]
        batch = _moved(texts.batch(part, learner.shape.layers), learner.head.device)
        tokens = torch.cat([batch.top_ids[..., :8].flatten(), batch.ids.flatten()]).unique()
        for text, runs in zip(part, chains(learner, batch, steps, tokens), strict=True):
            for name in ("all", texts.categories[text]):
                # passes, emitted, then for each draft: reached, accepted
                seen = tally.setdefault(name, [0, 0, *[0] * (2 * steps)])
                at = 0
                while at < len(runs):
                    seen[0] += 1
                    seen[1] += 1 + runs[at]
                    for step in range(min(runs[at] + 1, steps)):
                        seen[2 + 2 * step] += 1
                        seen[3 + 2 * step] += step < runs[at]
                    at += runs[at] + 1
    return {
        name: {
            "tokens_per_pass": seen[1] / max(seen[0], 1),
            "by_position": [seen[3 + 2 * i] / max(seen[2 + 2 * i], 1) for i in range(steps)],
            "passes": seen[0],
        }
        for name, seen in sorted(tally.items())
    }


def train(learner: Learner, folders: list[Path], out: Path, training: Training, say: Say | None = None) -> float:
    """Trains for `training.steps` steps, from `out`/state.pt if it exists; returns the best tokens per target pass.

    Afterwards the learner has the moving average of its weights. `out` holds state.pt, from which training resumes
    bitwise exactly, and curve.csv. Texts that are added meanwhile are used from the next pass on.

    Raises:
        UserError: there are no texts to train on.
    """
    say = say or (lambda line: None)
    out.mkdir(parents=True, exist_ok=True)
    trained = [p for p in learner.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, training.rate, (0.9, 0.98), weight_decay=training.weight_decay)
    average = Average(trained, training.average)
    rng = torch.Generator().manual_seed(training.seed)
    state = Progress()
    device = learner.head.device
    saved = out / "state.pt"
    if saved.exists():
        loaded = torch.load(saved, map_location="cpu", weights_only=True)
        learner.load_state_dict(loaded["learner"], strict=False)  # without the target's embeddings and head
        optimizer.load_state_dict(loaded["optimizer"])
        average.load(loaded["average"])
        rng.set_state(loaded["rng"])
        state = Progress(**loaded["state"])
        _trim_curve(out, state.step)
        say(f"Resuming at step {state.step}")
    texts = Texts(folders, state.shards)
    train_texts, validation_texts = aside(texts, training.validation)
    if not train_texts:
        raise UserError(f"There are no texts to train on in {', '.join(map(str, folders))}.")
    if not state.step:
        _write_row(out, None)
    learner.train()
    seen, begun = [[0, 0] for _ in range(training.unroll)], time.perf_counter()
    loss_sum, updates, started, late = torch.zeros(()), 0, begun, False
    while state.step < training.steps and not late:
        batches = _batches(texts, train_texts, state.epoch, training)
        if state.at >= len(batches):
            state.epoch, state.at = state.epoch + 1, 0
            texts = Texts(folders)
            train_texts, validation_texts = aside(texts, training.validation)
            continue
        state.shards = texts.shards
        batch = _moved(texts.batch(batches[state.at], learner.shape.layers), device)
        for group in optimizer.param_groups:
            group["lr"] = training.rate * _schedule(state.step, training)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, counts = losses(learner, batch, training, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        average.update()
        loss_sum = loss_sum + loss.detach().cpu()
        for sums, count in zip(seen, counts, strict=False):
            sums[0], sums[1] = sums[0] + count[0], sums[1] + count[1]
        state.step, state.at, state.tokens = state.step + 1, state.at + 1, state.tokens + int(batch.lengths.sum())
        updates += 1
        late = time.perf_counter() - started >= training.seconds
        if state.step % training.check == 0 or state.step == training.steps or late:
            with average.instead():
                scores = judge(learner.eval(), texts, validation_texts[:24], training.unroll)
            learner.train()
            reached = scores["all"]["tokens_per_pass"] if scores else 0.0
            state.seconds += time.perf_counter() - begun
            hits = [good / max(n, 1) for n, good in seen]
            row = [state.step, state.tokens, float(loss_sum) / updates, reached, state.seconds, *hits]
            _write_row(out, row)
            correct = " ".join(f"{hit:.3f}" for hit in hits)
            say(
                f"step {state.step}, epoch {state.epoch}: loss {row[2]:.3f}, tokens per pass {reached:.3f}, "
                f"correct {correct}, {state.seconds:.0f} s"
            )
            better = reached > state.best + 0.002
            state.best, state.stale = max(reached, state.best), 0 if better else state.stale + 1
            seen, loss_sum, begun = [[0, 0] for _ in range(training.unroll)], torch.zeros(()), time.perf_counter()
            updates = 0
            _keep(saved, learner, optimizer, average, rng, state)
            if state.stale >= training.patience:
                say(f"Stopped: no progress in {training.patience} evaluations")
                break
    average.settle()
    learner.eval()
    return state.best


class Average:
    """An exponential moving average of the trained parameters, which has much of the effect of a decayed learning
    rate. `torch.optim.swa_utils.AveragedModel` would copy the target's frozen head too.

    horizon: number of updates averaged over; smaller for the first updates.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], horizon: int) -> None:
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]
        self.horizon = horizon
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        torch._foreach_lerp_(self.values, list(self.parameters), 1 / min(self.horizon, 1 + self.updates / 8))

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within this context the parameters have the averaged values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def settle(self) -> None:
        """Sets the parameters to the averaged values."""
        self._swap()
        self.values = [p.detach().clone() for p in self.parameters]

    def load(self, kept: dict[str, Any]) -> None:
        self.updates = int(kept["updates"])
        for value, was in zip(self.values, kept["values"], strict=True):
            value.copy_(was)

    def kept(self) -> dict[str, Any]:
        return {"updates": self.updates, "values": self.values}

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.values[i] = self.values[i], parameter.data


def _schedule(step: int, training: Training) -> float:
    """Factor of the learning rate: warm-up, constant, decay. A run can be extended from any checkpoint before the
    decay."""
    left = (training.steps - step) / max(training.cooldown * training.steps, 1)
    return min(1.0, (step + 1) / training.warmup, 1 - math.sqrt(1 - left) if left < 1 else 1.0)


def aside(texts: Texts, share: float) -> tuple[list[int], list[int]]:
    """The texts of the training set and the greedy ones of the validation set, split by a hash of the prompt."""
    kept = [int(key[:8], 16) / 2**32 < share for key in texts.keys]
    train_texts = [i for i, out in enumerate(kept) if not out]
    return train_texts, [i for i, out in enumerate(kept) if out and texts.temperatures[i] == 0.0]


def _shuffled(chosen: list[int], epoch: int, seed: int) -> list[int]:
    order = list(chosen)
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _batches(texts: Texts, chosen: list[int], epoch: int, training: Training) -> list[list[int]]:
    """Batches of texts of about equal length, in random order."""
    order = _shuffled(chosen, epoch, training.seed)
    pool = training.texts * 16
    sorts = [sorted(order[i : i + pool], key=texts.length) for i in range(0, len(order), pool)]
    batches = [part[i : i + training.texts] for part in sorts for i in range(0, len(part), training.texts)]
    random.Random(f"{training.seed}/{epoch}/batches").shuffle(batches)
    return batches


def _beginnings(batch: Batch, prompt: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions at which rounds begin: all in the answers, and a random share of those in the user turns."""
    index = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    drawn = torch.rand(batch.ids.shape, generator=rng).to(batch.ids.device) < prompt
    inside = (index >= batch.turns[:, None]) & (index < batch.lengths[:, None]) & (index > 0)
    return packed(inside & (drawn | (index >= batch.answers[:, None])))


def packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `[B, m]` of the true entries in each row of bool `[B, n]`, in order, and a mask, false for padding."""
    most = max(int(chosen.sum(1).max()), 1)
    index = torch.argsort(chosen.long(), dim=1, descending=True, stable=True)[:, :most]
    return index, chosen.gather(1, index)


def _competitors(batch: Batch, real: Tensor, positions: Tensor, most: int) -> Tensor:
    """The tokens with the largest sum of the target's probabilities in the batch."""
    inside = torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.lengths[:, None]
    ids, logs = batch.top_ids[inside], batch.top_logs[inside]
    known, slot = ids.flatten().unique(return_inverse=True)
    mass = torch.zeros(len(known), device=ids.device).index_add_(0, slot, logs.exp().flatten())
    return known[mass.topk(min(most, len(known))).indices]


def _at(states: Tensor, positions: Tensor) -> Tensor:
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def _moved(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {name: value.to(device) for name, value in vars(batch).items() if name != "kv"}
    return Batch(**moved, kv={layer: (k.to(device), v.to(device)) for layer, (k, v) in batch.kv.items()})


def _keep(
    path: Path, learner: Learner, optimizer: Any, average: Average, rng: torch.Generator, state: Progress
) -> None:
    weights = {name: value for name, value in learner.state_dict().items() if "embed_tokens" not in name}
    weights = {name: value for name, value in weights.items() if not name.endswith("lm_head.weight")}
    part = path.with_suffix(".part")
    kept = {
        "learner": weights,
        "optimizer": optimizer.state_dict(),
        "average": average.kept(),
        "rng": rng.get_state(),
        "state": asdict(state),
    }
    torch.save(kept, part)
    os.replace(part, path)


def _write_row(out: Path, row: list[Any] | None) -> None:
    with (out / "curve.csv").open("a" if row else "w", newline="") as file:
        header = ["step", "tokens", "loss", "tokens_per_pass", "seconds"]
        csv.writer(file).writerow(row or [*header, *(f"right_{i}" for i in range(1, MOST_UNROLLED + 1))])


def _trim_curve(out: Path, step: int) -> None:
    """Removes rows after the checkpoint from which a run resumes."""
    lines = (out / "curve.csv").read_text().splitlines(keepends=True)
    (out / "curve.csv").write_text(
        "".join(line for line in lines if not line[0].isdigit() or int(line.split(",")[0]) <= step)
    )
