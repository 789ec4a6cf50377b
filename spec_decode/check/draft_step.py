"""Cost of a draft step of the embedded drafter, and what its shortcuts cost in acceptance.

    python -m spec_decode check draft-step [--drafter DIR]

In: the drafter in assets, or the directory named. Out: milliseconds of a draft step; tokens per target pass (γ = 4,
temperature 0) over every third prompt of assets/heldout.jsonl, for the drafter in float32 with the whole head and for
each approximation up to the one that is used. On the CPU, with the int8 target.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import decode
from ..draft_length import Fixed
from ..drafters.mtp import MTPDrafter
from ..errors import UserError
from ..loading import pair as loading
from ..loading.checkpoints import load_assistant
from ..loading.measure import measure_costs
from ..paths import ASSETS
from ..settings import Settings
from ..text import TextStream, encode_chat

SETTINGS = Settings(max_new_tokens=96)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check draft-step`."""
    parser.add_argument(
        "--drafter", default=str(ASSETS / "drafter"), metavar="DIR", help="an MTP drafter of the embedded target"
    )


def run(options: argparse.Namespace) -> None:
    """Prints the cost of a step, then tokens per target pass of every variant.

    Raises:
        UserError: the directory holds no drafter with vocabulary lists.
    """
    folder = options.drafter
    try:
        lists = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["centroid_intermediate_top_k"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no MTP drafter with vocabulary lists.") from error
    pair = loading.load_pair(drafter="lookup", device="cpu")

    def drafter(dtype: str, share: float = 1.0) -> MTPDrafter:
        made = load_assistant(folder, pair.target.device, dtype)
        made.masked_embedding.centroid_intermediate_top_k = round(share * lists)
        return MTPDrafter(made, pair.target, int8=dtype == "int8")

    costs = measure_costs(pair.target, drafter("int8"), repeats=15)
    step = 1e3 * costs.step_seconds
    first = costs.draft_start + costs.draft_ratio
    print(
        f"draft step {costs.draft_ratio * step:.2f} ms, {costs.draft_ratio:.3f} of a target pass of {step:.1f} ms; "
        f"the first of a round {first * step:.2f} ms, {first:.3f}"
    )

    whole = drafter("float32")
    whole.ordering = None
    for name, made in (
        ("float32, whole head", whole),
        (f"float32, {lists} lists", drafter("float32")),
        (f"8 bits, {lists} lists (ours)", drafter("int8")),
        (f"8 bits, {lists // 2} lists", drafter("int8", 0.5)),
        (f"8 bits, {lists * 2} lists", drafter("int8", 2.0)),
    ):
        print(f"{name:32} {tokens_per_pass(pair, made):6.2f} tokens per target pass", flush=True)


def tokens_per_pass(pair: loading.Pair, drafter: MTPDrafter) -> float:
    """Emitted tokens ÷ rounds, over all prompts together, prefill excluded."""
    lines = (ASSETS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = emitted = 0
    for line in lines[::3]:
        prompt = encode_chat(pair.tokenizer, json.loads(line)["prompt"])
        text = TextStream(pair.tokenizer, prompt)
        for r in decode.speculative(pair.target, drafter, Fixed(4), prompt, text, SETTINGS):
            if r.index:
                rounds, emitted = rounds + 1, emitted + len(r.emitted)
    return emitted / rounds
