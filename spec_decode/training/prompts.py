"""Prompts of the training texts.

In: a chat template. Out: openings of user turns, by category, which the target completes (Magpie, Xu et al. 2024,
arXiv:2406.08464), or whole prompts from a file. Prompts held out for evaluation are recognized.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

# Category: share of the texts, minimum number of tokens of the user turn, openings. The target continues the opening;
# with "" it generates the whole turn.
OPENINGS: dict[str, tuple[float, int, list[str]]] = {
    "chat": (
        0.34,
        4,
        [
            "", "", "", "What is ", "What are ", "How do I ", "How can I ", "How does ", "Why ", "Can you explain ",
            "Explain ", "Explain how ", "Tell me about ", "What's the difference between ", "Give me tips for ",
            "I want to ", "I'm ", "Give me a list of ", "Which ", "Describe ", "Help me ", "Suggest ", "Compare ",
            "What should I ", "List the ", "Hi! ", "Who was ", "When did ", "Is it ", "Plan a ",
        ],
    ),
    "code": (
        0.22,
        6,
        [
            "Write a Python function that ", "Write a function to ", "Write a Python program that ",
            "Write a Python class ", "Write a JavaScript function that ", "Write an SQL query that ",
            "Write a C program to ", "Write a bash script that ", "Implement ", "How do I use Python to ",
            "Fix the bug in this Python code:\n\n", "Explain what this code does:\n\n```python\n",
            "Add a docstring to this Python function:\n\n", "Rewrite this function so that ", "Write HTML for ",
            "Write unit tests for this function:\n\ndef ", "Add a method to this Python class:\n\nclass ",
            "Write a Java method that ", "Convert this Python code to JavaScript:\n\n", "Write a regular expression ",
        ],
    ),
    "summarize": (
        0.22,
        70,
        [
            "Summarize this text:\n\n", "Summarize the following text in two sentences:\n\n",
            "Summarize this article in three bullet points:\n\n", "Summarize this paragraph in one sentence:\n\n",
            "What is the main idea of this text?\n\n", "Summarize the following passage for a child:\n\n",
            "Give me a short summary of this report:\n\n", "Summarize this email:\n\nHi ",
            "List the key points of this text:\n\n", "Write a headline and a one-line summary:\n\n",
            "Summarize this story:\n\nOnce ", "Summarize this meeting:\n\n", "TL;DR of this, please:\n\nThe ",
        ],
    ),
    "rewrite": (
        0.14,
        30,
        [
            "Rewrite this text in simpler words:\n\n", "Correct the spelling and grammar:\n\n",
            "Rewrite this email to be more formal:\n\nHey ", "Turn this text into a list:\n\n",
            "Turn these lines into JSON:\n\n", "Rewrite this list with one sentence for each item:\n\n- ",
            "Translate this text into French:\n\n", "Paraphrase this paragraph:\n\n", "Make this text shorter:\n\n",
            "Turn this into a table:\n\n", "Extract all names and dates from this text:\n\n",
        ],
    ),
    "creative": (
        0.08,
        5,
        [
            "Write a short story about ", "Write a poem about ", "Write a letter to ",
            "Write a product description for ",
            "Write a dialogue between ", "Write a blog post about ", "Write a song about ", "Invent ",
        ],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Opening:
    """The start of a text: ids of the user turn so far, and the minimum length of the turn in tokens, before which the
    target may not end it; `None` if the turn is complete."""

    category: str
    ids: list[int]
    at_least: int | None


@dataclass(frozen=True)
class Turns:
    """A chat template as ids: the tokens before the user's text, and the tokens between it and the answer."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Turns:
        """Raises UserError if the tokenizer has no chat template, or one that changes the user's text."""
        mark = "\x02"
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("The target's tokenizer has no chat template; training a drafter needs one.")
        turn = [{"role": "user", "content": mark}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        if text.count(mark) != 1:
            raise UserError("The target's chat template changes the user's text; a drafter cannot be trained for it.")
        before, after = text.split(mark)
        return cls(*(list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after)))


def invented(tokenizer: Any, rng: random.Random) -> Iterator[Opening]:
    """An endless stream of openings, drawn with the shares of `OPENINGS`."""
    names = list(OPENINGS)
    shares = [OPENINGS[name][0] for name in names]
    while True:
        name = rng.choices(names, shares)[0]
        _, least, openings = OPENINGS[name]
        # The target's next token usually begins with the space.
        ids = list(tokenizer(rng.choice(openings).rstrip(" "), add_special_tokens=False)["input_ids"])
        yield Opening(name, ids, least)


def given(tokenizer: Any, file: Path, rng: random.Random) -> Iterator[Opening]:
    """An endless stream of the prompts of a JSON Lines file of {"prompt", "category"?}, shuffled for every pass.

    Raises:
        UserError: the file has no such lines.
    """
    prompts = read(file)
    while True:
        rng.shuffle(prompts)
        for entry in prompts:
            ids = list(tokenizer(entry["prompt"], add_special_tokens=False)["input_ids"])
            yield Opening(str(entry.get("category", "other")), ids, None)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file of {"prompt", …}. Raises UserError if there are none."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON Lines: {error}") from error
    if not lines or not all(isinstance(line, dict) and isinstance(line.get("prompt"), str) for line in lines):
        raise UserError(f'{file} must hold one {{"prompt": "…"}} a line.')
    return lines


class HeldOut:
    """The prompts that no training text may contain; `text in held_out` is true for a text that contains one."""

    RUN = 8  # a text with so many words in a row in common with a prompt contains it

    def __init__(self, prompts: Iterable[str]) -> None:
        texts = [_words(prompt) for prompt in prompts]
        self.whole = {tuple(words) for words in texts}
        self.runs = {tuple(words[i : i + self.RUN]) for words in texts for i in range(len(words) - self.RUN + 1)}

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        return tuple(words) in self.whole or any(
            tuple(words[i : i + self.RUN]) in self.runs for i in range(len(words) - self.RUN + 1)
        )


def fingerprint(text: str) -> str:
    """Equal for prompts that differ in case, spacing and punctuation only."""
    return " ".join(_words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
