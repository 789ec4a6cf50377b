"""Where two lanes part that should show the same text, and how near a tie the target was there.

In: a `Trace`. Out: the place, both tokens, and their logit gaps. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Any

from .events import BASELINE, SPECULATIVE, Token, Trace
from .rules import RULES, deciding


def parting(trace: Trace) -> dict[str, Any] | None:
    """Where two lanes part that should show the same text, and how near a tie the target was there.

    None where the lanes agree as far as both go, and under rules that do not make the same text.

    Returns:
        "position": index into `token_ids` of the first difference. For each lane "id" and "text" of its token there,
        and "logit_gap": the target's logit of that token less that of the other lane's token, as this lane's pass saw
        them. "logit_shift": the sum of both, by how much the difference of the two logits moved between the passes.
        Logits come from the recorded probabilities, in nats, temperature taken out; None where the other token is not
        among the recorded alternatives.

    Under the greedy rule both gaps are ≥ 0 and what rounding has to explain is their sum. Under the coupled rule the
    noise decides too, the same in both lanes: a gap may have any size and sign there, and only the shift compares.
    """
    rule, temperature = RULES.get(str(trace.settings.get("rule"))), float(trace.settings.get("temperature", 0))
    if rule is None or not deciding(rule, temperature).same_text:
        return None
    emitted = {lane: [t for r in trace.lane(lane) for t in r.emitted] for lane in (BASELINE, SPECULATIVE)}
    pairs = enumerate(zip(emitted[BASELINE], emitted[SPECULATIVE], strict=False))
    found = next((item for item in pairs if item[1][0].id != item[1][1].id), None)
    if found is None:
        return None
    position, (slow, fast) = found
    gaps = [_logit_gap(own, other.id, temperature) for own, other in ((slow, fast), (fast, slow))]
    lanes = {
        lane: {"id": token.id, "text": token.text, "logit_gap": gap}
        for lane, token, gap in zip((BASELINE, SPECULATIVE), (slow, fast), gaps, strict=True)
    }
    shift = None if None in gaps else sum(gap for gap in gaps if gap is not None)
    return {"position": position, **lanes, "logit_shift": shift}


def _logit_gap(own: Token, other: int, temperature: float) -> float | None:
    """The logit of `own` less that of the token `other` at the same place, from their probabilities."""
    p = next((alternative.p for alternative in own.target_top if alternative.id == other), None)
    if not own.p or not p:
        return None
    return (temperature or 1.0) * math.log(own.p / p)
