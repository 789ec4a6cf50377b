"""How far the int8 target is from the float32 one: KL divergence and agreement of the most likely token.

    python docs/int8_quality.py

Over the answers the float32 model gives to the example prompts at temperature 0, teacher-forced, so that every position
is compared in the same context.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from spec_decode import embedded
from spec_decode.models import load_model, load_tokenizer
from spec_decode.text import encode_chat

PROMPTS = Path(__file__).parent.parent / "assets" / "examples.jsonl"


@torch.inference_mode()
def main() -> None:
    path = str(embedded.prepare())
    tokenizer = load_tokenizer(path)
    cpu = torch.device("cpu")
    exact, quantized = load_model(path, cpu, "float32"), load_model(path, cpu, "int8")
    divergence, agree = [], []
    for line in PROMPTS.read_text().splitlines():
        prompt = torch.tensor([encode_chat(tokenizer, json.loads(line)["prompt"])])
        ids = exact.generate(prompt, max_new_tokens=128, do_sample=False)
        ours, theirs = (m(ids).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1) for m in (quantized, exact))
        divergence.append((theirs.exp() * (theirs - ours)).sum(-1))
        agree.append(ours.argmax(-1) == theirs.argmax(-1))
    kl, same = torch.cat(divergence), torch.cat(agree).float()
    print(f"{len(kl)} positions: KL(float32 ‖ int8) mean {kl.mean():.4f}, median {kl.median():.4f} nats; ", end="")
    print(f"the same most likely token at {100 * same.mean():.1f} %")


if __name__ == "__main__":
    main()
