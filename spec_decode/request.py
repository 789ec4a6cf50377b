"""What is to be raced: `Request`, validated once, here.

In: values from a form, a command line, a call of the API or JSON. Out: a frozen `Request` that every source may trust,
or an error of one sentence. What only a model can tell (whether a prompt fits, whether a drafter exists) is left to
the source. Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import PromptError, SettingsError, quoted
from .settings import MAX_NEW_TOKENS, Settings

MAX_CHARACTERS = 4_000_000  # of a text; the longest context that is known holds fewer
MAX_NAME = 4096  # characters of a drafter's name, which may be a path
MAX_TOKEN = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to race it.

    prompt: what the model is asked.
    settings: of sampling and speculation.
    system: the system prompt; None takes the model's own. An empty one counts as None.
    drafter: one of `Source.drafters`; None takes the source's own. An empty name counts as None.
    truncate: cut a prompt that is too long, keeping its beginning, instead of refusing it.
    thinking: let the target think first, where its chat template has a switch for it.
    prefix: what the output begins with in both lanes, as text, or as token ids with texts among them; None forces
        nothing.
    history: the turns of the conversation before the prompt, each what was asked and what was answered.
    draft: what a person drafts from the first token of the output on, as token ids with texts among them. It is drafted
        `settings.draft_length` tokens a round, each at its place in the output; after its last token the drafter
        drafts.

    Raises:
        PromptError: a text is no text, empty where there must be one, or too long.
        SettingsError: another value is of the wrong kind; `field` names it.
    """

    prompt: str
    settings: Settings = field(default_factory=Settings)
    system: str | None = None
    drafter: str | None = None
    truncate: bool = False
    thinking: bool = False
    prefix: str | tuple[int | str, ...] | None = None
    draft: tuple[int | str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _require_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise PromptError("The prompt is empty; type something for the model to answer.")
        if not isinstance(self.settings, Settings):
            raise SettingsError("settings", f"Settings must be an object of settings, not {quoted(self.settings)}.")
        if self.system is not None:
            _require_text("system prompt", self.system)
        if self.drafter is not None and (not isinstance(self.drafter, str) or len(self.drafter) > MAX_NAME):
            raise SettingsError("drafter", f"Unknown drafter {quoted(self.drafter)}; name one that is offered.")
        for name, label in (("truncate", "Truncate"), ("thinking", "Thinking")):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(name, f"{label} must be true or false, not {quoted(getattr(self, name))}.")
        object.__setattr__(self, "system", self.system or None)
        object.__setattr__(self, "drafter", self.drafter or None)
        object.__setattr__(self, "prefix", _prefix(self.prefix))
        object.__setattr__(self, "draft", _draft(self.draft))
        object.__setattr__(self, "history", _history(self.history))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `Request.from_dict` is its inverse."""
        data = asdict(self)
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}
        if not data.pop("history"):  # traces of single prompts stay as versions before this field read them
            return data
        return {**data, "history": [list(turn) for turn in self.history]}

    @classmethod
    def from_dict(cls, data: object) -> Request:
        """The request `to_dict` was made from; a field that is missing takes its default.

        Raises:
            PromptError, SettingsError: as the constructor, and for a field that is unknown.
        """
        if not isinstance(data, dict):
            raise SettingsError("request", f"A request must be an object, not {quoted(data)}.")
        if unknown := data.keys() - {f.name for f in fields(cls)}:
            raise SettingsError("request", f"A request has no field {quoted(min(unknown))}.")
        settings = data.get("settings", {})
        if isinstance(settings, dict):
            if unknown := settings.keys() - set(Settings.names()):
                raise SettingsError("settings", f"Settings have no field {quoted(min(unknown))}.")
            settings = Settings(**settings)
        return cls(**{"prompt": None, **data, "settings": settings})


def _require_text(what: str, value: object) -> None:
    """Raises PromptError where `value` is no text, too long, or holds half of a surrogate pair, which no encoding has.
    `what` names it."""
    if not isinstance(value, str):
        raise PromptError(f"The {what} must be text, not {quoted(value)}.")
    if len(value) > MAX_CHARACTERS:
        raise PromptError(f"The {what} has {len(value):,} characters; at most {MAX_CHARACTERS:,} are read.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"The {what} holds half of a surrogate pair (character {error.start + 1}), which is no text; remove it."
        ) from None


def _prefix(value: object) -> str | tuple[int | str, ...] | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        _require_text("forced prefix", value)
        return value
    return _tokens("prefix", "forced prefix", value) or None


def _draft(value: object) -> tuple[int | str, ...]:
    drafted = _tokens("draft", "person's draft", value)
    if len(drafted) > MAX_NEW_TOKENS:
        raise SettingsError(
            "draft", f"The person's draft has {len(drafted):,} tokens; at most {MAX_NEW_TOKENS:,} can be used."
        )
    return drafted


def _tokens(field: str, name: str, value: object) -> tuple[int | str, ...]:
    if not isinstance(value, (list, tuple)) or not all(_is_token(x) or (isinstance(x, str) and x) for x in value):
        raise SettingsError(field, f"The {name} must be text or token ids, not {quoted(value)}.")
    for part in value:
        if isinstance(part, str):
            _require_text(name, part)
    return tuple(value)


def _history(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(t, (list, tuple)) and len(t) == 2 for t in value):
        raise SettingsError("history", f"The history must be pairs of question and answer, not {quoted(value)}.")
    for turn in value:
        for text in turn:
            _require_text("history", text)
    return tuple((turn[0], turn[1]) for turn in value)


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN
