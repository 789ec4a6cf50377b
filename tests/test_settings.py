"""Settings: what is taken, what is refused, and that a refusal names its field in one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spec_decode.errors import SettingsError, UserError
from spec_decode.settings import MAX_DRAFT_LENGTH, MAX_NEW_TOKENS, MAX_SEED, RULES, Settings

LABELS = {
    "draft_length": "Draft length",
    "temperature": "Temperature",
    "top_p": "Top-p",
    "top_k": "Top-k",
    "rule": "rule",
    "lenience": "Lenience",
    "max_new_tokens": "Max new tokens",
    "seed": "Seed",
}
NONSENSE: list[Any] = [
    "",
    "x",
    "1.5.",
    None,
    [],
    {},
    True,
    False,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    "nan",
    b"\xff",
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("draft_length", v) for v in (0, -1, 17, 1.5, "0", "17", "fast", "1.5", *NONSENSE)),
        *(("temperature", v) for v in (-0.001, 5.001, "hot", *NONSENSE)),
        *(("top_p", v) for v in (0, 0.0, "0", -0.1, 1.0001, *NONSENSE)),
        *(("top_k", v) for v in (-1, 0.5, 1_000_001, *NONSENSE)),
        *(("rule", v) for v in ("Greedy!", "exact", 3, [], "greedy ")),
        *(("lenience", v) for v in (0, 1e-7, -0.1, 1.1, *NONSENSE)),
        *(("max_new_tokens", v) for v in (0, -5, MAX_NEW_TOKENS + 1, 1.5, *NONSENSE)),
        *(("seed", v) for v in (-1, MAX_SEED + 1, 0.5, *NONSENSE)),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_a_refusal_names_its_field_in_one_sentence(field: str, value: Any) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(**{field: value})
    assert caught.value.field == field
    message = str(caught.value)
    assert LABELS[field] in message and message.endswith(".") and "\n" not in message
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("given_", "field", "taken"),
    [
        ({"draft_length": "4"}, "draft_length", 4),
        ({"draft_length": 4.0}, "draft_length", 4),
        ({"draft_length": 1}, "draft_length", 1),
        ({"draft_length": MAX_DRAFT_LENGTH}, "draft_length", 16),
        ({"draft_length": " Adaptive "}, "draft_length", "adaptive"),
        ({"draft_length": "rate"}, "draft_length", "rate"),
        ({"draft_length": "threshold"}, "draft_length", "rate"),  # its old name
        ({"temperature": "0.7"}, "temperature", 0.7),
        ({"temperature": 5}, "temperature", 5.0),
        ({"top_p": "1"}, "top_p", 1.0),
        ({"top_p": 1e-9}, "top_p", 1e-9),
        ({"top_k": 40.0}, "top_k", 40),
        ({"lenience": 1}, "lenience", 1.0),
        ({"seed": MAX_SEED}, "seed", MAX_SEED),
        ({"max_new_tokens": "1"}, "max_new_tokens", 1),
        ({}, "rule", "greedy"),
        ({"temperature": 0.1}, "rule", "coupled"),
        ({"temperature": 0.1, "rule": "auto"}, "rule", "coupled"),
        ({"rule": ""}, "rule", "greedy"),
        ({"rule": "threshold"}, "rule", "threshold"),
        ({"rule": "rejection"}, "rule", "rejection"),
    ],
    ids=str,
)
def test_what_a_form_or_a_command_line_may_say(given_: dict[str, Any], field: str, taken: Any) -> None:
    value = getattr(Settings(**given_), field)
    assert value == taken and type(value) is type(taken)


def test_greedy_and_a_temperature_exclude_each_other() -> None:
    with pytest.raises(SettingsError, match="greedy rule needs temperature 0") as caught:
        Settings(temperature=0.5, rule="greedy")
    assert caught.value.field == "rule"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_which_rules_are_exact_and_which_show_the_same_text(temperature: float) -> None:
    for rule in RULES:
        if rule == "greedy" and temperature > 0:
            continue
        settings = Settings(temperature=temperature, rule=rule)
        assert settings.exact == (rule != "threshold")
        assert settings.same_text == (
            rule in ("greedy", "coupled") or (rule in ("rejection", "block") and temperature == 0)
        )


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.builds(
        Settings,
        draft_length=st.one_of(st.integers(1, 16), st.sampled_from(["adaptive", "rate"])),
        temperature=st.floats(0, 5),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=st.integers(0, 1_000_000),
        rule=st.sampled_from([None, "coupled", "rejection", "block", "threshold"]),
        lenience=st.floats(1e-6, 1),
        max_new_tokens=st.integers(1, MAX_NEW_TOKENS),
        seed=st.integers(0, MAX_SEED),
    )
)
def test_json_and_back(settings: Settings) -> None:
    assert Settings(**json.loads(json.dumps(settings.to_dict()))) == settings
    assert tuple(settings.to_dict()) == Settings.names()


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().seed = 3  # type: ignore[misc]
