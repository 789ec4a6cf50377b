"""Learning to draft: all positions of a text at once, several steps ahead, as at inference.

In: texts as `data` keeps them, and a `Learner`. Out: a learner that has learnt, a curve, checkpoints. A position t is a
round: its query stands at t, sees keys and values before t, starts from the hidden state that produced token t, and
goes on from its own output and the text's next token (the draft it would have made, where it was right). Rounds whose
draft the target would have refused end there, but for a few, as they do at inference; what is left is dense with what
later steps will meet. Knows nothing of how texts are made.
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
    """How a drafter learns.

    steps: updates in all, of `texts` texts each. rate: peak learning rate, reached after `warmup` steps, held, and
    brought to zero over the last `cooldown` share of them. unroll: draft steps. vocabulary: most tokens that compete
    in the softmax of one update. stray: share of refused rounds that go on. prompt: share of the rounds in user turns
    that are learnt from. regression: weight of the distance between the hidden state fed back and the target's.
    average: updates that the weights which are judged and saved are averaged over, exponentially.
    validation: share of the texts that are not learnt from. patience: checks without progress before it stops.

    Raises:
        UserError: a value that cannot be.
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

    def __post_init__(self) -> None:
        if self.steps < 1 or self.texts < 1:
            raise UserError("Training takes at least one step, of at least one text.")
        if not 0 < self.rate < math.inf:
            raise UserError(f"A learning rate is above 0, not {self.rate}.")
        if not 1 <= self.unroll <= MOST_UNROLLED:
            raise UserError(f"From 1 to {MOST_UNROLLED} draft steps are learnt at once, not {self.unroll}.")
        if not 0 <= self.prompt <= 1:
            raise UserError(f"A share is from 0 to 1, not {self.prompt}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"A seed is from 0 to {2**32 - 1}, not {self.seed}.")


@dataclass
class Progress:
    """How far a run has come. shards: that the present pass over the texts reads. best, stale: most tokens per pass
    seen, and checks since then."""

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
    learner: Learner, batch: Batch, steps: int, places: Tensor, real: Tensor
) -> Generator[Round, Going | None, None]:
    """Drafts from every place, a step at a time; the caller says which go on.

    Args:
        places: int64 `[B, n]`, positions t of the tokens the rounds begin with. real: bool `[B, n]`, false for padding.

    Yields:
        x `[B, n, width]`, the drafter's output; hidden `[B, n, H]`, what it would feed back; the places and which are
        real. Receives the indices `[B, m]` into n of the rounds that go on, and which are real.
    """
    assistant: Any = learner.assistant
    kv = {kind: batch.kv[layer] for kind, layer in assistant.config.target_kv_layers.items()}
    everywhere = torch.arange(batch.ids.shape[1], device=places.device)
    hidden = _at(batch.hidden, (places - 1).clamp_min(0))
    for step in range(steps):
        token = batch.ids.gather(1, (places + step).clamp_max(batch.ids.shape[1] - 1))
        visible = (everywhere < places[..., None])[:, None]
        x = assistant.model(
            inputs_embeds=assistant.pre_projection(torch.cat([F.embedding(token, learner.embed), hidden], -1)),
            attention_mask=dict.fromkeys(KINDS, visible),
            position_ids=places,
            shared_kv_states=kv,
            use_cache=False,
            logits_to_keep=everywhere,  # the default makes transformers 5.24 slice per-layer inputs, None here
        ).last_hidden_state
        hidden = assistant.post_projection(x)
        going = yield x, hidden, places, real
        if going is not None:
            index, real = going
            places, hidden = places.gather(1, index), _at(hidden, index)


def losses(learner: Learner, batch: Batch, training: Training, rng: torch.Generator) -> tuple[Tensor, list[list[int]]]:
    """The loss of a batch, and for every step how many rounds reached it and how many of them drafted right."""
    device = batch.ids.device
    places, real = _beginnings(batch, training.prompt, rng)
    tokens = _competitors(batch, real, places, training.vocabulary)
    slot = torch.full((len(learner.head),), -1, dtype=torch.long, device=device)
    slot[tokens] = torch.arange(len(tokens), device=device)
    head = learner.head[tokens]
    size = batch.hidden.square().mean().sqrt()
    total = torch.zeros((), device=device)
    whole = real.sum().clamp_min(1)
    counts = []
    process = rounds(learner, batch, training.unroll, places, real)
    x, hidden, places, real = next(process)
    for step in range(training.unroll):
        row, column = real.nonzero(as_tuple=True)
        place = places[row, column] + step
        logits = (x[row, column] @ head.T).float()
        logs = logits.log_softmax(-1)
        wanted = slot[batch.top_ids[row, place]]
        p = batch.top_logs[row, place].exp() * (wanted >= 0)
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-6)
        loss = -(p * logs.gather(-1, wanted.clamp_min(0))).sum()
        miss = F.smooth_l1_loss(hidden[row, column] / size, batch.hidden[row, place] / size, reduction="none")
        total = total + (loss + training.regression * miss.mean(-1).sum()) / whole
        with torch.no_grad():
            drafted = tokens[logits.argmax(-1)]
            counts.append([len(row), int((drafted == batch.top_ids[row, place, 0]).sum())])
            if step + 1 == training.unroll:
                break
            after = (place + 1).clamp_max(batch.ids.shape[1] - 1)
            luck = torch.rand(len(row), generator=rng).to(device) < training.stray
            goes = torch.zeros_like(real)
            goes[row, column] = ((drafted == batch.ids[row, after]) | luck) & (place + 1 < batch.lengths[row])
            if not goes.any():
                break
            going = packed(goes)
        x, hidden, places, real = process.send(going)
    return total, counts


@torch.no_grad()
def chains(learner: Learner, batch: Batch, steps: int, tokens: Tensor) -> list[list[int]]:
    """For every text, for every token of its answer, how many greedy drafts in a row would be the text's next tokens.

    Of `tokens` alone; the text should be the target's own greedy one. Entry 0 is the round that starts with the
    answer's first token.
    """
    head = learner.head[tokens]
    width = int((batch.lengths - batch.answers).max())
    places = batch.answers[:, None] + torch.arange(width, device=batch.ids.device)
    real = places + 1 < batch.lengths[:, None]
    places = places.clamp_max(batch.ids.shape[1] - 1)
    alive, run = real.clone(), torch.zeros_like(places)
    process = rounds(learner, batch, steps, places, real)
    for step, (x, _, _, _) in enumerate(process):
        drafted = tokens[(x @ head.T).argmax(-1)]
        after = places + step + 1
        here = batch.ids.gather(1, after.clamp_max(batch.ids.shape[1] - 1))
        alive &= (drafted == here) & (after < batch.lengths[:, None])
        run += alive
    return [line[:n].tolist() for line, n in zip(run, (batch.lengths - batch.answers).tolist(), strict=True)]


def judge(learner: Learner, texts: Texts, chosen: list[int], steps: int, size: int = 8) -> dict[str, Any]:
    """Greedy decoding replayed on texts that the target wrote greedily: tokens per target pass and acceptance of each
    draft of the round, over all and by category, among the tokens that come up in the batch."""
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
    """Trains until `training.steps`, from `out`/state.pt if it is there; returns the best tokens per pass seen.

    The learner ends with the average of its latest weights.

    Keeps in `out` state.pt (everything needed to go on exactly), curve.csv and curve.html. Texts that are written
    meanwhile join at the next pass over them.

    Raises:
        UserError: there are no texts to learn from.
    """
    say = say or (lambda line: None)
    out.mkdir(parents=True, exist_ok=True)
    learnt = [p for p in learner.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learnt if p.dim() > 1]},
        {"params": [p for p in learnt if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, training.rate, (0.9, 0.98), weight_decay=training.weight_decay)
    average = Average(learnt, training.average)
    rng = torch.Generator().manual_seed(training.seed)
    state = Progress()
    device = learner.head.device
    saved = out / "state.pt"
    if saved.exists():
        loaded = torch.load(saved, map_location="cpu", weights_only=True)
        learner.load_state_dict(loaded["learner"], strict=False)  # all but what is the target's own
        optimizer.load_state_dict(loaded["optimizer"])
        average.load(loaded["average"])
        rng.set_state(loaded["rng"])
        state = Progress(**loaded["state"])
        _trim_curve(out, state.step)
        say(f"Going on at step {state.step}")
    texts = Texts(folders, state.shards)
    learning, judging = aside(texts, training.validation)
    if not learning:
        raise UserError(f"There are no texts to learn from in {', '.join(map(str, folders))}.")
    if not state.step:
        _write_row(out, None)
    learner.train()
    seen, begun = [[0, 0] for _ in range(training.unroll)], time.perf_counter()
    losing = torch.zeros(())
    while state.step < training.steps:
        batches = _batches(texts, learning, state.epoch, training)
        if state.at >= len(batches):
            state.epoch, state.at = state.epoch + 1, 0
            texts = Texts(folders)
            learning, judging = aside(texts, training.validation)
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
        losing = losing + loss.detach().cpu()
        for sums, count in zip(seen, counts, strict=False):
            sums[0], sums[1] = sums[0] + count[0], sums[1] + count[1]
        state.step, state.at, state.tokens = state.step + 1, state.at + 1, state.tokens + int(batch.lengths.sum())
        if state.step % training.check == 0 or state.step == training.steps:
            with average.instead():
                verdict = judge(learner.eval(), texts, judging[:24], training.unroll)
            learner.train()
            reached = verdict["all"]["tokens_per_pass"] if verdict else 0.0
            state.seconds += time.perf_counter() - begun
            hits = [good / max(n, 1) for n, good in seen]
            row = [state.step, state.tokens, float(losing) / training.check, reached, state.seconds, *hits]
            _write_row(out, row)
            right = " ".join(f"{hit:.3f}" for hit in hits)
            say(
                f"step {state.step}, epoch {state.epoch}: loss {row[2]:.3f}, tokens per pass {reached:.3f}, "
                f"right {right}, {state.seconds:.0f} s"
            )
            better = reached > state.best + 0.002
            state.best, state.stale = max(reached, state.best), 0 if better else state.stale + 1
            seen, losing, begun = [[0, 0] for _ in range(training.unroll)], torch.zeros(()), time.perf_counter()
            _keep(saved, learner, optimizer, average, rng, state)
            if state.stale >= training.patience:
                say("No progress for a while: done")
                break
    average.settle()
    learner.eval()
    return state.best


class Average:
    """A moving average of parameters: what a falling learning rate would give, at any time. Of what is learnt alone;
    `torch.optim.swa_utils.AveragedModel` would keep a second copy of the target's head as well.

    horizon: updates it reaches back over, fewer at first.
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
        """Inside, the parameters are the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def settle(self) -> None:
        """The parameters become the average."""
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
    """Up, level, down: a run can be lengthened from any checkpoint before the descent."""
    left = (training.steps - step) / max(training.cooldown * training.steps, 1)
    return min(1.0, (step + 1) / training.warmup, 1 - math.sqrt(1 - left) if left < 1 else 1.0)


def aside(texts: Texts, share: float) -> tuple[list[int], list[int]]:
    """Which texts are learnt from, and which greedy ones are not and judge instead: by the prompt's hash."""
    kept = [int(key[:8], 16) / 2**32 < share for key in texts.keys]
    learning = [i for i, out in enumerate(kept) if not out]
    return learning, [i for i, out in enumerate(kept) if out and texts.temperatures[i] == 0.0]


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
    """Where rounds begin: everywhere in the answers, and at a share of the places in the user turns."""
    everywhere = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    luck = torch.rand(batch.ids.shape, generator=rng).to(batch.ids.device) < prompt
    inside = (everywhere >= batch.turns[:, None]) & (everywhere < batch.lengths[:, None]) & (everywhere > 0)
    return packed(inside & (luck | (everywhere >= batch.answers[:, None])))


def packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `[B, m]` of what is true in each row of bool `[B, n]`, in order, and which of them are real."""
    most = max(int(chosen.sum(1).max()), 1)
    index = torch.argsort(chosen.long(), dim=1, descending=True, stable=True)[:, :most]
    return index, chosen.gather(1, index)


def _competitors(batch: Batch, real: Tensor, places: Tensor, most: int) -> Tensor:
    """The tokens that carry most of the target's mass in the batch."""
    inside = torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.lengths[:, None]
    ids, logs = batch.top_ids[inside], batch.top_logs[inside]
    known, slot = ids.flatten().unique(return_inverse=True)
    mass = torch.zeros(len(known), device=ids.device).index_add_(0, slot, logs.exp().flatten())
    return known[mass.topk(min(most, len(known))).indices]


def _at(states: Tensor, places: Tensor) -> Tensor:
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


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
    """Forgets what was noted after the checkpoint that a run goes on from."""
    lines = (out / "curve.csv").read_text().splitlines(keepends=True)
    (out / "curve.csv").write_text(
        "".join(line for line in lines if not line[0].isdigit() or int(line.split(",")[0]) <= step)
    )
