"""The verification rules in one table: what each is called, what it promises, which noise it uses, where it decides.

In: nothing of ours. Out: `RULES`, which settings, form, API, command line and documentation read; `decode` calls
`Rule.verify`. Imports no torch: a rule's function is loaded when it first decides. One entry of the table decides
nothing and is in no menu: synthetic acceptance, which `Settings.synthetic_acceptance` asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .verification import Case, Verdict

Noise = Literal["none", "shared", "round"]


@dataclass(frozen=True)
class Rule:
    """A verification rule.

    name: as settings and traces have it; `spec_decode/verification/<name>.py` holds its function `verify`.
    summary: one sentence for the page.
    noise: "none"; "shared", the noise of the target's own sample, which drafts are drawn with too; or "round", noise
        that is keyed by the round's start, so that no two rounds and no two purposes share any.
    exact: the output follows the target's own distribution.
    same_text: the output is the target's own sample for the seed, whatever was drafted.
    samples: it can be used above temperature 0.
    lenient: it reads `Settings.lenience`.
    synthetic: verdicts are drawn and not decided, so the text means nothing. It cannot be chosen by its name.
    compares: what `events.Comparison` holds, as "value, bound".
    source: the paper.
    """

    name: str
    summary: str
    noise: Noise
    exact: bool = True
    same_text: bool = False
    samples: bool = True
    lenient: bool = False
    synthetic: bool = False
    compares: str = ""
    source: str = ""

    @property
    def label(self) -> str:
        """The name as a menu shows it."""
        return self.name if self.exact else f"{self.name} (lossy)"

    def verify(self, case: Case) -> Verdict:
        """The verdict on a draft."""
        return _function(self.name)(case)


def _function(name: str) -> Callable[[Case], Verdict]:
    verify: Callable[[Case], Verdict] = import_module(f".verification.{name}", __package__).verify
    return verify


_UNIFORM = "uniform number, acceptance probability"
TABLE = (
    Rule(
        "greedy",
        "Accept while the draft is the target's argmax. Same text in both lanes.",
        "none",
        same_text=True,
        samples=False,
        compares="probability of the draft, probability of the target's argmax",
    ),
    Rule(
        "coupled",
        "Draft and target tokens are drawn with the same noise, and a draft is accepted when it is the token the "
        "target draws: exact, and the same text in both lanes.",
        "shared",
        same_text=True,
        compares="p / noise of the draft, p / noise of the target's own token",
        source="Daliri et al. 2024, arXiv:2408.07978",
    ),
    Rule(
        "rejection",
        "Exact in distribution: the lanes may show different, equally likely texts.",
        "round",
        compares=_UNIFORM,
        source="Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318",
    ),
    Rule(
        "block",
        "Exact in distribution; accepts on average no fewer tokens than rejection, as a draft is judged as a whole.",
        "round",
        compares=_UNIFORM,
        source="Sun et al. 2024, arXiv:2403.10444",
    ),
    Rule(
        "threshold",
        "Lossy: accepts drafts that the target would refuse. The drift is measured.",
        "round",
        exact=False,
        lenient=True,
        compares=_UNIFORM,
        source="Leviathan et al. 2023, arXiv:2211.17192, appendix A.5",
    ),
    Rule(
        "synthetic",
        "Measures time alone: a draft is accepted with a given probability, whatever the target says.",
        "round",
        exact=False,
        synthetic=True,
        compares=_UNIFORM,
    ),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in TABLE if not rule.synthetic}  # those that may be chosen
SYNTHETIC = next(rule for rule in TABLE if rule.synthetic)


def default(temperature: float) -> Rule:
    """The rule that is used where none is named, and by a lane without a drafter whatever the rule: the target's argmax
    at temperature 0, else its own sample for the seed."""
    return RULES["greedy" if temperature == 0 else "coupled"]


def deciding(rule: Rule, temperature: float) -> Rule:
    """The rule that decides where `rule` was chosen: at temperature 0 every exact rule is the greedy one."""
    return default(0) if temperature == 0 and rule.exact else rule
