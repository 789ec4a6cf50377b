"""From a round's tensors to its text and events: one copy to the host, and what is said of it.

In: the `Outcome` of `decode.decode_round`. Out: `HostRound`, everything the host needs of the round; then its tokens
with their text, probabilities, alternatives, and the numbers the rule compared. Decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .events import Alternative, Comparison, Residual, Role, Token
from .sampling import TOP, likeliest
from .text import TextStream

if TYPE_CHECKING:
    from .decode import Outcome


class HostRound(NamedTuple):
    """A round of one row as the host has it.

    ids: γ drafted tokens. accepted: how many of them stay. own: the target's own token after them.
    p: the target's probabilities of the drafted tokens, then of its own. q: the drafter's, where it tells them.
    target_top, drafter_top: the likeliest tokens at γ + 1 and at γ positions.
    compared: what the rule compared for each drafted token, None where nothing.
    residual: what the correction was drawn from.
    refused, kl: see `Verdict`.
    """

    ids: list[int]
    accepted: int
    own: int
    p: list[float]
    q: list[float] | None
    target_top: list[tuple[Alternative, ...]]
    drafter_top: list[tuple[Alternative, ...]]
    compared: list[Comparison | None]
    residual: Residual | None
    refused: int | None
    kl: float | None

    def told(self, count: int) -> HostRound:
        """The round without the tokens after the first `count` drafted ones, unless they were accepted: in a batch, a
        row whose drafter gave fewer tokens than another's is filled up."""
        kept = max(count, self.accepted)
        if kept >= len(self.ids):
            return self
        return self._replace(ids=self.ids[:kept], residual=self.residual if self.accepted < kept else None)


def to_host(outcome: Outcome, numbers: dict[str, list[float]] | None = None) -> HostRound:
    """Everything the host needs of a round of one row, in one copy.

    Args:
        numbers: of `gathered`, where they have been copied already (`transfer`).

    Raises:
        UserError: the logits are NaN, +inf, or −inf throughout.
    """
    return _host_round(_copied(outcome) if numbers is None else _finite(numbers), outcome.draft.ids.shape[1])


def rows_to_host(outcome: Outcome) -> list[HostRound]:
    """Everything the host needs of a round of several rows, in one copy; raises as `to_host`."""
    rows, n = outcome.draft.ids.shape
    host = _copied(outcome)

    def part(values: list[float], row: int) -> list[float]:
        size = len(values) // rows
        return values[row * size : (row + 1) * size]

    return [_host_round({name: part(values, row) for name, values in host.items()}, n) for row in range(rows)]


def _copied(outcome: Outcome) -> dict[str, list[float]]:
    """The numbers of all rows, one row after another."""
    return _finite((outcome.parts or gathered(outcome)).copy())


def _finite(host: dict[str, list[float]]) -> dict[str, list[float]]:
    """The numbers, if the target's probabilities are some."""
    if any(value != value for value in host["target values"][::TOP]):  # a row of p is NaN throughout, or not at all
        raise UserError(
            "The target produced logits that are not finite numbers; try another dtype or check its weights."
        )
    return host


def _host_round(host: dict[str, list[float]], n: int) -> HostRound:
    """What was copied of one row, with `n` drafted tokens."""
    accepted = int(host["accepted"][0])
    compared = host.get("compared", [])
    corrected = "mass" in host and accepted < n
    return HostRound(
        [int(x) for x in host["ids"]],
        accepted,
        int(host["own"][0]),
        [*host.get("p", []), *host["own p"]],
        host.get("q"),
        _tops(host, "target"),
        _tops(host, "drafter"),
        [_comparison(*compared[2 * i : 2 * i + 2]) for i in range(n)],
        Residual(host["mass"][0], _tops(host, "residual")[0]) if corrected else None,
        int(host["refused"][0]) if "refused" in host else None,
        host["kl"][0] if "kl" in host else None,
    )


def _comparison(value: float, bound: float) -> Comparison | None:
    """None where the rule compared nothing, which a verdict says by NaN."""
    return Comparison(value, bound) if math.isfinite(value) and math.isfinite(bound) else None


def gathered(outcome: Outcome) -> Parts:
    """What `to_host` copies, still on the device, one row after another. Reads nothing on the host."""
    draft, verdict, p = outcome.draft, outcome.verdict, outcome.p
    n = draft.ids.shape[1]
    parts = Parts()
    parts.add("accepted", verdict.accepted)
    parts.add("own", verdict.token)
    parts.add("ids", draft.ids)
    if n:
        parts.add("p", p[:, :n].gather(-1, draft.ids[..., None]))
        parts.add("compared", verdict.compared)
    parts.add("own p", p.flatten(1).gather(1, (verdict.accepted * p.shape[-1] + verdict.token)[:, None]))
    parts.add_top("target", likeliest(p, TOP))
    if n and draft.confidence is not None:
        parts.add("q", draft.confidence)
    if n and draft.top is not None:
        parts.add_top("drafter", draft.top)
    if n and verdict.residual is not None:
        mass = verdict.residual.sum(-1)
        parts.add("mass", mass)
        parts.add_top("residual", likeliest(verdict.residual / mass.clamp_min(1e-30)[:, None], TOP))
    if verdict.refused is not None and verdict.kl is not None:
        parts.add("refused", verdict.refused)
        parts.add("kl", verdict.kl)
    return parts


@dataclass
class Parts:
    """Tensors by name on their way to the host, in one copy.

    names, tensors: of one dimension each.
    joined: all of them in one float32 tensor, where that was made already. Ids below 2^24 are exact in float32.
    """

    names: list[str] = field(default_factory=list)
    tensors: tuple[Tensor, ...] = ()
    joined: Tensor | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        self.names.append(name)
        self.tensors += (tensor.reshape(-1),)

    def add_top(self, name: str, top: tuple[Tensor, Tensor]) -> None:
        self.add(f"{name} ids", top[0])
        self.add(f"{name} values", top[1])

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers each name has, in the order they are copied in."""
        return {name: tensor.shape[0] for name, tensor in zip(self.names, self.tensors, strict=True)}

    def join(self) -> Tensor:
        """All numbers in one float32 tensor."""
        return torch.cat([tensor.float() for tensor in self.tensors]) if self.joined is None else self.joined

    def copy(self) -> dict[str, list[float]]:
        """The numbers on the host, by name. Waits for the device."""
        if self.joined is None and self.tensors[0].device.type == "cpu":  # they are there, and joining takes longer
            return {name: tensor.tolist() for name, tensor in zip(self.names, self.tensors, strict=True)}
        return split(self.join().tolist(), self.sizes)


def split(values: list[float], sizes: dict[str, int]) -> dict[str, list[float]]:
    """The numbers of `Parts.join` by name."""
    out, at = {}, 0
    for name, size in sizes.items():
        out[name] = values[at : at + size]
        at += size
    return out


def _tops(host: dict[str, list[float]], name: str) -> list[tuple[Alternative, ...]]:
    """The alternatives of every row, those of probability 0 left out."""
    ids, values = host.get(f"{name} ids", []), host.get(f"{name} values", [])
    rows = ((ids[i : i + TOP], values[i : i + TOP]) for i in range(0, len(ids), TOP))
    return [tuple(Alternative(int(i), p) for i, p in zip(*row, strict=True) if p > 0) for row in rows]


def narrate(
    host: HostRound, emitted: Sequence[int], text: TextStream, last: bool
) -> tuple[tuple[Token, ...], Residual | None]:
    """The round's tokens in display order, and the residual its correction was drawn from.

    Args:
        emitted: accepted tokens and the target's own, cut after one that ends the text.
        text: of the lane so far; it gets the emitted tokens.
        last: the text ends with this round.
    """
    ids, accepted = host.ids, host.accepted

    def drafted(i: int, stream: TextStream, role: Role) -> Token:
        q = host.q[i] if host.q and math.isfinite(host.q[i]) else None
        drafter_top = host.drafter_top[i] if i < len(host.drafter_top) else ()
        return Token(
            ids[i], stream.push(ids[i]), role, host.p[i], q, i + 1, host.target_top[i], drafter_top, host.compared[i]
        )

    tokens = [drafted(i, text, "accepted") for i in range(min(accepted, len(emitted)))]
    residual: Residual | None = None
    if len(emitted) > accepted:
        aside = text.fork()
        tokens += [drafted(i, aside, "rejected") for i in range(accepted, len(ids))]
        role: Role = "target" if not ids else "bonus" if accepted == len(ids) else "correction"
        residual = host.residual
        tokens.append(Token(host.own, text.push(host.own), role, host.p[-1], target_top=host.target_top[accepted]))
    if last and (tail := text.flush()):
        end = tokens[-1]
        tokens[-1] = replace(end, text=end.text + tail)
    return tuple(tokens), residual
