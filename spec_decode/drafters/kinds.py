"""The kinds of drafters, in one table: which names and checkpoints belong to each, and what it needs.

In: the name a person gave a drafter, or the `model_type` of a checkpoint. Out: its `Kind`. Loading, memory estimates
and help texts read this table and compare no names themselves. It imports no torch: the module of a drafter is imported
when one is loaded.

A new drafter is one module in this package and one entry here. The module defines the drafter's class and a function
`load(context)` that takes a `loading.drafter.LoadContext` and returns a `Drafter`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..loading.drafter import LoadContext
    from . import Drafter

ANY = ("*",)  # every `model_type` that no other kind claims
JOIN = "+"  # between the two names of a combination
PERSON = "person"  # in rounds whose draft a person typed (`person`); no drafter that can be chosen


@dataclass(frozen=True)
class Kind:
    """One kind of drafter.

    Attributes:
        name: of the kind. `--drafter` takes it where `by_name` holds; for a kind that reads checkpoints it then stands
            for the one made for the target.
        title: its name within a sentence.
        module: in this package, with the function `load`.
        description: one sentence for help texts.
        model_types: of the checkpoints that it reads; empty for a drafter without weights, `ANY` for the rest.
        hidden_layers: hidden states of the target that it reads; -1 is the last one, after the final norm.
        caches: it has a KV cache of its own, which counts in memory estimates.
        stands_alone: its checkpoints are language models, which can be targets as well.
        advises_length: the generation config of its checkpoint advises a draft length (`num_assistant_tokens`).
        combines: "NAME+this" drafts with either of two, see `either`.
    """

    name: str
    title: str
    module: str
    description: str
    model_types: tuple[str, ...] = ()
    by_name: bool = True
    hidden_layers: tuple[int, ...] = ()
    caches: bool = False
    stands_alone: bool = False
    advises_length: bool = False
    combines: bool = False

    def load(self, context: LoadContext) -> Drafter:
        """A drafter of this kind.

        Raises:
            ModelError: it cannot be loaded, or does not belong to the target.
        """
        drafter: Drafter = import_module(f".{self.module}", __package__).load(context)
        return drafter


KINDS: tuple[Kind, ...] = (
    Kind(
        "lookup",
        "prompt lookup",
        "lookup",
        "Prompt lookup: what followed the same few tokens earlier in the text is guessed to follow again.",
        combines=True,
    ),
    Kind(
        "suffix",
        "suffix decoding",
        "suffix",
        "Suffix decoding: what most often followed the end of the text earlier is drafted to follow again.",
        combines=True,
    ),
    Kind(
        "mtp",
        "MTP",
        "mtp",
        "Multi-token prediction: a small network guesses the next tokens from the target’s hidden states.",
        model_types=("gemma4_assistant", "gemma4_unified_assistant"),
        hidden_layers=(-1,),
        advises_length=True,
    ),
    Kind(
        "model",
        "draft model",
        "model",
        "Draft model: a smaller causal language model with the target’s tokenizer guesses the next tokens.",
        model_types=ANY,
        by_name=False,
        caches=True,
        stands_alone=True,
    ),
)


def named(name: str | None) -> Kind | None:
    """The kind that `--drafter` calls `name`, None where that is no kind's name."""
    return next((kind for kind in KINDS if kind.by_name and kind.name == name), None)


def of_checkpoint(model_type: str) -> Kind:
    """The kind of drafter that a checkpoint of this `model_type` is."""
    found = next((kind for kind in KINDS if model_type in kind.model_types), None)
    return found or next(kind for kind in KINDS if kind.model_types == ANY)


def split(name: str) -> tuple[str, tuple[Kind, ...]]:
    """A name as (name of the first drafter, kinds combined with it): "mtp+lookup" → ("mtp", (lookup,)), "mtp" → ("mtp",
    ()). An ending that names no kind which combines is part of the name."""
    first, joint, last = name.rpartition(JOIN)
    kind = named(last)
    if not joint or kind is None or not kind.combines:
        return name, ()
    name, kinds = split(first)
    return name, (*(other for other in kinds if other is not kind), kind)


def join(name: str, kind: Kind) -> str:
    """The name of the combination that `split` takes apart."""
    return f"{name}{JOIN}{kind.name}"


def combine(first: Drafter, second: Drafter) -> Drafter:
    """The drafter that drafts with `first` or `second`, whichever was accepted more often lately."""
    either: Drafter = import_module(".either", __package__).EitherDrafter(first, second)
    return either


def usage() -> str:
    """What `--drafter` takes, for its help."""
    names = ", ".join(kind.name for kind in KINDS if kind.by_name)
    endings = " or ".join(f"{JOIN}{kind.name}" for kind in KINDS if kind.combines)
    return f"{names}, a Hub id or a directory; with {endings} after it, either of the two drafts"
