"""Names of pairs, corrections of names, and the flags for loading a pair."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spec_decode import flags
from spec_decode.__main__ import main
from spec_decode.errors import SettingsError, UserError
from spec_decode.loading import catalog, memory
from spec_decode.loading.listing import listing
from spec_decode.masks import GROUPED


@pytest.mark.parametrize("name", ["gemma-4-E4B", "GEMMA-4-e4b", "google/gemma-4-E4B-it", "gemma-4-e4b-it-assistant"])
def test_a_pair_is_found_by_any_of_its_names(name: str) -> None:
    assert catalog.pair(name) == ("google/gemma-4-E4B-it", "google/gemma-4-E4B-it-assistant")


def test_the_five_pairs_and_the_embedded_one() -> None:
    assert [catalog.pair(f"gemma-4-{size}")[0] for size in ("E2B", "E4B", "12B", "26B-A4B", "31B")] == [
        entry.target for entry in catalog.GEMMA4
    ]
    assert catalog.pair("Embedded") == ("embedded", None)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("google/gemma-4-9b-it", "google/gemma-4-12B-it"),
        ("google/gemma-4-2b-it-draft", "google/gemma-4-E2B-it-assistant"),
        ("google/gemma-4-27b-it", "google/gemma-4-26B-A4B-it"),
        ("gemma4:31b", "google/gemma-4-31B-it"),
        ("google/gemma-4-e4b-it", None),
        ("google/gemma-4-31B-it-assistant", None),
        ("google/gemma-4-E2B", None),
        ("google/gemma-3-9b-it", None),
        ("HuggingFaceTB/SmolLM2-1.7B", None),
    ],
)
def test_the_nearest_real_name(wrong: str, right: str | None) -> None:
    assert catalog.suggestion(wrong) == right


def test_an_unknown_pair_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"no pair 'gemma-4-9b'; did you mean gemma-4-12B\? .*gemma-4-31B"):
        catalog.pair("gemma-4-9b")


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (None, {}),
        ("", {}),
        ("nf4", {"target": "nf4"}),
        ("drafter=int8", {"drafter": "int8"}),
        ("target=nf4, drafter=int8", {"target": "nf4", "drafter": "int8"}),
    ],
)
def test_quantization(text: str | None, chosen: dict[str, str]) -> None:
    assert catalog.quantization(text) == chosen


@pytest.mark.parametrize("text", ["int3", "both=nf4", "target=", "nf4,target=int8", "=nf4"])
def test_a_wrong_quantization_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="Cannot quantize"):
        catalog.quantization(text)


def test_attention_that_takes_no_mask_is_refused() -> None:
    assert [catalog.attention(name) for name in (None, "auto", "sdpa", "eager")] == [None, None, "sdpa", "eager"]
    assert catalog.attention("grouped") == GROUPED
    for name in ("flash_attention_2", "kernels-community/flash-attn3"):
        with pytest.raises(SettingsError, match="takes a mask"):
            catalog.attention(name)
    with pytest.raises(SettingsError, match="Unknown attention"):
        catalog.attention("quick")


def read(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    flags.add(parser)
    return flags.read(parser.parse_args(words))


def test_flags_become_the_arguments_of_load_pair() -> None:
    import inspect

    from spec_decode.loading.pair import load_pair

    plain = read()
    assert (plain["target"], plain["drafter"]) == ("embedded", None)
    named = set(inspect.signature(load_pair).parameters) - {"progress", "options"}
    assert set(plain) == named | set(catalog.Options.__annotations__)
    chosen = read("--pair", "gemma-4-e2b", "--quantize", "nf4", "--drafter-device", "cpu", "--target-revision", "abc")
    assert chosen["target"] == "google/gemma-4-E2B-it" and chosen["drafter"] == "google/gemma-4-E2B-it-assistant"
    assert (chosen["quantize"], chosen["drafter_device"], chosen["target_revision"]) == ("nf4", "cpu", "abc")
    assert read("--pair", "gemma-4-e2b", "--drafter", "lookup")["drafter"] == "lookup"
    with pytest.raises(UserError, match="not by both"):
        read("--pair", "gemma-4-e2b", "--target", "x")


@pytest.mark.parametrize(
    "options",
    [["--pair", "gemma-4-9b"], ["--quantize", "int3"], ["--attention", "flash_attention_2"]],
)
def test_bad_values_are_one_line_and_exit_code_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import app

    assert main(["race", "--prompt", "x", *options]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(SystemExit) as left:
        app.parse(options)
    assert left.value.code == 2


# The shapes


def test_parameters_are_those_of_the_model_card() -> None:
    """Of the text models: 31B has 30.7 and 26B-A4B 25.2 billion in all; E2B and E4B 2.3 and 4.5 without their
    per-layer embeddings and with everything 5.1 and 8, vision and audio included."""
    rows = {row["pair"]: row for row in listing(torch.device("cpu"), room=24)}
    billions = {name: row["parameters"] / 1e9 for name, row in rows.items()}
    assert billions["gemma-4-31B"] == pytest.approx(30.7, abs=0.1)
    assert billions["gemma-4-26B-A4B"] == pytest.approx(25.2, abs=0.1)
    assert billions["gemma-4-12B"] == pytest.approx(12, abs=0.2)
    for name, computed, stored in (("gemma-4-E2B", 2.3, 5.1), ("gemma-4-E4B", 4.5, 8.0)):
        looked_up = memory.of_catalog(catalog.find(name)).model.embed_tokens_per_layer.weight.numel() / 1e9
        assert billions[name] - looked_up == pytest.approx(computed, abs=0.2)
        assert stored - 0.7 < billions[name] < stored


def test_drafters_are_as_large_as_published() -> None:
    """78 and 78.5 million parameters for E2B and E4B, 0.94 GB in bfloat16 for 31B, and never more than the target."""
    rows = {row["pair"]: row for row in listing(torch.device("cpu"), room=24)}
    assert rows["gemma-4-E2B"]["drafter_parameters"] == pytest.approx(78e6, rel=0.005)
    assert rows["gemma-4-E4B"]["drafter_parameters"] == pytest.approx(78.518e6, abs=500)
    assert rows["gemma-4-31B"]["drafter_bytes"]["bfloat16"] == pytest.approx(0.94e9, abs=0.005e9)
    assert rows["gemma-4-12B"]["class"] == "Gemma4UnifiedForCausalLM"
    assert rows["gemma-4-12B"]["drafter_class"] == "Gemma4UnifiedAssistantForCausalLM"
    for row in rows.values():
        assert row["drafter_bytes"]["nf4"] < row["drafter_bytes"]["int8"] < row["drafter_bytes"]["bfloat16"]
        assert row["draft_length"] == 6


def test_models_prints_every_pair_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--memory", "24"]) == 0
    table = capsys.readouterr().out
    for entry in catalog.GEMMA4:
        assert f"{entry.target} (Gemma4" in table and f"{entry.drafter} (Gemma4" in table
    fits = {row["pair"]: row["fits"] for row in listing(torch.device("cpu"), room=24)}
    assert fits["gemma-4-E2B"] == "bfloat16" and fits["gemma-4-12B"] == "int8" and fits["gemma-4-26B-A4B"] is None
    assert {row["fits"] for row in listing(torch.device("cpu"), room=1)} == {None}
    assert main(["models", "--memory", "plenty"]) == 2
    assert "number of gigabytes" in capsys.readouterr().err


# What is installed


def test_the_readme_and_the_container_pin_torch_as_the_requirements_do() -> None:
    """Otherwise the CPU build that is installed first is replaced by a CUDA build."""
    root = Path(__file__).parents[1]
    (torch_line,) = [line for line in (root / "requirements.txt").read_text().splitlines() if line.startswith("torch")]
    (advised,) = re.findall(r'^pip install "?(torch[^"\s]*)"? --index-url', (root / "README.md").read_text(), re.M)
    assert advised == torch_line
    (built,) = re.findall(r"pip install (\S.*) --index-url", (root / "Dockerfile").read_text())
    assert built == '"$(grep ^torch requirements.txt)"'
