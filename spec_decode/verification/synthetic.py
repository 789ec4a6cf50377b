"""Synthetic acceptance: verdicts are drawn and not decided, to measure time where acceptance means nothing."""

from __future__ import annotations

import torch

from ..sampling import argmax
from . import Case, Verdict, leading_run, own_token, reached


def verify(case: Case) -> Verdict:
    """Accepts each drafted token with probability `case.acceptance`, given that those before it were accepted.

    The number of accepted tokens is therefore geometric, cut at γ. The uniform numbers are those that the rejection
    rule would use, so a seed repeats the verdicts, and no two rounds share them. The token after the accepted ones is
    the target's own: its argmax at temperature 0, else drawn from p. The work is that of a rule: the target's
    distribution is made at every position, and noise as for rejection.

    Raises:
        ValueError: `case.acceptance` is None.
    """
    if case.acceptance is None:
        raise ValueError("synthetic verdicts need a probability of acceptance")
    uniform = case.noise.uniform()
    bound = torch.full_like(uniform, case.acceptance)
    accepted = leading_run(uniform < bound)
    if case.temperature == 0:
        token = argmax(case.logits).gather(-1, accepted[..., None]).squeeze(-1)
    else:
        # From max(p − 0 · q, 0), which is p, by the operators that a correction takes.
        token, rest = own_token(case.draft, case.p, case.q, accepted, case.noise.residual(), 0.0)
        return Verdict(accepted, token, reached(uniform, bound, accepted), rest)
    return Verdict(accepted, token, reached(uniform, bound, accepted))
