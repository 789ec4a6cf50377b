"""The second token of a tiny random Gemma 4 pair, drawn in three ways, against its exact distribution.

    python -m spec_decode check lossless [--draws 4000] [--draft-length 3]

Plain sampling from the target; transformers' assisted generation with the pair's MTP drafter; this engine's rejection
rule with the same drafter. All at temperature 1 from the same prompt. The second token is the first one that a draft
can decide. Its exact distribution is a sum over the first: Σ p(first) p(second | first). Pearson's chi-square compares
each sample with it. A method that samples from the target passes (p well above 0); one that does not fails more clearly
with more draws. Needs scipy (requirements-dev.txt); takes some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import decode
from ..draft_length import Fixed
from ..drafters.mtp import MTPDrafter
from ..settings import Settings
from ..target import Target
from ..text import TextStream
from . import package, tiny

VOCABULARY = 64
TOKENS = 4  # new tokens of a text, so that the second one lies within a draft
PROMPT = [(7 * i * i + 3 * i) % VOCABULARY for i in range(2 * tiny.WINDOW)]


@torch.no_grad()
def exact(model: PreTrainedModel) -> Tensor:
    """Distribution of the second token, float64 `[V]`."""
    prompt = torch.tensor([PROMPT])
    first = model(prompt).logits[0, -1].double().softmax(-1)
    longer = torch.cat([prompt.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
    return first @ model(longer).logits[:, -1].double().softmax(-1)


def plain(model: PreTrainedModel, draws: int) -> list[int]:
    """The second token of every text of `generate(do_sample=True)`."""
    prompt = torch.tensor([PROMPT]).expand(draws, -1)
    torch.manual_seed(0)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling())
    return out[:, len(PROMPT) + 1].tolist()


def assisted(model: PreTrainedModel, assistant: PreTrainedModel, draws: int, length: int) -> list[int]:
    """The second token of every text of `generate(do_sample=True, assistant_model=…)`."""
    prompt = torch.tensor([PROMPT])
    assistant.generation_config.num_assistant_tokens = length
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    seconds = []
    for seed in range(draws):
        torch.manual_seed(seed)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=assistant, **sampling())
        seconds.append(int(out[0, len(PROMPT) + 1]))
    return seconds


def rejection(model: PreTrainedModel, assistant: PreTrainedModel, draws: int, length: int) -> list[int]:
    """The second token of every text of this engine's speculative lane under the rejection rule."""
    target = Target(model)
    drafter = MTPDrafter(assistant, target)
    seconds = []
    for seed in range(draws):
        settings = Settings(temperature=1, rule="rejection", max_new_tokens=TOKENS, seed=seed)
        text = TextStream(tiny.Characters(), PROMPT)
        rounds = decode.speculative(target, drafter, Fixed(length), PROMPT, text, settings)
        seconds.append([token.id for done in rounds for token in done.emitted][1])
    return seconds


def sampling() -> dict[str, object]:
    """What `generate` is given to sample from the target's own distribution."""
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": TOKENS}


def chi_square(seconds: list[int], expected: Tensor) -> tuple[float, int, float]:
    """χ², degrees of freedom and p value; tokens expected fewer than five times form one cell."""
    stats = package("scipy.stats", "lossless")
    counts = torch.bincount(torch.tensor(seconds), minlength=VOCABULARY).double()
    expected = expected * len(seconds)
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare])]
    if rare.any():
        cells.append((counts[rare].sum()[None], expected[rare].sum()[None]))
    observed, due = (torch.cat(column).numpy() for column in zip(*cells, strict=True))
    statistic, p = stats.chisquare(observed, due * observed.sum() / due.sum())
    return float(statistic), len(observed) - 1, float(p)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check lossless`."""
    parser.add_argument("--draws", type=int, default=4000, metavar="N", help="texts of each way (default: %(default)s)")
    parser.add_argument("--draft-length", type=int, default=3, metavar="N", help="γ (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Prints χ² and its p value for each way of drawing."""
    package("scipy.stats", "lossless")  # rather than after minutes of drawing
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, assistant = tiny.gemma4("dense", vocab_size=VOCABULARY, initializer_range=0.1)
    expected = exact(model)
    print(f"{options.draws} draws, draft length {options.draft_length}")
    samples = {
        "plain sampling": lambda: plain(model, options.draws),
        "transformers, assisted": lambda: assisted(model, assistant, options.draws, options.draft_length),
        "this engine, rejection": lambda: rejection(model, assistant, options.draws, options.draft_length),
    }
    for name, draw in samples.items():
        statistic, freedom, p = chi_square(draw(), expected)
        print(f"{name:24} χ² {statistic:8.1f} on {freedom} degrees of freedom, p = {p:.2g}", flush=True)
