"""Whether a peer's speed is bought with fidelity: its distributions against float32, and its draws against its own.

In: seats of engines, prompt ids. Out: KL divergences in nats, and p-values of chi-square tests. Both are bounded in
texts, positions and draws.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..settings import Settings
    from .seats import Seat

TEXTS = 3
POSITIONS = 8  # of a text
DRAWS = 200  # pairs of tokens
_FIRST = 3  # most likely first tokens after which the second one is compared
_ROUNDING = 1e-9  # expected draws of all other pairs at least: those that float32 rounds to none contradict nothing
_REPEATED = 8  # tokens of the prompt's end, which the text to draw after repeats, so that lookup drafts


@dataclass(frozen=True)
class ChiSquare:
    """A chi-square test of drawn pairs of tokens. "own" says whether they are compared with the distribution that the
    engine gives itself; else with float32. p is None where too few cells expect `prove.chi_square.LEAST` draws."""

    draws: int
    cells: int
    statistic: float | None
    p: float | None
    own: bool


class Reference:
    """Texts with the float32 distributions of the target's weights.

    seat: of transformers, which has them in float32.
    texts: `TEXTS` prompts, each with `POSITIONS` − 1 tokens of the target's continuation.
    stop: ids that end a text.
    """

    def __init__(self, seat: Seat, prompts: Sequence[list[int]], stop: Sequence[int] = ()) -> None:
        self.stop = frozenset(stop)
        self._seat = seat
        self.texts: list[list[int]] = []
        for ids in prompts[:TEXTS]:
            drawn = seat.ask({"do": "draw", "ids": ids, "tokens": POSITIONS - 1, "seeds": [0], "stop": False})
            self.texts.append([*ids, *drawn["ids"][0]])
        found = predicted(seat, self.texts, POSITIONS)
        assert found is not None
        self.logs = found

    def after(self, texts: Sequence[list[int]]) -> np.ndarray:
        """Log-probabilities of the next token after each text, `[texts, vocabulary]`."""
        found = predicted(self._seat, texts, 1)
        assert found is not None
        return found[:, 0]

    def close(self) -> None:
        """Ends the engine that makes the distributions."""
        self._seat.close()


def predicted(seat: Seat, texts: Sequence[list[int]], last: int) -> np.ndarray | None:
    """An engine's log-probabilities of the token after each of the last prefixes of each text,
    `[texts, last, vocabulary]`; None where it gives none.

    Raises:
        ModelError: the engine failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logs.npy"  # too much for the pipe
        asked = {"do": "predict", "texts": [list(ids) for ids in texts], "last": last, "path": str(path)}
        return np.load(path) if seat.ask(asked)["given"] else None


def divergence(exact: np.ndarray, logs: np.ndarray) -> float:
    """KL(exact ‖ logs) in nats, averaged over positions. Both are log-probabilities `[…, vocabulary]`; entries beyond
    the shorter vocabulary, which pads, are left out. Rounding does not make it negative."""
    width = min(exact.shape[-1], logs.shape[-1])
    ours, theirs = exact[..., :width].astype(np.float64), logs[..., :width].astype(np.float64)
    return max(0.0, float((np.exp(ours) * (ours - theirs)).sum(-1).mean()))


def kl(seat: Seat, reference: Reference) -> float | None:
    """Mean KL(float32 ‖ engine) in nats over all positions of the texts; None where it gives no distribution."""
    logs = predicted(seat, reference.texts, POSITIONS)
    return None if logs is None else divergence(reference.logs, logs)


def fidelity(seat: Seat, reference: Reference, settings: Settings) -> dict[str, Any]:
    """What is known of an engine's distributions: {"kl", "positions", "chi_square"}.

    kl: mean KL(float32 ‖ engine) in nats over "positions"; None where the engine gives no distribution.
    chi_square: a `ChiSquare`, None at temperature 0.

    Raises:
        ModelError: the engine failed.
    """
    tested = chi_square(seat, reference, settings) if settings.temperature > 0 else None
    return {
        "kl": kl(seat, reference),
        "positions": reference.logs.shape[0] * reference.logs.shape[1],
        "chi_square": asdict(tested) if tested else None,
    }


def _probabilities(logs: np.ndarray, settings: Settings) -> np.ndarray:
    """Probabilities `[…, vocabulary]` that tokens are drawn with, from log-probabilities at temperature 1."""
    import torch

    from ..sampling import distribution

    found: np.ndarray = distribution(torch.from_numpy(logs.astype(np.float32)), settings).double().numpy()
    return found


def chi_square(seat: Seat, reference: Reference, settings: Settings, draws: int = DRAWS) -> ChiSquare:
    """Draws pairs of tokens and compares how often each occurs with the distribution that the engine claims.

    The first token of a pair may come from the prefill, the second from a draft that was accepted or corrected. A stop
    token that is drawn first ends the draw. The text to draw after is a prompt whose end is repeated; where that leaves
    one likely pair only, the prompt itself.
    """
    from ..prove.chi_square import LEAST

    ids = reference.texts[0][: 1 - POSITIONS]
    found = ChiSquare(0, 1, None, None, True)
    for text in ([*ids, *ids[-_REPEATED:], *ids[-_REPEATED:]], ids):
        expected, own = _pairs(seat, reference, settings, text)
        cells = {pair: p for pair, p in expected.items() if p * draws >= LEAST}
        if len(cells) < 2:
            continue
        seeds = [settings.seed + number for number in range(draws)]
        drawn = _drawn(seat, text, settings, seeds)
        counts = Counter(tuple(pair) for pair in drawn)
        found = _tested(counts, cells, draws, own)
        break
    return found


def _drawn(seat: Seat, text: list[int], settings: Settings, seeds: list[int]) -> list[list[int]]:
    asked = {"do": "draw", "ids": text, "tokens": 2, "temperature": settings.temperature, "seeds": seeds, "stop": True}
    found: list[list[int]] = seat.ask(asked)["ids"]
    return found


def _pairs(
    seat: Seat, reference: Reference, settings: Settings, text: list[int]
) -> tuple[dict[tuple[int, ...], float], bool]:
    """Probabilities of the pairs whose first token is one of the likeliest, and whether the engine gave them."""

    def after(texts: Sequence[list[int]]) -> tuple[np.ndarray, bool]:
        logs = predicted(seat, texts, 1)
        return (reference.after(texts), False) if logs is None else (logs[:, 0], True)

    logs, own = after([text])
    first = _probabilities(logs, settings)[0]
    likely = [int(token) for token in np.argsort(first)[::-1][:_FIRST] if first[token] > 0]
    found: dict[tuple[int, ...], float] = {(token,): float(first[token]) for token in reference.stop if token in likely}
    going = [token for token in likely if token not in reference.stop]
    if going:
        seconds = _probabilities(after([[*text, token] for token in going])[0], settings)
        for token, second in zip(going, seconds, strict=True):
            found |= {(token, int(other)): float(first[token] * second[other]) for other in np.flatnonzero(second)}
    return found, own


def _tested(counts: Counter[Any], cells: dict[tuple[int, ...], float], draws: int, own: bool) -> ChiSquare:
    """The test of these cells and of one for all other pairs, which is pooled with the rarest where it is rare."""
    from ..prove import chi_square as pearson

    observed = [counts[pair] for pair in cells]
    expected = [p * draws for p in cells.values()]
    rest = max(_ROUNDING, draws - sum(expected))
    fit = pearson.chi_square(np.array([*observed, draws - sum(observed)]), np.array([*expected, rest]))
    return ChiSquare(draws, fit.freedom + 1, fit.statistic, fit.p_value, own)
