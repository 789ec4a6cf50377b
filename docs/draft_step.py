"""What a draft step of the embedded drafter costs and what its shortcuts lose: `python docs/draft_step.py`.

In: the drafter in assets, or the directory named. Out: milliseconds of a draft step; tokens per target pass (γ = 4,
temperature 0) over every third prompt of assets/heldout.jsonl, from float32 with the whole head to what runs. On the
CPU, beside the int8 target.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from spec_decode import decode, models  # noqa: E402
from spec_decode.checkpoints import load_assistant  # noqa: E402
from spec_decode.draft_length import Fixed  # noqa: E402
from spec_decode.drafters.mtp import MTPDrafter  # noqa: E402
from spec_decode.settings import Settings  # noqa: E402
from spec_decode.text import TextStream, encode_chat  # noqa: E402

SETTINGS = Settings(max_new_tokens=96)


def main() -> None:
    """Prints both."""
    pair = models.load_pair(drafter="lookup", device="cpu")
    folder = sys.argv[1] if len(sys.argv) > 1 else str(models.SHIPPED)
    lists = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["centroid_intermediate_top_k"]

    def drafter(dtype: str, share: float = 1.0) -> MTPDrafter:
        made = load_assistant(folder, pair.target.device, dtype)
        made.masked_embedding.centroid_intermediate_top_k = round(share * lists)
        return MTPDrafter(made, pair.target, int8=dtype == "int8")

    costs = models.measure_costs(pair.target, drafter("int8"), repeats=15)
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


def tokens_per_pass(pair: models.Pair, drafter: MTPDrafter) -> float:
    """Over all rounds of the prompts together."""
    lines = (ROOT / "assets" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = emitted = 0
    for line in lines[::3]:
        prompt = encode_chat(pair.tokenizer, json.loads(line)["prompt"])
        text = TextStream(pair.tokenizer, prompt)
        for r in decode.speculative(pair.target, drafter, Fixed(4), prompt, text, SETTINGS):
            if r.index:
                rounds, emitted = rounds + 1, emitted + len(r.emitted)
    return emitted / rounds


if __name__ == "__main__":
    main()
