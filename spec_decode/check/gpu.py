"""Random pairs in the shapes of Gemma 4, raced on an accelerator in the precisions that are meant for it.

    python -m spec_decode check gpu                         # on an NVIDIA GPU: tiny pairs, then E2B's and E4B's shapes
    python -m spec_decode check gpu --pairs gemma-4-12B --bitsandbytes target=nf4
    python -m spec_decode check gpu --tiny --device cpu     # the same steps at a size that any machine can run

In: shapes from the catalog; no download, since the weights are random (they pass through a temporary directory: 15 GB
for E4B). Out: device and versions, then a line for each race: what ran, tokens/s of both lanes, whether the lanes are
identical, and, on CUDA, why rounds are not recorded as graphs (`spec_decode.graphs`) where they are not. Each pair
races greedily and, under the coupled rule, at temperature 1. Lanes of tiny pairs in float32 must be identical, every
lane must reach its number of tokens, and rounds of models that bitsandbytes did not quantize must be recorded. In
bfloat16 two lanes may differ at a near-tie, of which random weights have many, so there the difference is reported and
does not fail the check. Exit code 1 if anything failed. Random weights measure the cost of a pass; their acceptance
rate means nothing.
"""

from __future__ import annotations

import argparse
import gc
import platform
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as pieces
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import UserError
from ..events import BASELINE, SPECULATIVE, Trace
from ..loading import catalog
from ..loading.pair import Pair, load_pair
from ..loading.placement import find_device
from ..metrics import race_report
from ..request import Request
from ..settings import Settings
from ..sources.local import Race
from . import tiny

NEW = 32  # new tokens of each lane
SAMPLED = Settings(temperature=1.0, rule="coupled", draft_length=4, max_new_tokens=NEW)
GREEDY = Settings(draft_length=4, max_new_tokens=NEW)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check gpu`."""
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, mps or cpu")
    parser.add_argument("--pairs", nargs="*", default=["gemma-4-E2B", "gemma-4-E4B"], help="shapes, by name")
    parser.add_argument("--context", type=int, default=4096, help="tokens in all (default: %(default)s)")
    parser.add_argument(
        "--bitsandbytes",
        nargs="*",
        default=["int8", "nf4", "target=nf4,drafter=int8"],
        metavar="HOW",
        help="quantizations to race as well, as --quantize takes them (default: int8 nf4 target=nf4,drafter=int8)",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny pairs only")


def run(options: argparse.Namespace) -> None:
    """Races every pair in every precision; exit code 1 if a race failed."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = find_device(options.device)
    print(f"{describe(device)}\n")
    held = [(None, "float32"), (None, "bfloat16"), *((how, "bfloat16") for how in options.bitsandbytes)]
    failures = 0
    for kind in tiny.GEMMA4:
        context = min(options.context, 5 * tiny.WINDOW + NEW)
        for ordered in (False, True):
            with tempfile.TemporaryDirectory() as home:
                write(Path(home), tiny.gemma4(kind, ordered=ordered, hidden_size=64))
                name = f"tiny {kind}{', centroids' if ordered else ''}"
                failures += sum(not race(name, Path(home), device, how, dtype, context) for how, dtype in held)
    for name in [] if options.tiny else options.pairs:
        with tempfile.TemporaryDirectory() as home:
            write(Path(home), shaped(name, device))
            failures += sum(not race(name, Path(home), device, how, dtype, options.context) for how, dtype in held[1:])
    print(f"\n{failures} failed" if failures else "\nall passed")
    if failures:
        raise SystemExit(1)


def describe(device: torch.device) -> str:
    """Device and versions, one line."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    try:
        import bitsandbytes

        quantizer = bitsandbytes.__version__
    except ImportError:
        quantizer = "none"
    return (
        f"{place}{cuda}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, bitsandbytes {quantizer}"
    )


def shaped(name: str, device: torch.device) -> Iterator[transformers.PreTrainedModel]:
    """Target and drafter of a catalog entry with random bfloat16 weights, made on the device, one after the other.

    Raises:
        UserError: the catalog has no such pair.
    """
    entry = catalog.find(name)
    if entry is None:
        raise UserError(f"There is no pair {name!r}; `python -m spec_decode models` lists them.")
    for kind, shape in ((entry.kind, entry.shape), (entry.drafter_kind, entry.drafter_shape)):
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape), dtype=torch.bfloat16)
            if kind == entry.drafter_kind and model.config.use_ordered_embeddings:
                ordering = model.masked_embedding.token_ordering
                ordering.copy_(torch.randperm(len(ordering)))
        model.config.get_text_config().eos_token_id = model.generation_config.eos_token_id = None
        yield model


def write(home: Path, pair: Iterable[transformers.PreTrainedModel]) -> None:
    """Saves a target with a tokenizer of the words w0, w1, …, and its drafter, as `load_pair` takes them."""
    for who, model in zip(("target", "drafter"), pair, strict=True):
        model.save_pretrained(home / who)
        if who == "target":
            words = {f"w{i}": i for i in range(model.config.vocab_size)}
            vocabulary = Tokenizer(pieces.WordLevel(words, unk_token="w0"))
            vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="w0").save_pretrained(home / who)


def race(name: str, home: Path, device: torch.device, how: str | None, dtype: str, context: int) -> bool:
    """Loads the pair that `write` saved, races it greedily and sampled, and prints a line for each; False if one
    failed. `how` is the quantization, `context` the tokens of prompt and output together."""
    passed = True
    gc.collect()  # models of earlier races
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        pair = load_pair(str(home / "target"), str(home / "drafter"), device=str(device), dtype=dtype, quantize=how)
        words = " ".join(f"w{(7 * i * i + 3 * i) % 90}" for i in range(context - NEW))
        for settings in (GREEDY, SAMPLED):
            trace = finished(pair, words, settings)
            report = race_report(trace)
            rates = [report[lane]["tokens_per_second"] for lane in (BASELINE, SPECULATIVE)]
            whole = all(len(trace.token_ids(lane)) == NEW for lane in (BASELINE, SPECULATIVE))
            eager = {lane: recorder.refused for lane, recorder in pair.recorders.items() if recorder.refused}
            good = whole and (how is not None or (not eager and (report["identical"] or dtype != "float32")))
            passed &= good
            print(
                f"{'ok  ' if good else 'FAIL'} {name:28} {pair.info['dtype']:42} {settings.rule:8} "
                f"{trace.prompt_tokens + NEW:5} tokens, {rates[0]:7.1f} and {rates[1]:7.1f} tokens/s, "
                f"{'lanes identical' if report['identical'] else 'lanes part'}"
                + "".join(f"; {lane} rounds are not recorded: {why}" for lane, why in eager.items()),
                flush=True,
            )
    except Exception:  # the next race may still run
        traceback.print_exc()
        print(f"FAIL {name:28} {dtype} {how or ''}", flush=True)
        passed = False
    return passed


def finished(pair: Pair, prompt: str, settings: Settings) -> Trace:
    """The trace of a whole race."""
    made = Race(pair, Request(prompt, settings))
    for _ in made:
        pass
    return made.trace
