"""A visitor's list of prompts, as text from the page, and how long it may be.

In: text, one prompt a line or JSON Lines. Out: prompts as {"id", "category", "prompt"}, as the benchmark has them.
"""

from __future__ import annotations

import json

from ..errors import PromptError, UserError
from ..request import Request

MOST_PROMPTS = 50
MOST_BYTES = 65_536  # of a list
MOST_PROMPT_TOKENS = 1_024  # of each prompt

Prompt = dict[str, str]


def read_prompts(text: str) -> list[Prompt]:
    """The prompts of a list: one a line, or JSON Lines of {"id", "category", "prompt"}, where "id" and "category" may
    be missing. Empty lines count for nothing.

    Raises:
        PromptError: in one sentence: there are none or too many, or a line is no prompt.
    """
    if not isinstance(text, str):
        raise PromptError("The list of prompts must be text.")
    size = len(text.encode(errors="replace"))
    if size > MOST_BYTES:
        raise PromptError(f"The list has {size:,} bytes; at most {MOST_BYTES:,} are read.")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise PromptError("Write a prompt first, one a line, or read a file.")
    if len(lines) > MOST_PROMPTS:
        raise PromptError(f"The list has {len(lines):,} prompts; at most {MOST_PROMPTS} are measured.")
    as_json = lines[0][1].startswith("{")
    found = [_prompt(number, line, as_json) for number, line in lines]
    names = [prompt["id"] for prompt in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PromptError(f"Two prompts have the id “{twice}”; give each its own.")
    return found


def _prompt(number: int, line: str, as_json: bool) -> Prompt:
    if not as_json:
        return {"id": f"line {number}", "category": "prompts", "prompt": Request(line).prompt}
    try:
        data = json.loads(line)
        prompt = data["prompt"]
        found = {"id": str(data.get("id", f"line {number}")), "category": str(data.get("category", "prompts"))}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise PromptError(f'Line {number} is no JSON object with a "prompt", as the first line is.') from None
    try:
        Request(prompt)
        Request(found["id"] + found["category"])
    except UserError as error:
        raise PromptError(f"Line {number}: {error}") from None
    return {**{name: value[:80] for name, value in found.items()}, "prompt": prompt}
