"""Suffix decoding: what followed the end of the text before, weighted by how often (Oliaro et al. 2024,
arXiv:2411.04975; vLLM's `suffix`).

A trie holds every sequence of up to `depth` tokens that has occurred in prompt and output, with its count. A draft
follows the likeliest continuations from the longest ends of the text that have occurred before; the one with the most
expected accepted tokens is taken. Unlike prompt lookup it weighs all earlier places, and it ends where they disagree.
Here the trie holds one sequence only: nothing of one visitor's text is seen by another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..draft_length import EarlyStop
from ..settings import Settings
from ..state import State
from . import Draft, early
from .matching import MatchingDrafter

if TYPE_CHECKING:
    from ..loading.drafter import LoadContext


class _Node:
    """A sequence of tokens: how often it occurred with a token after it or at the end, and those one token longer."""

    __slots__ = ("children", "count")

    def __init__(self) -> None:
        self.count = 0
        self.children: dict[int, _Node] = {}

    def likeliest(self) -> tuple[int, _Node, float]:
        """The most frequent next token, of equals the latest seen; its node; its share of what followed."""
        token, child = max(reversed(self.children.items()), key=lambda item: item[1].count)
        return token, child, child.count / sum(node.count for node in self.children.values())


class SuffixDrafter(MatchingDrafter):
    """Drafts from a suffix trie of the sequence.

    Args:
        depth: tokens of the longest sequence that is remembered.
        remembered: tokens of the prompt's end that go into the trie; a token takes up to `depth` nodes.
        factor: a match of n tokens is followed for at most `factor` · n tokens.
        least: share of what followed before, below which a draft ends (vLLM: min_token_prob).
    """

    name = "suffix"
    sizes = (5, 4, 3, 2, 1)  # longer matches count as 5

    def __init__(
        self,
        device: torch.device | str = "cpu",
        depth: int = 16,
        factor: float = 2.0,
        least: float = 0.1,
        remembered: int = 2048,
    ) -> None:
        self.device = torch.device(device)
        self.depth, self.factor, self.least, self.remembered = depth, factor, least, remembered
        self._clear()

    def _clear(self) -> None:
        self.root = _Node()
        self.ends: list[_Node] = [self.root]  # nodes of the last 0, 1, 2, … tokens

    def start(self, prompt: list[int], settings: Settings, capacity: int) -> None:
        self._clear()
        self.extend(prompt[-self.remembered :])

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            grown = [self.root]
            for node in self.ends[: self.depth]:
                child = node.children.pop(token, None) or _Node()
                node.children[token] = child  # last in order: the latest seen
                child.count += 1
                grown.append(child)
            self.ends = grown

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        _, ids, shares = self.follow(length)
        kept = len(ids)
        if stop is not None:
            kept = next((n for n in range(1, kept) if not stop.go_on(shares[:n])), kept)
        confidence = torch.tensor([shares[:kept]], dtype=torch.float32, device=self.device)
        return early(replace(self.drafted(ids[:kept]), confidence=confidence), stop, len(ids))

    def match(self, length: int) -> tuple[int, list[int]]:
        size, ids, _ = self.follow(length)
        return min(size, self.sizes[0]), ids

    def follow(self, length: int) -> tuple[int, list[int], list[float]]:
        """The size of the match, 0 if there is none; up to `length` tokens that may come next; and of each the share of
        its continuation among those seen."""
        best: tuple[int, list[int], list[float]] = (0, [], [])
        most = 0.0
        for size in range(len(self.ends) - 1, 0, -1):
            node = self.ends[size]
            ids: list[int] = []
            shares: list[float] = []
            reach, expected = 1.0, 0.0
            while len(ids) < min(length, self.factor * size) and node.children:
                token, node, share = node.likeliest()
                reach *= share
                if reach < self.least:
                    break
                ids.append(token)
                shares.append(share)
                expected += reach
            if expected > most:
                best, most = (size, ids, shares), expected
        return best

    def close(self) -> None:
        self._clear()


def load(context: LoadContext) -> SuffixDrafter:
    """The drafter beside a target; see `kinds.Kind.load`."""
    return SuffixDrafter(context.target.device)
