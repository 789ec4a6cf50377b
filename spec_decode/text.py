"""Text in and out: a conversation to token ids, and ids back to text as they arrive.

In: a transformers tokenizer. Out: ids of a chat prompt; pieces of text of which a character that is split over several
tokens appears once, whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from jinja2 import TemplateError

from .errors import UserError

_INCOMPLETE = "�"


def encode_chat(
    tokenizer: Any,
    prompt: str,
    system: str | None = None,
    thinking: bool = False,
    history: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Token ids of a user turn under the tokenizer's chat template, or of the bare texts where it has none.

    Args:
        history: the turns before it, each what the user asked and what was answered.

    Raises:
        UserError: `thinking` is asked of a template that has no switch for it, or the template does not take the
            conversation; some take no system prompt.
    """
    if thinking:
        require_thinking(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        texts = [system] if system else []
        return list(tokenizer("\n\n".join([*texts, *chain.from_iterable(history), prompt]))["input_ids"])
    turns = [{"role": "system", "content": system}] if system else []
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    turns.append({"role": "user", "content": prompt})
    # Passed either way where there is a switch: some templates enable thinking by default.
    switch = {"enable_thinking": thinking} if can_think(tokenizer) else {}
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **switch)
    except TemplateError as error:
        why = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"The chat template of this target does not take this conversation: {why}.") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def can_think(tokenizer: Any) -> bool:
    """Whether the chat template has a switch for thinking."""
    return "enable_thinking" in str(getattr(tokenizer, "chat_template", None))


def require_thinking(tokenizer: Any) -> None:
    """Raises UserError where the chat template has no switch for thinking."""
    if not can_think(tokenizer):
        raise UserError("The chat template of this target has no thinking mode; leave --thinking out.")


class TextStream:
    """Incremental detokenization.

    Decodes a short window of tokens at a time: some before the new one for context (a leading space may depend on
    it), and as many after as it takes to complete a character.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.window = list(prompt[-4:])
        self.shown = self._decode(self.window)

    def push(self, token: int) -> str:
        """What `token` adds to the text; empty while it leaves a character incomplete."""
        self.window.append(token)
        text = self._decode(self.window)
        if text.endswith(_INCOMPLETE) and len(self.window) < 16:
            return ""
        new = text[len(self.shown) :]
        self.window = self.window[-4:]
        self.shown = self._decode(self.window)
        if self.shown.startswith(_INCOMPLETE) and not text.startswith(_INCOMPLETE):
            # The window must not begin inside a character.
            self.window, self.shown = [token], self._decode([token])
        return new

    def fork(self) -> TextStream:
        """A copy that can run ahead through a rejected draft."""
        twin = object.__new__(TextStream)
        twin.tokenizer, twin.window, twin.shown = self.tokenizer, list(self.window), self.shown
        return twin

    def flush(self) -> str:
        """What is left when the text ends inside a character."""
        text = self._decode(self.window)
        new, self.shown = text[len(self.shown) :], text
        return new

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
