"""The endpoints `/race`, `/advise` and `/prove`, for programs and, with `app.py --mcp`, as tools for agents.

In: a prompt and settings by name. Out: while it runs `{"status": "running", …}`, in the end one object. All three take
the device in turn, in the same queue as the page. A function's signature and docstring are what the API's documentation
and an agent are told of it, which Gradio reads line by line: each argument has one line.
"""

from __future__ import annotations

import json
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from ..errors import SettingsError, UserError, quoted
from ..events import Trace
from ..prove.setup import DRAFTERS, LEVEL, WRONG, setup
from ..request import Request
from ..rules import RULES
from ..session import advise as measuring
from ..session import lab
from ..session.device import Engine
from ..session.feed import Feed
from ..session.stream import run
from ..session.summary import ROUNDS, summary
from ..settings import MAX_NEW_TOKENS, Settings

Endpoint = Callable[..., Iterator[dict[str, Any]]]
DETAILS = ("auto", *ROUNDS, "trace")


def answer(trace: Trace) -> dict[str, Any]:
    """The trace as `/race` returns it: exported, and beside the request its prompt and settings, where traces of format
    version 1 had them."""
    data: dict[str, Any] = json.loads(trace.exported().to_json())
    return {**data, "prompt": data["request"]["prompt"], "settings": data["request"]["settings"]}


def endpoints(engine: Engine) -> dict[str, Endpoint]:
    """The functions behind the endpoints, by name."""
    return {"race": race_endpoint(engine), "advise": advise_endpoint(engine), "prove": prove_endpoint(engine)}


def race_endpoint(engine: Engine) -> Endpoint:
    """The function behind `/race`."""
    usual = min(Settings().max_new_tokens, engine.limits.new_tokens or MAX_NEW_TOKENS)

    def race(
        prompt: str,
        draft_length: str | int = "adaptive",
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
        detail: str = "auto",
        request: gr.Request = None,  # type: ignore[assignment]  # given by Gradio, not a parameter of the API
    ) -> Iterator[dict[str, Any]]:
        """Race a prompt: the server's model answers it once plainly (baseline) and once with speculative decoding.

        Tells how much faster speculative decoding was, with a 95 % interval, whether both texts are the same, and how
        many drafted tokens were accepted. The model is the one that the server has loaded. Takes about as long as the
        model needs to write the text twice, and waits in a queue, for the device runs one thing at a time.

        Args:
            prompt: What the model is asked.
            draft_length: "adaptive", "rate" (from recent acceptance), or a number from 1 to 16: tokens drafted a round.
            temperature: 0 is greedy decoding; up to 5.
            top_p: Keep the most likely tokens up to this probability; 1 keeps all.
            top_k: Keep this many most likely tokens; 0 keeps all.
            max_new_tokens: Each lane ends after so many; a server may have a limit.
            seed: Of the noise that sampling uses.
            rule: "auto", or a verification rule: RULE_NAMES.
            lenience: For lossy rules only, above 0 and up to 1; 1 is exact.
            drafter: A drafter that the server offers; empty takes the pair's own.
            system: A system prompt; empty takes the model's own.
            truncate: Cut a prompt that is too long instead of refusing it.
            thinking: Let the model think first, where its chat template can.
            detail: "summary" (texts, figures, first rounds), "rounds" (up to 100), or "trace" (everything; not by MCP).

        Returns:
            A summary, or where detail is "trace", and by default for programs, the trace of the race: every round.
        """
        by_agent = from_agent(request)
        with one_sentence("The race"):
            if detail not in DETAILS:
                raise SettingsError("detail", f"Unknown detail {quoted(detail)}; choose {', '.join(DETAILS)}.")
            if by_agent and detail == "trace":
                raise SettingsError("detail", "A trace is too long for an agent; ask for the detail summary or rounds.")
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
                    raise UserError(view.problem)
                if view.trace is None:
                    yield {"status": "running", **view.counts}
                elif detail == "trace" or (detail == "auto" and not by_agent):
                    yield answer(view.trace)
                else:
                    yield summary(view.trace.exported(), "rounds" if detail == "rounds" else "summary")

    return told(race, RULE_NAMES=", ".join(RULES))


def advise_endpoint(engine: Engine) -> Endpoint:
    """The function behind `/advise`."""

    def advise(
        prompts: list[str] | str,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 64,
        repeats: int = 3,
        seed: int = 0,
        rule: str = "auto",
        lenience: float = 0.3,
        drafter: str = "",
    ) -> Iterator[dict[str, Any]]:
        """Measure whether speculative decoding pays for these prompts, and which draft length to set.

        Races every prompt with the draft lengths 1, 2, 4, 8 and "adaptive" beside decoding without a drafter, in
        shuffled order, and returns the advisor's sentences with the figures behind each. A draft_length of 0 is the
        advice to decode without a drafter; null says that the measurements cannot tell. Prompts of your own kind make
        the advice yours: three or more are better than one. Measures 5 races a prompt and repeat, about 20 seconds a
        prompt on a small model, SECONDS seconds at most. A server that strangers can reach may have it switched off.

        Args:
            prompts: A prompt, or a list of up to PROMPTS.
            temperature: 0 is greedy decoding; up to 5.
            top_p: Keep the most likely tokens up to this probability; 1 keeps all.
            top_k: Keep this many most likely tokens; 0 keeps all.
            max_new_tokens: Each lane ends after so many; at most NEW_TOKENS.
            repeats: How often every race is run, 1 to REPEATS; a single prompt needs 3 for an interval.
            seed: Of the noise that sampling uses; every repeat has its own.
            rule: "auto", or a verification rule: RULE_NAMES.
            lenience: For lossy rules only, above 0 and up to 1; 1 is exact.
            drafter: A drafter that the server offers; empty takes the pair's own.

        Returns:
            The advice, its sentences, the recommended draft_length, and medians with 95 % intervals by draft length.
        """
        with one_sentence("The measurement"):
            asked = [prompts] if isinstance(prompts, str) else prompts
            if not isinstance(asked, list):
                raise SettingsError("prompts", f"Prompts must be a text or a list of texts, not {quoted(asked)}.")
            settings = Settings(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                rule=rule,
                lenience=lenience,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
            for step in measuring.ask(engine, measuring.Question(tuple(asked), settings, drafter, repeats)):
                if isinstance(step, measuring.Answer):
                    yield step.to_dict()
                else:
                    yield {"status": "running", "races": step.done, "of": step.of}

    limits = {"PROMPTS": measuring.PROMPTS, "NEW_TOKENS": measuring.NEW_TOKENS, "REPEATS": measuring.REPEATS}
    return told(advise, RULE_NAMES=", ".join(RULES), SECONDS=f"{measuring.SECONDS:.0f}", **limits)


def prove_endpoint(engine: Engine) -> Endpoint:
    """The function behind `/prove`."""

    def prove(
        rule: str = "rejection",
        drafter: str = "model",
        draft_length: str | int = 3,
        temperature: float = 1.0,
        texts: int = 5500,
        first_seed: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Test by chi-square whether a verification rule of speculative decoding is exact.

        Decodes many short texts, one for each seed, with the generator that races use, on a tiny target whose
        distribution of texts is known exactly, and compares the counts with it. A rule is refuted where the p-value is
        at most LEVEL, so that 20 such tests are wrong with a probability of 1 % between them. "cannot tell" says that
        there were too few texts to see a bias of 5 %. The rule "wrong" is broken on purpose and is refuted. Takes some
        seconds. A server that strangers can reach may have it switched off.

        Args:
            rule: A verification rule: RULE_NAMES, or "wrong", which is broken on purpose.
            drafter: What drafts: DRAFTER_NAMES. The rule "wrong" has its own.
            draft_length: Tokens drafted a round, 1 to 16, or "adaptive" or "rate".
            temperature: Above 0, up to 5; the greedy rule is tested at 0, whatever is given.
            texts: How many texts, up to MOST; more see a smaller bias.
            first_seed: The first seed; another one makes other texts.

        Returns:
            p_value, degrees_of_freedom, statistic, verdict ("agrees", "refuted" or "cannot tell") and smallest_bias.
        """
        with one_sentence("The test"):
            cold = rule in RULES and not RULES[rule].samples
            wanted = setup(
                rule,
                None if rule == WRONG else drafter,
                0.0 if cold else temperature,
                draft_length=draft_length,
                seeds=texts,
                first=first_seed,
            )
            for test, done in lab.steps(engine, wanted):
                now = test.progress
                yield lab.proved(test) if done else {"status": "running", "texts": now.count, "of": now.of}

    names = {"RULE_NAMES": ", ".join(RULES), "DRAFTER_NAMES": ", ".join(DRAFTERS)}
    return told(prove, **names, LEVEL=f"{LEVEL / lab.FAMILY:g}", MOST=f"{lab.MOST:,}")


def told(function: Endpoint, **words: object) -> Endpoint:
    """The function with these words of its docstring replaced, so that it names what the tables hold."""
    for word, text in words.items():
        function.__doc__ = str(function.__doc__).replace(word, str(text))
    return function


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """What goes wrong inside reaches the caller as one sentence; `what` broke off, where nobody foresaw it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:  # whatever a library throws
        traceback.print_exc(file=sys.stderr)
        said = f"{what} broke off ({type(error).__name__}: {quoted(str(error))})."
        raise gr.Error(said, print_exception=False) from error


def from_agent(request: gr.Request | None) -> bool:
    """Whether Gradio's MCP server made this call: it calls the endpoints over HTTP, and says so in a header."""
    return request is not None and request.headers.get("x-gradio-user") == "mcp"
