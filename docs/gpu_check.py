"""What only a GPU can show: random pairs in the shapes of Gemma 4, raced on the device, in the precisions it is for.

    python docs/gpu_check.py                                # on an NVIDIA GPU: tiny pairs, then E2B's and E4B's shapes
    python docs/gpu_check.py --pairs gemma-4-12B --bitsandbytes target=nf4
    python docs/gpu_check.py --tiny --device cpu            # the same steps at a size that any machine can run

In: shapes from the catalog; no download, since the weights are random (they pass through a temporary directory: 15 GB
for E4B). Out: device and versions, then a line a race:
what ran, how fast, and whether the lanes agree. Draws at temperature 1 under the coupled rule, and greedily; lanes of
tiny pairs in float32 must be identical, and all must end. In bfloat16 the two lanes may part at a near-tie, which
random weights are full of, so there it is told and not judged. Exit code 1 if anything failed. Figures of random
weights say what a pass costs, and nothing about acceptance.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
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

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

from spec_decode import catalog, models  # noqa: E402
from spec_decode.events import BASELINE, SPECULATIVE  # noqa: E402
from spec_decode.metrics import race_report  # noqa: E402
from spec_decode.race import Race  # noqa: E402
from spec_decode.settings import Settings  # noqa: E402

NEW = 32  # tokens a lane writes
SAMPLED = Settings(temperature=1.0, rule="coupled", draft_length=4, max_new_tokens=NEW)
GREEDY = Settings(draft_length=4, max_new_tokens=NEW)


def main() -> int:
    """Runs all checks and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", nargs="*", default=["gemma-4-E2B", "gemma-4-E4B"], help="shapes, by name")
    parser.add_argument("--context", type=int, default=4096, help="tokens in all (default: %(default)s)")
    parser.add_argument("--bitsandbytes", nargs="*", default=["int8", "nf4", "target=nf4,drafter=int8"])
    parser.add_argument("--tiny", action="store_true", help="tiny pairs only")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = models.find_device(options.device)
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
    return min(failures, 1)


def describe(device: torch.device) -> str:
    """Device and versions."""
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
    """Target and drafter of a catalog entry with random bfloat16 weights, made on the device, one after the other."""
    entry = catalog.find(name)
    if entry is None:
        raise SystemExit(f"There is no pair {name!r}.")
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
    """Saves a target with a tokenizer of made-up words, and its drafter, as `models.load_pair` takes them."""
    for who, model in zip(("target", "drafter"), pair, strict=True):
        model.save_pretrained(home / who)
        if who == "target":
            words = {f"w{i}": i for i in range(model.config.vocab_size)}
            vocabulary = Tokenizer(pieces.WordLevel(words, unk_token="w0"))
            vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="w0").save_pretrained(home / who)


def race(name: str, home: Path, device: torch.device, how: str | None, dtype: str, context: int) -> bool:
    """Loads the pair that `write` left, races it greedily and sampled, and prints a line for each."""
    passed = True
    gc.collect()  # of what was made or raced before
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        pair = models.load_pair(
            str(home / "target"), str(home / "drafter"), device=str(device), dtype=dtype, quantize=how
        )
        words = " ".join(f"w{(7 * i * i + 3 * i) % 90}" for i in range(context - NEW))
        for settings in (GREEDY, SAMPLED):
            run = Race(pair, words, settings)
            list(run)
            report = race_report(run.trace)
            rates = [report[lane]["tokens_per_second"] for lane in (BASELINE, SPECULATIVE)]
            whole = all(len(run.trace.token_ids(lane)) == NEW for lane in (BASELINE, SPECULATIVE))
            good = whole and (report["identical"] or dtype != "float32" or how is not None)
            passed &= good
            print(
                f"{'ok  ' if good else 'FAIL'} {name:28} {pair.info['dtype']:42} {settings.rule:8} "
                f"{len(run.ids) + NEW:5} tokens, {rates[0]:7.1f} and {rates[1]:7.1f} tokens/s, "
                f"{'lanes identical' if report['identical'] else 'lanes part'}",
                flush=True,
            )
    except Exception:  # the next one may run
        traceback.print_exc()
        print(f"FAIL {name:28} {dtype} {how or ''}", flush=True)
        passed = False
    return passed


if __name__ == "__main__":
    sys.exit(main())
