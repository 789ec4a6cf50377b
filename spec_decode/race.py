"""A race: two lanes on one device, advanced fairly and watched.

In: a loaded pair, a prompt, settings. Out: an iterator of rounds of both lanes, and the trace of what happened. Two
lanes at once would steal from each other, so each owns a clock that counts only its own busy time, and the lane whose
clock is behind always goes next.
"""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from . import decode
from .draft_length import controller
from .errors import OutOfMemory, PromptError, is_out_of_memory
from .events import BASELINE, SPECULATIVE, Round, Trace
from .settings import Settings
from .text import TextStream, check_prompt, encode_chat

if TYPE_CHECKING:
    from .models import Pair


class Race:
    """One prompt through both lanes. Iterate over it once.

    Args:
        truncate: cut a prompt that is too long, keeping its beginning, instead of refusing it.
        thinking: let the target think first.

    Raises:
        UserError: `thinking` is asked of a target whose chat template has no switch for it.
        PromptError: the prompt is empty, or longer than the context leaves room for beside `max_new_tokens`.
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
        self._stopped = threading.Event()
        self._lanes: dict[str, Iterator[Round]] = {}

    def __iter__(self) -> Iterator[Round]:
        """Rounds as they happen.

        Raises:
            OutOfMemory: the device ran out; both lanes have ended and their memory is free.
            UserError: the model produced something that cannot be sampled from.
        """
        pair, settings = self.pair, self.settings
        text = [TextStream(pair.tokenizer, self.ids) for _ in range(2)]
        lengths = controller(settings, pair.costs)
        self._lanes = {
            BASELINE: decode.baseline(pair.target, self.ids, text[0], settings),
            SPECULATIVE: decode.speculative(pair.target, pair.drafter, lengths, self.ids, text[1], settings),
        }
        clocks = {BASELINE: 0.0, SPECULATIVE: 0.0}
        try:
            while clocks and not self._stopped.is_set():
                lane = min(clocks, key=lambda name: clocks[name])
                done = next(self._lanes[lane], None)
                if done is None:
                    del clocks[lane]
                    self.finish[lane] = "length" if self._emitted(lane) >= settings.max_new_tokens else "stop"
                    continue
                clocks[lane] = done.clock
                self.rounds.append(done)
                yield done
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

    def stop(self) -> None:
        """Ends the race after the round under way; may be called from any thread."""
        self._stopped.set()

    def close(self) -> None:
        """Ends both lanes and frees their memory. Not while another thread is iterating: use `stop` there."""
        self._stopped.set()
        lanes, self._lanes = self._lanes, {}
        for generator in lanes.values():
            generator.close()  # type: ignore[attr-defined]
        self.finish = {lane: "cancelled" if why == "running" else why for lane, why in self.finish.items()}
        if lanes and self.pair.target.device.type == "cuda":
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
            costs=pair.costs,
        )

    def _emitted(self, lane: str) -> int:
        return sum(len(r.emitted) for r in self.rounds if r.lane == lane)


def _fit(pair: Pair, prompt: str, settings: Settings, system: str | None, truncate: bool, thinking: bool) -> list[int]:
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
