"""Drafters by name: found, checked, loaded.

In: the name of a drafter, and the target it is for. Out: a `Choice`, which says what the name stands for before any
weights are read; then a `Loaded` drafter, or a `ModelError`. What differs between kinds is in `drafters.kinds` and in
the `load` function of each drafter's module, which works with a `LoadContext`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..drafters import Drafter, kinds
from ..drafters.kinds import Kind
from ..errors import ModelError
from ..paths import ASSETS
from ..target import Target, choose_chunks
from . import catalog, checksums, embedded, revisions
from .catalog import EMBEDDED
from .checkpoints import load_assistant, load_model, load_tokenizer, read_config
from .placement import Plan
from .revisions import Revision
from .rollback import check_rollback

SHIPPED = ASSETS / "drafter"


@dataclass(frozen=True)
class Choice:
    """What the name of a drafter stands for beside a given target.

    Attributes:
        kind: of the drafter.
        name: shown to users.
        path: Hub id or directory of its checkpoint, empty for a kind without one.
        config: of the checkpoint.
        combined: kinds whose drafters are combined with it, in this order.
    """

    kind: Kind
    name: str
    path: str = ""
    config: Any = None
    combined: tuple[Kind, ...] = ()


def choose_drafter(name: str | None, target: str, config: Any, revision: str | None = None) -> Choice:
    """What `name` stands for, None for the target's own.

    Args:
        target: its name.
        config: its text configuration.
        revision: of the drafter's repository.

    Raises:
        ModelError: there is no such drafter, or none of this kind for the target.
    """
    first, combined = kinds.split(name or catalog.own_drafter(target))
    if not first:  # "+lookup" alone: beside the target's own
        first, own = kinds.split(catalog.own_drafter(target))
        combined = (*(kind for kind in own if kind not in combined), *combined)
    kind = kinds.named(first)
    if kind and not kind.model_types:
        return Choice(kind, kind.name, combined=tuple(other for other in combined if other is not kind))
    path = str(embedded.prepare()) if first == EMBEDDED else _made_for(kind, target, config) if kind else first
    found = read_config(path, revision)
    kind = kinds.of_checkpoint(found.model_type)
    shown = kind.name if path == str(SHIPPED) else embedded.NAME if path == _embedded() else path
    return Choice(kind, shown, path, found, combined)


def _embedded() -> str:
    return str(embedded.cache_dir() / embedded.NAME)


def _made_for(kind: Kind, target: str, config: Any) -> str:
    """Path or Hub id of the checkpoint of this kind that was made for a target.

    Raises:
        ModelError: there is none.
    """
    entry = catalog.find(target)
    if entry and entry.drafter_kind in kind.model_types:
        return entry.drafter
    shipped = read_config(str(SHIPPED))
    sizes = (shipped.get_text_config().vocab_size, shipped.backbone_hidden_size)
    if shipped.model_type in kind.model_types and sizes == (config.vocab_size, getattr(config, "hidden_size", None)):
        return str(SHIPPED)
    raise ModelError(f"This target has no {kind.title} drafter here; train one (train-drafter), or choose lookup.")


@dataclass
class LoadContext:
    """What the `load` function of a drafter's module works with.

    Attributes:
        target: loaded already.
        tokenizer: the target's.
        choice: which drafter.
        plan: devices, dtype and options.
        model: the weights that were loaded, None before and for a kind without any.
    """

    target: Target
    tokenizer: Any
    choice: Choice
    plan: Plan
    model: PreTrainedModel | None = field(default=None, init=False)

    def assistant(self) -> PreTrainedModel:
        """The weights of a drafter that is no language model of its own, checked against the sums beside them.

        Raises:
            ModelError: see `checkpoints.load_assistant`.
        """
        plan = self.plan
        self.model = load_assistant(self.choice.path, plan.drafter_device, plan.dtype, plan.drafter)
        return self.model

    def causal_model(self) -> Target:
        """A language model, checked like a target.

        Raises:
            ModelError: see `checkpoints.load_model` and `rollback.check_rollback`.
        """
        plan, path = self.plan, self.choice.path
        self.model = load_model(path, plan.drafter_device, plan.dtype, plan.drafter)
        model = Target(self.model)
        check_rollback(model, path, plan.drafter)
        choose_chunks(model)
        return model

    def own_tokenizer(self) -> Any:
        """The tokenizer of the drafter's checkpoint.

        Raises:
            ModelError: see `checkpoints.load_tokenizer`.
        """
        return load_tokenizer(self.choice.path, self.plan.drafter.revision)


@dataclass(frozen=True)
class Loaded:
    """A drafter that is ready, with `model`, the weights that were loaded for it, None for a kind without any."""

    drafter: Drafter
    choice: Choice
    model: PreTrainedModel | None
    revision: Revision

    @property
    def advised_length(self) -> int | None:
        """The draft length that the generation config of its checkpoint advises."""
        if self.model is None or not self.choice.kind.advises_length:
            return None
        return getattr(self.model.generation_config, "num_assistant_tokens", None)


def load_drafter(choice: Choice, target: Target, tokenizer: Any, plan: Plan) -> Loaded:
    """Loads the drafter, and those that are combined with it.

    Raises:
        ModelError: it cannot be loaded, or does not belong to the target.
    """
    context = LoadContext(target, tokenizer, choice, plan)
    drafter = choice.kind.load(context)
    for kind in choice.combined:
        other = kind.load(LoadContext(target, tokenizer, Choice(kind, kind.name), plan))
        drafter = kinds.combine(drafter, other)
    return Loaded(drafter, choice, context.model, _revision(choice, plan.drafter.revision))


def _revision(choice: Choice, asked: str | None) -> Revision:
    """Of the checkpoint that was loaded; `asked` is the revision that was asked for."""
    if not choice.path:
        return {"id": choice.name, "revision": None, "sha256": None}
    if choice.path == _embedded():
        return revisions.of_embedded()
    if choice.path == str(SHIPPED):
        return {"id": choice.name, "revision": None, "sha256": checksums.read(SHIPPED)}
    found = revisions.of_checkpoint(choice.path, asked)
    if not choice.kind.stands_alone:  # `load_assistant` has compared the sums beside it
        found["sha256"] = checksums.read(Path(choice.path)) or found["sha256"]
    return found
