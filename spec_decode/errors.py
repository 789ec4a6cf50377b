"""Errors that the user can correct. Each carries one sentence, and no traceback is shown."""

from __future__ import annotations

from reprlib import Repr

SHOWN = 80  # characters of a value that a message repeats


def quoted(value: object) -> str:
    """A value as a message may repeat it: at most `SHOWN` characters, however long or deep it is."""
    text = _shortener.repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


_shortener = Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = SHOWN


class UserError(Exception):
    """Something asked for cannot be done; the message is one sentence that says what and what to do."""


class SettingsError(UserError, ValueError):
    """A setting that cannot be used. `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class PromptError(UserError, ValueError):
    """An empty prompt (`tokens` 0), or one of `tokens` tokens where only `limit` fit beside the output."""

    def __init__(self, message: str, tokens: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class ModelError(UserError):
    """A model, tokenizer or drafter that cannot be found, fetched, loaded or paired."""


class OutOfMemory(UserError):
    """The device ran out of memory; what was running has ended and its memory is free again."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library says with `error` that memory ran out: PyTorch has a class for it on accelerators, and only
    words on the CPU and where CUDA itself or cuBLAS was refused."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    return any(words in said for words in ("out of memory", "not enough memory", "allocate memory", "alloc_failed"))
