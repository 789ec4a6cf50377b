"""A request: every value is checked once, in one sentence that is short however long the value is."""

from __future__ import annotations

from typing import Any

import pytest

from spec_decode.errors import PromptError, SettingsError, UserError
from spec_decode.request import MAX_CHARACTERS, Request
from spec_decode.settings import Settings


def test_a_prompt_is_enough() -> None:
    request = Request("hello")
    assert request.settings == Settings() and request.draft == ()
    assert (request.system, request.drafter, request.prefix) == (None, None, None)
    assert request == Request("hello", Settings(), system="", drafter="", prefix="", draft=[])  # type: ignore[arg-type]
    assert Request.from_dict({"prompt": "hello"}) == request


@pytest.mark.parametrize(
    ("bad", "kind", "sentence"),
    [
        ({"prompt": None}, PromptError, "The prompt must be text, not None."),
        ({"prompt": ["long"] * 5000}, PromptError, "The prompt must be text, not ['long', 'long'"),
        ({"prompt": " \n"}, PromptError, "The prompt is empty; type something for the model to answer."),
        ({"prompt": "a\ud800"}, PromptError, "holds half of a surrogate pair (character 2)"),
        ({"prompt": "a" * (MAX_CHARACTERS + 1)}, PromptError, "The prompt has 4,000,001 characters; at most 4,000,000"),
        ({"settings": None}, SettingsError, "Settings must be an object of settings, not None."),
        ({"system": 7}, PromptError, "The system prompt must be text, not 7."),
        ({"system": "\udfff"}, PromptError, "The system prompt holds half"),
        ({"drafter": {"a": "long" * 5000}}, SettingsError, "Unknown drafter {'a': 'long"),
        ({"drafter": "long" * 5000}, SettingsError, "Unknown drafter 'long"),
        ({"truncate": "yes"}, SettingsError, "Truncate must be true or false, not 'yes'."),
        ({"thinking": 1}, SettingsError, "Thinking must be true or false, not 1."),
        ({"prefix": 7}, SettingsError, "The forced prefix must be text or token ids, not 7."),
        ({"prefix": "\ud800"}, PromptError, "The forced prefix holds half"),
        *(({"prefix": [bad]}, SettingsError, "must be text or token ids") for bad in (-1, True, 1.0, 2**31, "")),
        ({"prefix": [1, "\ud800"]}, PromptError, "The forced prefix holds half"),
        ({"draft": "abc"}, SettingsError, "The person's draft must be text or token ids, not 'abc'."),
        ({"draft": [1] * 32_769}, SettingsError, "The person's draft has 32,769 tokens; at most 32,768 can be used."),
        *(({"draft": [bad]}, SettingsError, "must be text or token ids") for bad in (-1, "", None, 1.5)),
        ({"draft": ["\ud800"]}, PromptError, "The person's draft holds half"),
        *(
            ({"history": bad}, SettingsError, "The history must be pairs of question and")
            for bad in ("ab", [["a"]], [1])
        ),
        ({"history": [("a", 7)]}, PromptError, "The history must be text, not 7."),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_short_sentence(
    bad: dict[str, Any], kind: type[UserError], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        Request(**{"prompt": "hello", **bad})
    assert sentence in str(caught.value) and len(str(caught.value)) < 250 and "\n" not in str(caught.value)
    if isinstance(caught.value, SettingsError):
        assert caught.value.field in bad


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "A request must be an object, not []."),
        ({}, "The prompt must be text, not None."),
        ({"prompt": "a", "colour": "red"}, "A request has no field 'colour'."),
        ({"prompt": "a", "settings": {"heat": 1}}, "Settings have no field 'heat'."),
        ({"prompt": "a", "settings": {"temperature": 9}}, "Temperature must be a number from 0 to 5, not 9."),
        ({"prompt": "a", "settings": []}, "Settings must be an object of settings, not []."),
    ],
)
def test_what_is_no_request_as_json_is_refused(data: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Request.from_dict(data)
    assert str(caught.value) == sentence


def test_as_json_it_holds_every_field() -> None:
    request = Request("a", Settings(seed=3), "b", "lookup", True, True, (1, 2), (3, "x"))
    assert request.to_dict() == {
        "prompt": "a",
        "settings": Settings(seed=3).to_dict(),
        "system": "b",
        "drafter": "lookup",
        "truncate": True,
        "thinking": True,
        "prefix": [1, 2],
        "draft": [3, "x"],
    }
    talk = Request("c", history=[["a", "b"]])  # type: ignore[arg-type]
    assert talk.history == (("a", "b"),) and talk.to_dict()["history"] == [["a", "b"]]
    assert Request.from_dict(talk.to_dict()) == talk
