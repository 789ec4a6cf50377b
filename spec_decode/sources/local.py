"""The local source: a loaded pair, and races of its two lanes on one device.

In: a pair and requests. Out: an iterator of rounds of both lanes, and the trace of what happened. Two lanes that ran at
once would compete for the device, so each has a clock that counts only its own busy time, and the lane with the smaller
clock always goes next. The prompt is read once, for both.
"""

from __future__ import annotations

import gc
import platform
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .. import __version__, decode
from ..costs import learned
from ..decode import Prefill
from ..draft_length import RECORDED, controller
from ..drafters.person import PersonDrafter
from ..errors import OutOfMemory, PromptError, is_out_of_memory
from ..events import BASELINE, SPECULATIVE, Note, Promises, Reading, Round, Token, Trace
from ..request import Request
from ..text import TextStream, encode_chat
from . import chosen_drafter

if TYPE_CHECKING:
    from ..loading.pair import Pair


class LocalSource:
    """Races a pair on this machine.

    Args:
        own: the name by which the pair's drafter was loaded, None for the target's own.
        drafters: names of others that a request may choose.
    """

    promises = Promises()
    recording = None
    can_branch = True

    def __init__(self, pair: Pair, own: str | None = None, drafters: tuple[str, ...] = ()) -> None:
        self.pair = pair
        self._own = own
        self._in_use = str(pair.info["drafter"])
        self.drafters = tuple(dict.fromkeys((self._in_use, *drafters)))

    @property
    def info(self) -> dict[str, Any]:
        return dict(self.pair.info)

    @property
    def can_think(self) -> bool:
        return self.pair.can_think

    def race(self, request: Request) -> Race:
        """A race of this request, with its drafter loaded.

        Raises:
            ModelError: the drafter is not among `drafters`, or cannot be loaded.
            PromptError, SettingsError, UserError: as `Race`.
        """
        wanted = chosen_drafter(request, self.drafters)
        if wanted != self._in_use:
            self.pair.use_drafter(self._own if wanted == self.drafters[0] else wanted)
            self._in_use = wanted
        return Race(self.pair, request)


class Race:
    """One request through both lanes of a pair. Iterate over it once.

    Attributes:
        ids: the tokens that are read before the first new one: the prompt's, and those of a forced prefix.
        drafted: the tokens that a person drafts.

    Raises:
        UserError: thinking is asked of a target whose chat template has no switch for it.
        PromptError: the prompt is longer than the context leaves room for beside `max_new_tokens`, or a forced prefix
            or a person's draft holds a token that the target does not know, or a forced prefix one that ends the text.
    """

    def __init__(self, pair: Pair, request: Request) -> None:
        self.pair = pair
        self.request = request
        self.settings = request.settings
        prefix = _tokens(pair, "forced prefix", request.prefix or ())
        if last := [token for token in prefix if token in pair.target.eos]:
            raise PromptError(f"The forced prefix holds token {last[0]}, with which the text ends: nothing follows it.")
        self.drafted = _tokens(pair, "person's draft", request.draft)
        self.ids = _fit(pair, request, len(prefix)) + prefix
        self.date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.rounds: list[Round] = []
        self.notes: list[Note] = []
        self.finish: dict[str, str] = {BASELINE: "running", SPECULATIVE: "running"}
        self.costs = pair.learned or pair.costs  # what the race begins from
        self._prefix = prefix
        self._given: tuple[Token, ...] = ()  # the prefix as it is shown
        self._pieces: dict[int, str] = {}
        self._stopped = threading.Event()
        self._why = "cancelled"
        self._prefill: Prefill | None = None
        self._lanes: dict[str, decode.Steps] = {}

    def __iter__(self) -> Iterator[Round]:
        """Rounds as they happen; raises as `steps`."""
        return (step for step in self.steps() if isinstance(step, Round))

    def steps(self) -> Iterator[Round | Reading | Note]:
        """Rounds as they happen, before the first of a lane how far a long prompt has been read, and what is said of
        recordings.

        Raises:
            OutOfMemory: the device ran out; both lanes have ended and their memory is free.
            UserError: the model produced something that cannot be sampled from.
        """
        clocks = {BASELINE: 0.0, SPECULATIVE: 0.0}
        try:
            yield from self._begin()
            while clocks and not self._stopped.is_set():
                lane = min(clocks, key=lambda name: clocks[name])
                done = next(self._lanes[lane], None)
                yield from self._said()
                if done is None:
                    del clocks[lane]
                    emitted = self._emitted(lane)
                    self.finish[lane] = "length" if emitted >= self.settings.max_new_tokens else "stop"
                    continue
                if isinstance(done, Round):
                    if done.index == 0 and self._given:
                        done = replace(done, tokens=(*self._given, *done.tokens))
                    clocks[lane] = done.clock
                    self.rounds.append(done)
                yield done
            self._update_costs()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the pass
            self.close()
            raise OutOfMemory(
                "The device ran out of memory; try a shorter prompt, fewer new tokens or a smaller pair."
            ) from error
        finally:
            self.close()

    def _begin(self) -> Iterator[Reading | Note]:
        """Reads the prompt and sets up both lanes after it, unless the race is stopped before."""
        pair, ids, settings = self.pair, self.ids, self.settings
        if self._stopped.is_set():
            return
        self.costs = pair.learned or pair.costs
        prefill = Prefill(pair.target, ids, len(ids) + settings.max_new_tokens, pair.drafter.needs_hidden)
        self._prefill = prefill
        for reading in prefill:
            yield reading
            if self._stopped.is_set():
                return
        text = TextStream(pair.tokenizer, ids[: len(ids) - len(self._prefix)])
        self._given = tuple(Token(token, text.push(token), "prompt") for token in self._prefix)
        texts, recorders = [text.fork(), text], dict(getattr(pair, "recorders", None) or {})
        drafter = pair.drafter
        if self.drafted:
            drafter = PersonDrafter(self.drafted, drafter)
            recorders.pop(SPECULATIVE, None)  # rounds of lengths that come once
        refused = {lane: recorder.refused for lane, recorder in recorders.items() if recorder.refused}
        lengths = controller(
            settings, self.costs, RECORDED if SPECULATIVE in recorders.keys() - refused.keys() else None
        )
        self._lanes = decode.lanes(prefill, drafter, lengths, texts, settings, recorders)
        yield from self._said([Note(lane, f"Rounds are not recorded: {why}", True) for lane, why in refused.items()])

    def _said(self, before: Sequence[Note] = ()) -> Iterator[Note]:
        """What the pair's recorders have said since the last call."""
        taken = getattr(self.pair, "take_notes", None)
        for note in (*before, *(taken() if taken else ())):
            self.notes.append(note)
            yield note

    def stop(self, why: str = "cancelled") -> None:
        """Ends the race after the round under way, or the chunk of the prompt; may be called from any thread. `why`
        stands in `finish` for lanes that had not ended."""
        if not self._stopped.is_set():
            self._why = why
        self._stopped.set()

    def close(self) -> None:
        """Ends both lanes and frees their memory. Not while another thread is iterating: use `stop` there."""
        self._stopped.set()
        lanes, self._lanes = self._lanes, {}
        prefill, self._prefill = self._prefill, None
        for generator in lanes.values():
            generator.close()
        self.finish = {lane: self._why if why == "running" else why for lane, why in self.finish.items()}
        if prefill is None:
            return
        prefill.free()
        lanes.clear()  # a lane that never began holds its cache until now
        if self.pair.target.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    @property
    def trace(self) -> Trace:
        """The race so far."""
        pair = self.pair
        revisions = getattr(pair, "revisions", None)
        return Trace(
            request=self.request.to_dict(),
            pair={**pair.info, "revisions": revisions} if revisions else dict(pair.info),
            machine=pair.machine,
            prompt_tokens=len(self.ids),
            rounds=tuple(self.rounds),
            finish=dict(self.finish),
            costs=self.costs,
            versions=_versions(),
            date=self.date,
            promises=Promises(exact=False, same_text=False) if self.settings.synthetic else LocalSource.promises,
            pieces=self.pieces(self.rounds),
            notes=tuple(map(str, self.notes)),
        )

    def pieces(self, rounds: Iterable[Round]) -> dict[str, str]:
        """The text of every token that occurs as an alternative in these rounds, by its id."""
        ids: set[int] = set().union(*(r.alternatives for r in rounds))
        for token in ids - self._pieces.keys():
            self._pieces[token] = str(self.pair.tokenizer.decode([token]))
        return {str(token): self._pieces[token] for token in sorted(ids)}

    def _update_costs(self) -> None:
        """Updates the pair's costs with the rounds of this race, for the controller of the next race to begin with.

        Seconds of rounds depend on what was drafted, and so on this race's noise. The next race may have the same seed,
        and under a rule that draws independently its draft lengths must not depend on noise that is still to be used.
        So only races under other rules update them: greedy uses no noise, and coupled a stream of its own
        (`noise.TARGET`), which rules that draw independently never read; its own output does not depend on draft
        lengths at all.
        """
        if self.costs and self.settings.same_text:
            monotone = self.pair.target.device.type == "cpu"
            self.pair.learned = learned(self.costs, self.rounds, monotone, self.pair.drafter.measured.name)

    def _emitted(self, lane: str) -> int:
        return sum(len(r.emitted) for r in self.rounds if r.lane == lane)


def _versions() -> dict[str, str]:
    return {
        "spec_decode": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def _tokens(pair: Pair, name: str, given: str | tuple[int | str, ...]) -> list[int]:
    """The token ids of a text, or of ids with texts among them; each text is tokenized by itself. `name` says what it
    is."""
    ids: list[int] = []
    for part in (given,) if isinstance(given, str) else given:
        ids += [part] if isinstance(part, int) else pair.tokenizer(part, add_special_tokens=False)["input_ids"]
    last, known = max(ids, default=0), pair.target.vocabulary
    if last >= known:
        raise PromptError(f"The {name} holds token {last}, and the target knows {known:,} tokens.")
    return ids


def _fit(pair: Pair, request: Request, beside: int) -> list[int]:
    """The token ids of the prompt, which leave room for `beside` more and the new tokens."""
    prompt, system, thinking, new = request.prompt, request.system, request.thinking, request.settings.max_new_tokens
    ids = encode_chat(pair.tokenizer, prompt, system, thinking, request.history)
    if max(ids, default=0) >= pair.target.vocabulary:
        raise PromptError(
            f"The tokenizer makes token {max(ids)} of this prompt, and the target knows {pair.target.vocabulary:,} "
            "tokens; it belongs to another model."
        )
    limit = pair.context - new - beside
    if len(ids) <= limit:
        return ids
    if not request.truncate or limit < 1:
        taken = f"{new:,} new tokens" + (f" and a forced prefix of {beside:,}" if beside else "")
        raise PromptError(
            f"The prompt is {len(ids):,} tokens long and {max(limit, 0):,} fit beside {taken} in a context of "
            f"{pair.context:,}; shorten it, let it be truncated, or ask for fewer new tokens.",
            tokens=len(ids),
            limit=max(limit, 0),
        )
    words = pair.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    keep = len(words) - (len(ids) - limit)
    while keep > 0:
        # Cutting the text rather than the ids keeps the template's closing turn in place.
        cut = encode_chat(pair.tokenizer, pair.tokenizer.decode(words[:keep]), system, thinking, request.history)
        if len(cut) <= limit:
            return cut
        keep -= max(1, len(cut) - limit)
    raise PromptError("The system prompt alone fills the context; shorten it.", tokens=len(ids), limit=limit)
