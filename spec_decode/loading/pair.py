"""A pair ready to race: a target, its tokenizer, a drafter, and their costs.

In: the names of a target and a drafter ("embedded", "lookup", a Hub id, a local directory), a device, a dtype, options.
Out: a `Pair`, or a `ModelError` of one sentence.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel

from .. import sampling
from ..drafters import Drafter
from ..errors import ModelError, is_out_of_memory
from ..events import BASELINE, SPECULATIVE, Costs
from ..graphs import Recorder
from ..target import Target, choose_chunks
from ..text import can_think
from . import catalog, embedded, memory, quantized, revisions
from .catalog import EMBEDDED, Options
from .checkpoints import DTYPES, How, load_model, load_tokenizer, read_target_config
from .drafter import Choice, Loaded, choose_drafter, load_drafter
from .measure import measure_costs
from .placement import Plan, choose_threads, machine, make_plan
from .revisions import Revision
from .rollback import check_rollback

Say = Callable[[str], None]


class Pair:
    """A target, its tokenizer and a drafter, and what their passes and steps cost on their devices.

    Args:
        revision: of the target.

    Attributes:
        name: of the target, as it was given.
        plan: devices, dtype and options of both models.
        drafter: in use now; see `use_drafter`.
        context: positions that the target was made for, in tokens.
        costs: of a target pass and of a draft step, measured when the drafter was loaded.
        learned: the same corrected by the races since, None before the first; see `Race`.
        recorders: of rounds, by lane, on devices that have graphs.
    """

    def __init__(
        self, target: Target, tokenizer: Any, loaded: Loaded, name: str, plan: Plan, revision: Revision
    ) -> None:
        self.target = target
        self.tokenizer = tokenizer
        self.name = name
        self.plan = plan
        self.context = target.context
        self.costs: Costs | None = None
        self.learned: Costs | None = None
        self._loaded = loaded
        self._revision = revision
        lanes = {
            lane: Recorder.on(target.device, logging.getLogger("spec_decode").info) for lane in (BASELINE, SPECULATIVE)
        }
        self.recorders = {lane: recorder for lane, recorder in lanes.items() if recorder}

    @property
    def drafter(self) -> Drafter:
        return self._loaded.drafter

    @property
    def drafter_model(self) -> PreTrainedModel | None:
        """The weights that were loaded for the drafter, None for one without any."""
        return self._loaded.model

    @property
    def drafter_path(self) -> str:
        """Directory or Hub id of the drafter's checkpoint, empty for one without any."""
        return self._loaded.choice.path

    @property
    def drafters(self) -> tuple[str, ...]:
        """The names on offer for `use_drafter`, besides the one that was loaded with the target."""
        return catalog.drafters(self.name)

    @property
    def machine(self) -> dict[str, Any]:
        """What the pair runs on."""
        return {**machine(self.target.device), "prefill_chunks": self.target.chunks}

    @property
    def info(self) -> dict[str, str]:
        """{"target", "drafter", "device", "dtype"}, as names."""
        return {
            "target": embedded.NAME if self.name == EMBEDDED else self.name,
            "drafter": self.drafter.name,
            "device": str(self.target.device),
            "dtype": str(self.plan),
        }

    @property
    def revisions(self) -> dict[str, Revision]:
        """Which versions of the checkpoints were loaded: {"target", "drafter"}."""
        return {"target": self._revision, "drafter": self._loaded.revision}

    @property
    def draft_length(self) -> int | None:
        """The draft length that the drafter's own generation config advises, None where it advises none."""
        return self._loaded.advised_length

    @property
    def can_think(self) -> bool:
        """Whether the target's chat template has a switch for thinking."""
        return can_think(self.tokenizer)

    def left_out(self) -> list[str]:
        """A sentence for each of the two models in which bitsandbytes could not quantize every linear layer."""
        plan = self.plan
        parts: list[tuple[str, Any, How, torch.device]] = [("target", self.target.model, plan.target, plan.device)]
        if self._loaded.model is not None:
            parts.append(("drafter", self._loaded.model, plan.drafter, plan.drafter_device))
        lines = []
        for role, model, how, device in parts:
            if how.precision and (names := quantized.left_out(model, how.precision, device)):
                lines.append(quantized.sentence(names, how.precision, role, DTYPES[plan.dtype]))
        return lines

    def use_drafter(self, name: str | None) -> None:
        """Changes the drafter and measures the costs again; the target stays loaded.

        Args:
            name: as for `load_pair`.

        Raises:
            ModelError: there is no such drafter, or it does not fit the target or the memory; the one before stays.
        """
        choice = choose_drafter(name, self.name, self.target.config, self.plan.drafter.revision)
        _check_memory(self.plan, self.name, None, choice)
        gc.unfreeze()
        try:
            loaded = load_drafter(choice, self.target, self.tokenizer, self.plan)
            costs = measure_costs(self.target, loaded.drafter)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError("The drafter ran out of memory while it was loaded; the one before it stays.") from error
        finally:
            _leave_out_of_collections()
        self._loaded, self.costs, self.learned = loaded, costs, None


def load_pair(
    target: str = EMBEDDED,
    drafter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Say | None = None,
    **options: Unpack[Options],
) -> Pair:
    """Loads a pair and measures its costs.

    Args:
        target: "embedded", a Hub id, or a local directory.
        drafter: None for the target's own (lookup, where there is none), the name of a kind (`drafters.kinds`), a Hub
            id, or a local directory of an MTP drafter or of a causal model; with "+lookup" after it, prompt lookup
            drafts where it is likelier to be right.
        device: "auto" (CUDA, then MPS, then CPU), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float16 on MPS and on GPUs without bfloat16; on the CPU int8 for the embedded
            target, else float32), "int8" (CPU), "float32", "float16" or "bfloat16".
        progress: called with a short line at the start of each step.
        options: see `catalog.Options`.

    Raises:
        ModelError: a name, device or dtype that does not exist or fit; no network; no memory.
        SettingsError: a `quantize` or `attention` that cannot be used.
    """
    say = progress or (lambda line: None)
    gc.unfreeze()
    gc.collect()  # of a pair that nobody holds any more, before the memory that is free is looked at
    plan = make_plan(target, device, dtype, options)
    quantizes = plan.target.precision or plan.drafter.precision
    if quantizes and "cpu" in (plan.device.type, plan.drafter_device.type):
        say("bitsandbytes works on the CPU, but slowly: expect a fraction of the speed of float32")
    path = str(embedded.prepare(say)) if target == EMBEDDED else target
    name = embedded.NAME if target == EMBEDDED else target
    config = read_target_config(path, plan.target.revision)
    choice = choose_drafter(drafter, target, config.get_text_config(decoder=True), plan.drafter.revision)
    if target != EMBEDDED:
        _check_memory(plan, name, config, choice)
    say(f"Loading {name} …")
    tokenizer = load_tokenizer(path, plan.target.revision)
    try:
        loaded_target = Target(load_model(path, plan.device, plan.dtype, plan.target))
        if target != EMBEDDED:
            check_rollback(loaded_target, name, plan.target)
        say("Loading the drafter …")
        loaded = load_drafter(choice, loaded_target, tokenizer, plan)
        asked = plan.target.revision
        revision = revisions.of_embedded() if target == EMBEDDED else revisions.of_checkpoint(name, asked)
        pair = Pair(loaded_target, tokenizer, loaded, target, plan, revision)
        for line in pair.left_out():
            say(line)
        if pair.draft_length:
            say(f"The drafter comes with a draft length of {pair.draft_length}")
        _measure(pair, say)
        _leave_out_of_collections()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name} ran out of memory while it was loaded; quantize it, or choose a smaller one."
        ) from error
    say("Ready")
    return pair


def _leave_out_of_collections() -> None:
    """Python's full garbage collection visits every object of PyTorch and transformers. It takes 0.2 s, or 30 target
    passes, within the time of whichever lane is at work. It has nothing to find among what is loaded by now."""
    gc.collect()
    gc.freeze()


def _measure(pair: Pair, say: Say) -> None:
    """Chooses threads and chunks, and measures the costs."""
    int8 = pair.plan.dtype == "int8"
    once = " (the first start compiles for this processor, half a minute at most)" if int8 else ""
    say(f"Measuring the costs of a target pass{once} …")
    if pair.plan.device.type == "cpu":
        sampling.get_ready()
        choose_threads(pair.target, int8)
    choose_chunks(pair.target)
    pair.costs = measure_costs(pair.target, pair.drafter)


def _check_memory(plan: Plan, name: str, config: Any, choice: Choice) -> None:
    """Refuses a pair that cannot fit; `config` is None for a target that is loaded already.

    Raises:
        ModelError: by how much it is too large, and what would fit instead.
    """
    target = drafter = None
    dtype = DTYPES[plan.dtype]
    if config is not None:
        target = memory.Part(memory.empty(config), plan.device, dtype, plan.target.precision, spread=plan.target.spread)
    if choice.path:
        empty = memory.empty(choice.config)
        drafter = memory.Part(empty, plan.drafter_device, dtype, plan.drafter.precision, choice.kind.caches)
    memory.check(name, target, drafter, memory.free)
