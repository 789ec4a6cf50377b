"""Longer prompts: a text of our own before the question, as long as a context asks for.

In: a prompt, a number of tokens, and a function that counts tokens. Out: the prompt with as many words of
`assets/background.txt` before it as bring it closest to that number without passing it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

from ..errors import UserError
from ..paths import ASSETS

FILE = ASSETS / "background.txt"
LINK = "\n\nThat was background. Now a question of its own:\n\n"


def extended(prompt: str, tokens: int, count: Callable[[str], int]) -> str:
    """The prompt after a text that brings it to `tokens` tokens, or a few less.

    Args:
        count: tokens of a prompt, its chat template included; grows with the text.

    Raises:
        UserError: the prompt is longer already, or there is not enough text.
    """
    words = _words()

    def text(number: int) -> str:
        return f"{''.join(words[:number])}{LINK}{prompt}"

    bare = count(text(1))
    if bare > tokens:
        raise UserError(f"A prompt has {bare:,} tokens with one word before it; a context of {tokens:,} is too short.")
    if count(text(len(words))) < tokens:
        raise UserError(f"The text that prompts are extended with is too short for a context of {tokens:,} tokens.")
    low, high = 1, len(words)  # text(low) fits, text(high) does not or is exact
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(text(middle)) <= tokens else (low, middle)
    return text(high if count(text(high)) == tokens else low)


@cache
def _words() -> tuple[str, ...]:
    """The text word by word, each with the white space before it."""
    text = FILE.read_text(encoding="utf-8").strip()
    places = [0, *(i for i in range(1, len(text)) if text[i].isspace() and not text[i - 1].isspace()), len(text)]
    return tuple(text[a:b] for a, b in pairwise(places))
