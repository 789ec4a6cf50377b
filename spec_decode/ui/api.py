"""The endpoint `/race`: a race for programs, over the same device and queue as the page's.

In: a prompt and settings by name. Out: while it runs `{"status": "running", …}`, in the end the exported trace, which
`Trace.from_json(json.dumps(trace))` reads.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ..errors import UserError
from ..events import Trace
from ..request import Request
from ..session.device import Engine
from ..session.feed import Feed
from ..session.stream import run
from ..settings import MAX_NEW_TOKENS, Settings

Endpoint = Callable[..., Iterator[dict[str, Any]]]


def answer(trace: Trace) -> dict[str, Any]:
    """The trace as `/race` returns it: exported, and beside the request its prompt and settings, where traces of format
    version 1 had them."""
    data: dict[str, Any] = json.loads(trace.exported().to_json())
    return {**data, "prompt": data["request"]["prompt"], "settings": data["request"]["settings"]}


def race_endpoint(engine: Engine) -> Endpoint:
    """The function behind `/race`; its signature and docstring are the API's documentation."""
    usual = min(Settings().max_new_tokens, engine.limits.new_tokens or MAX_NEW_TOKENS)

    def race(
        prompt: str,
        draft_length: str = "adaptive",
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = usual,
        seed: int = 0,
        rule: str = "auto",
        lenience: float = 0.3,
        drafter: str = "",
        system: str = "",
        truncate: bool = False,
        thinking: bool = False,
        request: gr.Request = None,  # type: ignore[assignment]  # given by Gradio, not a parameter of the API
    ) -> Iterator[dict[str, Any]]:
        """Race a prompt through the baseline and the speculative lane, and return the trace.

        Args:
            prompt: what the model is asked.
            draft_length: "adaptive", "rate" (from recent acceptance), or a number from 1 to 16.
            temperature: 0 is greedy decoding; up to 5.
            top_p: keep the most likely tokens up to this probability; 1 keeps all.
            top_k: keep this many most likely tokens; 0 keeps all.
            max_new_tokens: each lane ends after so many; a server may have a limit.
            seed: of the noise that sampling uses.
            rule: "auto", or a rule by its name (`rules.RULES`).
            lenience: for lossy rules only, above 0 and up to 1; 1 is exact.
            drafter: a drafter the page offers; empty takes the pair's own.
            system: a system prompt; empty takes the model's own.
            truncate: cut a prompt that is too long instead of refusing it.
            thinking: let the model think first, where its chat template can.

        Returns:
            The trace of the finished race: request, pair, settings, machine, prompt, rounds with every token, and how
            each lane ended ("time" where a limit of the server ended it). A system prompt is left out of it. Updates
            before it hold only {"status": "running", "baseline": tokens, "speculative": tokens}.
        """
        try:
            settings = Settings(
                draft_length=draft_length,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                rule=rule,
                lenience=lenience,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
            wanted = Request(
                prompt,
                settings,
                system=system or None,
                drafter=drafter or None,
                truncate=bool(truncate),
                thinking=bool(thinking),
            )
            visitor = f"{request.session_hash if request else ''}/{uuid.uuid4().hex}"
            for view in run(engine, visitor, wanted, Feed(), draw=False):
                if view.problem:
                    raise gr.Error(view.problem, print_exception=False)
                if view.trace:
                    yield answer(view.trace)
                else:
                    yield {"status": "running", **view.counts}
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return race
