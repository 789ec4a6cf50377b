"""The training set: texts the target writes itself, with everything a drafter will see of it.

In: a target and openings. Out: shards on disk with, for every token, its id, the target's last hidden state, keys and
values of the chosen layers, and the target's most likely next tokens. It is all collected while the target writes, so
nothing is computed twice and training never runs the target. Shards appear whole or not at all: whatever stops this,
the next call goes on behind the last shard. Knows nothing of drafters.

Texts are written in slots, all at once, one token a pass; a slot whose text ends begins the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from .. import cpu
from ..cache import ARGUMENT, RollbackCache, layer_kinds
from ..errors import UserError
from ..target import Target
from .prompts import HeldOut, Opening, Turns, fingerprint

Say = Callable[[str], None]

TOP = 32  # of the target's next tokens are kept
CHOICE = 64  # most likely tokens a sampled one is drawn from
SLOTS_ATTENTION = "slots_sdpa"
FORMAT = 1
MANY = 20_000  # known prompts in a row: there are no others


@dataclass(frozen=True)
class Writing:
    """How texts are written.

    slots: texts written at once. length: most tokens of a text, template included. prompt: most tokens of a user turn.
    answer: fewest and most tokens of an answer, the limit being drawn anew for every text. temperatures: of answers,
    with their shares; user turns are written at `prompt_temperature`. shard: tokens a file, at least.

    Raises:
        UserError: a value that cannot be.
    """

    slots: int = 96
    length: int = 352
    prompt: int = 150
    answer: tuple[int, int] = (64, 224)
    temperatures: tuple[tuple[float, float], ...] = ((0.0, 0.6), (0.7, 0.3), (1.0, 0.1))
    prompt_temperature: float = 0.9
    shard: int = 40_000

    def __post_init__(self) -> None:
        fewest, most = self.answer
        if self.slots < 1 or self.prompt < 1:
            raise UserError("There must be at least one text at once, and one token of a user turn.")
        if not 1 <= fewest <= most:
            raise UserError(f"An answer's fewest and most tokens cannot be {fewest} and {most}.")
        if any(not 0 <= temperature <= 5 for temperature, _ in self.temperatures):
            raise UserError("Temperatures of answers are from 0 to 5.")

    def check_room(self, turns: Turns, context: int) -> None:
        """Raises UserError unless the longest user turn leaves room for the shortest answer, in a text no longer than
        the target's context."""
        template = len(turns.before) + len(turns.after)
        needed = template + self.prompt + self.answer[0]
        if self.length < needed:
            raise UserError(
                f"Texts of {self.length} tokens are too short: a user turn has up to {self.prompt}, its template "
                f"{template} and an answer at least {self.answer[0]}, {needed} in all."
            )
        if self.length > context:
            raise UserError(f"Texts of {self.length} tokens are longer than the target's context of {context}.")


@dataclass
class _Text:
    """One slot's text: the tokens read so far, those that must come next, and where it stands."""

    category: str
    ids: list[int]
    forced: list[int]
    temperature: float
    at_least: int | None  # None once the user turn is complete
    limit: int
    turn: int  # where the user turn begins
    answer: int = 0  # where the answer begins
    key: str = ""
    done: bool = field(default=False)
    spare: bool = False  # keeps its slot busy, no more: there are no prompts left


def write(
    model: PreTrainedModel,
    tokenizer: Any,
    openings: Callable[[random.Random], Iterator[Opening]],
    layers: list[int],
    folder: Path,
    tokens: int,
    writing: Writing | None = None,
    held_out: HeldOut | None = None,
    seed: int = 0,
    say: Say | None = None,
) -> int:
    """Adds shards to `folder` until it holds `tokens` tokens; returns how many it holds.

    Args:
        model: the target, float32 on the CPU (it is made int8 there, in place, where that works) or on an accelerator.
        openings: makes an endless stream of openings from a random number generator.
        layers: whose keys and values are kept.
        held_out: prompts that must not occur.
        say: hears the progress.

    Raises:
        UserError: texts as long as `writing` has them have no room for what belongs in them.
    """
    writing, held_out, say = writing or Writing(), held_out or HeldOut([]), say or (lambda line: None)
    writing.check_room(Turns.of(tokenizer), Target(model).context)
    folder.mkdir(parents=True, exist_ok=True)
    known, have = _known(folder)
    if have >= tokens:
        return have
    number = len(shards(folder))
    torch.manual_seed(seed * 1_000_003 + number)
    rng = random.Random(f"{seed}/{number}")
    slots = _Slots(model, tokenizer, layers, writing)
    stream = openings(rng)

    def fresh() -> _Text:
        """The next text that was not written yet."""
        for opening in islice(stream, MANY):
            if opening.at_least is None:  # known before it is read
                words = tokenizer.decode(opening.ids[: writing.prompt])
                if _key(words) in known or words in held_out:
                    continue
                known.add(_key(words))
                return replace(_begin(opening, slots.turns, writing, rng), key=_key(words))
            return _begin(opening, slots.turns, writing, rng)
        return replace(_begin(next(stream), slots.turns, writing, rng), key="spare", spare=True)

    finished: list[dict[str, Any]] = []
    held, begun, written, over = 0, time.perf_counter(), 0, False
    with torch.inference_mode():
        slots.texts = [fresh() for _ in range(writing.slots)]
        while have < tokens and not over:
            slots.step()
            for row, text in enumerate(slots.texts):
                if text.at_least is None and not text.key and not text.forced:
                    words = tokenizer.decode(text.ids[text.turn : text.answer - len(slots.turns.after)])
                    text.key = _key(words)
                    if text.key in known or words in held_out:
                        slots.texts[row] = fresh()
                        continue
                    known.add(text.key)
                if text.done:
                    if not text.spare:
                        finished.append(slots.take(row))
                        held += len(text.ids)
                    slots.texts[row] = fresh()
            over = all(text.spare for text in slots.texts)
            if held >= writing.shard or (over and finished):
                _save(finished, layers, folder / f"{number:05d}.safetensors")
                have, written, number = have + held, written + held, number + 1
                finished, held = [], 0
                rate = written / (time.perf_counter() - begun)
                say(f"{have:,} of {tokens:,} tokens in {number} shards, {rate:.0f} tokens/s")
    if over:
        say(f"All prompts are written: {have:,} tokens")
    return have


def _key(words: str) -> str:
    return hashlib.sha256(fingerprint(words).encode()).hexdigest()[:16]


def shards(folder: Path) -> list[Path]:
    """The finished shards, in order."""
    return sorted(folder.glob("[0-9]*.safetensors"))


@dataclass(frozen=True)
class Batch:
    """Texts of unequal length, padded: ids `[B, T]`, hidden `[B, T, H]`, top_ids and top_logs `[B, T, TOP]`, lengths,
    turns and answers `[B]`, and for each layer kept keys and values `[B, heads, T, head_dim]`."""

    ids: Tensor
    hidden: Tensor
    top_ids: Tensor
    top_logs: Tensor
    lengths: Tensor
    turns: Tensor
    answers: Tensor
    kv: dict[int, tuple[Tensor, Tensor]]


class Texts:
    """The finished shards of some folders, read where they lie."""

    def __init__(self, folders: Iterable[Path], most: int | None = None) -> None:
        paths = [path for folder in folders for path in shards(folder)][:most]
        self.files: list[Any] = [safe_open(path, "pt") for path in paths]
        self.shards = len(paths)
        self.texts: list[tuple[int, int, int, int, int]] = []  # file, begin, end, turn, answer
        self.categories: list[str] = []
        self.temperatures: list[float] = []
        self.keys: list[str] = []
        for number, file in enumerate(self.files):
            about = json.loads(file.metadata()["about"])
            offsets = file.get_tensor("offsets").tolist()
            turns, answers = file.get_tensor("turns").tolist(), file.get_tensor("answers").tolist()
            for i, (begin, end) in enumerate(pairwise(offsets)):
                self.texts.append((number, begin, end, turns[i], answers[i]))
            self.categories += about["categories"]
            self.keys += about["keys"]
            self.temperatures += file.get_tensor("temperatures").tolist()
            self.layers: list[int] = about["layers"]

    def __len__(self) -> int:
        return len(self.texts)

    def length(self, text: int) -> int:
        """Its tokens."""
        return self.texts[text][2] - self.texts[text][1]

    def batch(self, chosen: Sequence[int], layers: Iterable[int]) -> Batch:
        """The chosen texts, with keys and values of `layers`, float32."""

        def padded(name: str) -> Tensor:
            return nn.utils.rnn.pad_sequence([self._part(name, text) for text in chosen], batch_first=True)

        def heads(name: str) -> Tensor:
            return padded(name).float().transpose(1, 2)

        ends = torch.tensor([self.texts[text] for text in chosen])
        return Batch(
            padded("ids").long(),
            padded("hidden").float(),
            padded("top_ids").long(),
            padded("top_logs").float(),
            ends[:, 2] - ends[:, 1],
            ends[:, 3],
            ends[:, 4],
            {layer: (heads(f"keys.{layer}"), heads(f"values.{layer}")) for layer in layers},
        )

    def _part(self, name: str, text: int) -> Tensor:
        number, begin, end, _, _ = self.texts[text]
        part: Tensor = self.files[number].get_slice(name)[begin:end]
        return part


def _known(folder: Path) -> tuple[set[str], int]:
    keys: set[str] = set()
    tokens = 0
    for path in shards(folder):
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            keys.update(about["keys"])
            tokens += int(about["tokens"])
    return keys, tokens


def _begin(opening: Opening, turns: Turns, writing: Writing, rng: random.Random) -> _Text:
    temperatures, shares = zip(*writing.temperatures, strict=True)
    ids = opening.ids[: writing.prompt]
    text = _Text(
        opening.category,
        ids=list(turns.before),
        forced=list(ids),
        temperature=rng.choices(temperatures, shares)[0],
        at_least=None if opening.at_least is None else len(turns.before) + max(opening.at_least, len(ids) + 1),
        limit=rng.randint(*writing.answer),
        turn=len(turns.before),
    )
    if opening.at_least is None:
        _answer(text, turns)
    if not text.forced:
        # The first token of an empty turn is the target's own; the last one before it is read again to get it.
        text.forced = [text.ids.pop()]
    return text


def _answer(text: _Text, turns: Turns) -> None:
    text.at_least = None
    text.forced += turns.after
    text.answer = len(text.ids) + len(text.forced)


class _Slots:
    """The batch: a cache with a place for every text, and what was seen of each."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, layers: list[int], writing: Writing) -> None:
        self.writing = writing
        self.turns = Turns.of(tokenizer)
        self.layers = layers
        self.model = _prepared(model)
        self.device = model.device
        eos = model.generation_config.eos_token_id
        self.ends = frozenset([eos] if isinstance(eos, int) else eos or []) | {self.turns.after[0]}
        self.texts: list[_Text] = []
        rows, length = writing.slots, writing.length
        self.cache = _SlotCache(model.config, rows, length)
        self.kinds = layer_kinds(model.config)
        self.window = getattr(model.config.get_text_config(), "sliding_window", None)
        width = model.config.get_text_config().hidden_size
        self.hidden = torch.zeros(rows, length, width, dtype=torch.float16)
        self.top_ids = torch.zeros(rows, length, TOP, dtype=torch.int32)
        self.top_logs = torch.zeros(rows, length, TOP, dtype=torch.float16)
        # Every text begins alike: those positions are read once and stay in the cache.
        for place, token in enumerate(self.turns.before):
            self._read([token] * rows, [place] * rows)

    def step(self) -> None:
        """One token more for every text."""
        tokens, places = [], []
        for text in self.texts:
            text.ids.append(text.forced.pop(0))
            tokens.append(text.ids[-1])
            places.append(len(text.ids) - 1)
        top = self._read(tokens, places)
        drawn = self._draw(top).tolist()
        for text, token in zip(self.texts, drawn, strict=True):
            length = len(text.ids)
            if text.forced:
                continue
            if text.at_least is not None:
                full = length - text.turn >= self.writing.prompt
                if full or token in self.ends:
                    _answer(text, self.turns)
                    continue
            else:
                full = length - text.answer >= text.limit or length >= self.writing.length or _loops(text.ids)
                if full or token in self.ends:
                    text.done = True
                    continue
            text.forced.append(token)

    def take(self, row: int) -> dict[str, Any]:
        """What was seen of a finished text."""
        text = self.texts[row]
        n = len(text.ids)
        kept = {
            "ids": torch.tensor(text.ids, dtype=torch.int32),
            "hidden": self.hidden[row, :n].clone(),
            "top_ids": self.top_ids[row, :n].clone(),
            "top_logs": self.top_logs[row, :n].clone(),
        }
        for layer in self.layers:
            keys, values = self.cache.layers[layer].keys, self.cache.layers[layer].values
            assert keys is not None and values is not None
            kept[f"keys.{layer}"] = keys[row, :, :n].transpose(0, 1).to("cpu", torch.float16)
            kept[f"values.{layer}"] = values[row, :, :n].transpose(0, 1).to("cpu", torch.float16)
        return {"text": text, "tensors": kept}

    def _read(self, tokens: list[int], places: list[int]) -> tuple[Tensor, Tensor]:
        """Logits and ids `[rows, CHOICE]` of the most likely next tokens."""
        place = torch.tensor(places, device=self.device)
        end = min(-(-(max(places) + 1) // 32) * 32, self.writing.length)
        self.cache.place, self.cache.end = place, end
        back = place[:, None] - torch.arange(end, device=self.device)
        out = self.model.base_model(
            input_ids=torch.tensor(tokens, device=self.device)[:, None],
            position_ids=place[:, None],
            attention_mask=self._masks(back),
            use_cache=True,
            **{ARGUMENT: self.cache},
        )
        hidden = out.last_hidden_state[:, 0]
        logits = self.model.lm_head(hidden).float()
        top = logits.topk(CHOICE)
        rows = torch.arange(len(tokens))
        where = place.cpu()
        self.hidden[rows, where] = hidden.to("cpu", torch.float16)
        self.top_ids[rows, where] = top.indices[:, :TOP].to("cpu", torch.int32)
        logs = top.values[:, :TOP] - logits.logsumexp(-1, keepdim=True)
        self.top_logs[rows, where] = logs.to("cpu", torch.float16)
        return top.values, top.indices

    def _masks(self, back: Tensor) -> Any:
        """Additive masks `[rows, 1, 1, end]` from how far behind each position is."""

        def additive(visible: Tensor) -> Tensor:
            zeros = torch.zeros(visible.shape, dtype=self.model.dtype, device=self.device)
            return zeros.masked_fill_(~visible, -torch.inf)[:, None, None]

        full = additive(back >= 0)
        if "sliding_attention" not in self.kinds or self.window is None:
            return full
        return {"full_attention": full, "sliding_attention": additive((back >= 0) & (back < self.window))}

    def _draw(self, top: tuple[Tensor, Tensor]) -> Tensor:
        logits, ids = top
        warm = [self.writing.prompt_temperature if t.at_least is not None else t.temperature for t in self.texts]
        heat = torch.tensor(warm, device=self.device)[:, None]
        ends = torch.tensor(sorted(self.ends), device=self.device)
        early = [t.at_least is not None and len(t.ids) < t.at_least for t in self.texts]
        barred = torch.isin(ids, ends) & torch.tensor(early, device=self.device)[:, None]
        logits = logits.masked_fill(barred, -torch.inf) / heat.clamp_min(1e-4)
        noise = torch.empty_like(logits).exponential_()
        return ids.gather(-1, (logits.softmax(-1) / noise).argmax(-1, keepdim=True))[:, 0]


class _SlotCache(RollbackCache):
    """Keys and values `[rows, heads, length, head_dim]`, each row written at a place of its own."""

    def __init__(self, config: Any, rows: int, length: int) -> None:
        super().__init__(config, length)
        self.capacity = length
        self.rows = torch.arange(rows)
        self.place = torch.zeros(rows, dtype=torch.long)
        self.end = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        assert layer.keys is not None and layer.values is not None
        layer.keys[self.rows, :, self.place] = key_states[:, :, 0]
        layer.values[self.rows, :, self.place] = value_states[:, :, 0]
        return layer.keys[:, :, : self.end], layer.values[:, :, : self.end]


def _slots_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """One query a row; the heads of a group become the kernel's rows, so that keys are not copied for each."""
    rows, heads, _, width = query.shape
    group = heads // key.shape[1]
    q = query.reshape(rows, key.shape[1], group, width)
    if spare := -group % 4:
        q = F.pad(q, (0, 0, 0, spare))
    scaling = kwargs.get("scaling")
    mask = attention_mask.expand(-1, -1, q.shape[2], -1)
    out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scaling)
    return out[:, :, :group].reshape(rows, 1, heads, width), None


AttentionInterface.register(SLOTS_ATTENTION, _slots_attention)


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    model.eval().requires_grad_(False)
    model.set_attn_implementation(SLOTS_ATTENTION)
    if model.device.type == "cpu":
        cpu.quantize_linears(model)
    return model


def _loops(ids: list[int], span: int = 96, distinct: int = 16) -> bool:
    """True for a text that has begun to go in circles: there is little to learn from its next rounds."""
    return len(ids) >= span and len(set(ids[-span:])) < distinct


def _save(finished: list[dict[str, Any]], layers: list[int], path: Path) -> None:
    texts = [entry["text"] for entry in finished]
    tensors = {name: torch.cat([entry["tensors"][name] for entry in finished]) for name in finished[0]["tensors"]}
    lengths = torch.tensor([0, *(len(text.ids) for text in texts)])
    tensors["offsets"] = lengths.cumsum(0)
    tensors["turns"] = torch.tensor([text.turn for text in texts])
    tensors["answers"] = torch.tensor([text.answer for text in texts])
    tensors["temperatures"] = torch.tensor([text.temperature for text in texts])
    about = {
        "format": FORMAT,
        "tokens": int(lengths.sum()),
        "layers": layers,
        "keys": [text.key for text in texts],
        "categories": [text.category for text in texts],
    }
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"about": json.dumps(about)})
    os.replace(part, path)
