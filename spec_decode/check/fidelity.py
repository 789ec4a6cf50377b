"""How far the embedded target's int8 weights are from float32: KL divergence and the same argmax.

    python -m spec_decode check fidelity

Over the answers that the float32 model gives to the example prompts at temperature 0, teacher-forced, so that every
position is compared in the same context.
"""

from __future__ import annotations

import argparse
import json

import torch

from ..loading import embedded
from ..loading.checkpoints import load_model, load_tokenizer
from ..paths import ASSETS
from ..text import encode_chat

NEW = 128  # most tokens of an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`check fidelity` has no options."""


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    """Prints KL(float32 ‖ int8), mean and median in nats, and the share of positions with the same argmax."""
    path = str(embedded.prepare())
    tokenizer = load_tokenizer(path)
    cpu = torch.device("cpu")
    exact, quantized = load_model(path, cpu, "float32"), load_model(path, cpu, "int8")
    divergence, agree = [], []
    for line in (ASSETS / "examples.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = torch.tensor([encode_chat(tokenizer, json.loads(line)["prompt"])])
        ids = exact.generate(prompt, max_new_tokens=NEW, do_sample=False)
        ours, theirs = (m(ids).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1) for m in (quantized, exact))
        divergence.append((theirs.exp() * (theirs - ours)).sum(-1))
        agree.append(ours.argmax(-1) == theirs.argmax(-1))
    kl, same = torch.cat(divergence), torch.cat(agree).float()
    print(f"{len(kl)} positions: KL(float32 ‖ int8) mean {kl.mean():.4f}, median {kl.median():.4f} nats; ", end="")
    print(f"the same most likely token at {100 * same.mean():.1f} %")
