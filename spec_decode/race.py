"""A race: two lanes on one device, advanced fairly and watched.

In: a loaded pair, a prompt, settings. Out: an iterator of rounds of both lanes, and the trace of what happened. Two
lanes at once would steal from each other, so each owns a clock that counts only its own busy time, and the lane whose
clock is behind always goes next. The prompt is read once, for both.
"""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from . import decode
from .costs import learned
from .decode import Prefill
from .draft_length import controller
from .errors import OutOfMemory, PromptError, is_out_of_memory
from .events import BASELINE, SPECULATIVE, Reading, Round, Trace
from .settings import Settings
from .text import TextStream, check_prompt, encode_chat, require_text

if TYPE_CHECKING:
    from .models import Pair


class Race:
    """One prompt through both lanes. Iterate over it once.

    Args:
        truncate: cut a prompt that is too long, keeping its beginning, instead of refusing it.
        thinking: let the target think first.

    Raises:
        UserError: `thinking` is asked of a target whose chat template has no switch for it.
        PromptError: the prompt is empty or no text, or longer than the context leaves room for beside
            `max_new_tokens`.
    """

    def __init__(
        self,
        pair: Pair,
        prompt: str,
        settings: Settings,
        system: str | None = None,
        truncate: bool = False,
        thinking: bool = False,
    ) -> None:
        self.pair = pair
        self.prompt = prompt
        self.settings = settings
        self.ids = _fit(pair, prompt, settings, system, truncate, thinking)
        self.rounds: list[Round] = []
        self.finish: dict[str, str] = {BASELINE: "running", SPECULATIVE: "running"}
        self.costs = pair.learned or pair.costs  # what the race begins from
        self._stopped = threading.Event()
        self._why = "cancelled"
        self._prefill: Prefill | None = None
        self._lanes: dict[str, decode.Lane] = {}

    def __iter__(self) -> Iterator[Round]:
        """Rounds as they happen; raises as `steps`."""
        return (step for step in self.steps() if isinstance(step, Round))

    def steps(self) -> Iterator[Round | Reading]:
        """Rounds as they happen, and before the first of a lane how far a long prompt has been read.

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
                if done is None:
                    del clocks[lane]
                    emitted = self._emitted(lane)
                    self.finish[lane] = "length" if emitted >= self.settings.max_new_tokens else "stop"
                    continue
                if isinstance(done, Round):
                    clocks[lane] = done.clock
                    self.rounds.append(done)
                yield done
            self._teach()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what the pass had computed
            self.close()
            raise OutOfMemory(
                "The device ran out of memory; try a shorter prompt, fewer new tokens or a smaller pair."
            ) from error
        finally:
            self.close()

    def _begin(self) -> Iterator[Reading]:
        """Reads the prompt and sets up both lanes behind it, unless the race is stopped before."""
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
        text = [TextStream(pair.tokenizer, ids) for _ in range(2)]
        self._lanes = decode.lanes(prefill, pair.drafter, controller(settings, self.costs), text, settings)

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
        return Trace(
            pair=dict(pair.info),
            settings=self.settings.to_dict(),
            machine=pair.machine,
            prompt=self.prompt,
            prompt_tokens=len(self.ids),
            rounds=tuple(self.rounds),
            finish=dict(self.finish),
            costs=self.costs,
        )

    def _teach(self) -> None:
        """Leaves the pair what this race learned of its costs, for the next race's controller to begin with.

        Seconds of rounds depend on what was drafted, and so on this race's noise. The next race may have the same seed,
        and under a rule that draws independently its draft lengths must not know of noise still to be used. So only
        races under other rules teach: greedy uses no noise, and coupled a stream of its own (`sampling.TARGET`), which
        rules that draw independently never read; its own output does not depend on draft lengths at all.
        """
        if self.costs and self.settings.same_text:
            monotone = self.pair.target.device.type == "cpu"
            self.pair.learned = learned(self.costs, self.rounds, monotone)

    def _emitted(self, lane: str) -> int:
        return sum(len(r.emitted) for r in self.rounds if r.lane == lane)


def _fit(pair: Pair, prompt: str, settings: Settings, system: str | None, truncate: bool, thinking: bool) -> list[int]:
    require_text("prompt", prompt)
    if system is not None:
        require_text("system prompt", system)
    check_prompt(prompt)
    ids = encode_chat(pair.tokenizer, prompt, system, thinking)
    if max(ids, default=0) >= pair.target.vocabulary:
        raise PromptError(
            f"The tokenizer makes token {max(ids)} of this prompt, and the target knows {pair.target.vocabulary:,} "
            "tokens; it belongs to another model."
        )
    limit = pair.context - settings.max_new_tokens
    if len(ids) <= limit:
        return ids
    if not truncate or limit < 1:
        raise PromptError(
            f"The prompt is {len(ids):,} tokens long and {max(limit, 0):,} fit beside {settings.max_new_tokens:,} new "
            f"tokens in a context of {pair.context:,}; shorten it, let it be truncated, or ask for fewer new tokens.",
            tokens=len(ids),
            limit=max(limit, 0),
        )
    words = pair.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    keep = len(words) - (len(ids) - limit)
    while keep > 0:
        # Cutting the text rather than the ids keeps the template's closing turn in place.
        cut = encode_chat(pair.tokenizer, pair.tokenizer.decode(words[:keep]), system, thinking)
        if len(cut) <= limit:
            return cut
        keep -= max(1, len(cut) - limit)
    raise PromptError("The system prompt alone fills the context; shorten it.", tokens=len(ids), limit=limit)
