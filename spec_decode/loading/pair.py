"""A pair ready to race: a target, its tokenizer, a drafter, and their costs.

In: the names of a target and a drafter ("embedded", "lookup", a Hub id, a local directory), a device, a dtype, options.
Out: a `Pair`, or a `ModelError` of one sentence.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel

from .. import attention, sampling
from ..drafters import Drafter, kinds
from ..drafters.mtp import MTPDrafter
from ..errors import ModelError, is_out_of_memory
from ..events import BASELINE, SPECULATIVE, Costs, Note
from ..graphs import Recorder
from ..target import Target, choose_chunks
from ..text import can_think
from . import catalog, compiling, embedded, memory, quantized, revisions
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
        self._notes: list[Note] = []
        self.recorders: dict[str, Recorder] = {}
        for lane in (BASELINE, SPECULATIVE):
            if recorder := Recorder.on(target.device, partial(self._note, lane)):
                self.recorders[lane] = recorder

    def _note(self, lane: str, line: str) -> None:
        self._notes.append(Note(lane, line, lasting=bool(self.recorders[lane].refused)))
        logging.getLogger("spec_decode").info("%s: %s", lane, line)

    def take_notes(self) -> list[Note]:
        """What the recorders have said since the last call."""
        taken, self._notes = self._notes, []
        return taken

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
            "dtype": f"{self.plan}, batch-invariant" if self.target.padded else str(self.plan),
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
            costs = measure_costs(self.target, loaded.drafter, recorders=self.recorders)
            self.take_notes()  # of recordings that no race has waited for
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
        loaded_target.padded = bool(options.get("batch_invariant"))
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
        _measure(pair, say, compiles=bool(options.get("compile")))
        _leave_out_of_collections()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name} ran out of memory while it was loaded; quantize it, or choose a smaller one."
        ) from error
    say("Ready")
    return pair


def assemble(
    name: str, target: PreTrainedModel, assistant: PreTrainedModel, tokenizer: Any, batch_invariant: bool = False
) -> Pair:
    """A pair of models that are in memory already, each on its device: a target and an MTP drafter. Measures its costs
    as `load_pair` does.

    Raises:
        ModelError: the drafter does not belong to the target, or a rollback changes what the target predicts.
    """
    gc.unfreeze()
    hows = [How(_precision(model)) for model in (target, assistant)]
    dtype = next(name for name, known in DTYPES.items() if known == target.dtype)
    plan = Plan(target.device, assistant.device, dtype, *hows)
    made = Target(target.requires_grad_(False))
    made.padded = batch_invariant
    check_rollback(made, name, plan.target)
    choice = Choice(kinds.of_checkpoint(assistant.config.model_type), f"{name}-assistant", config=assistant.config)
    drafter = MTPDrafter(assistant.requires_grad_(False), made)
    unknown: Revision = {"id": name, "revision": None, "sha256": None}
    pair = Pair(made, tokenizer, Loaded(drafter, choice, assistant, unknown), name, plan, unknown)
    _measure(pair, lambda line: None)
    _leave_out_of_collections()
    return pair


def _precision(model: PreTrainedModel) -> str | None:
    """What bitsandbytes quantized its linear layers to, a name of `catalog.PRECISIONS`."""
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8"
    return "nf4" if getattr(model, "is_loaded_in_4bit", False) else None


def _leave_out_of_collections() -> None:
    """Python's full garbage collection visits every object of PyTorch and transformers. It takes 0.2 s, or 30 target
    passes, within the time of whichever lane is at work. It has nothing to find among what is loaded by now."""
    gc.collect()
    gc.freeze()


def _measure(pair: Pair, say: Say, compiles: bool = False) -> None:
    """Chooses threads, attention and chunks, compiles the target where that is asked for, records rounds where there
    are graphs, and measures the costs.

    Raises:
        ModelError: it cannot be compiled.
    """
    int8 = pair.plan.dtype == "int8"
    once = " (the first start compiles for this processor, half a minute at most)" if int8 else ""
    say(f"Measuring the costs of a target pass{once} …")
    if pair.plan.device.type == "cpu":
        sampling.get_ready()
        choose_threads(pair.target, int8)
    if pair.plan.device.type == "cuda" and not pair.plan.target.attention:
        attention.choose(pair.target)
        check_rollback(pair.target, pair.info["target"], pair.plan.target)  # with the masks of the one that was chosen
    if compiles:
        if int8:
            raise ModelError("int8 on the CPU runs in compiled kernels of its own; leave --compile out.")
        say("Compiling the target's layers …")
        compiling.compile_layers(pair.target)
    choose_chunks(pair.target)
    if pair.recorders:
        say("Recording rounds as CUDA graphs …")
        _check_recordings(pair)
    pair.costs = measure_costs(pair.target, pair.drafter, recorders=pair.recorders)
    for note in pair.take_notes():
        if note.lasting:
            say(str(note))


def _check_recordings(pair: Pair) -> None:
    """Gives up recording where memory would not hold it beside what a race needs anyway."""
    device, dtype = pair.target.device, DTYPES[pair.plan.dtype]
    need = memory.Part(pair.target.model, device, dtype).need
    wanted, there = need.cache + need.workspace + need.recordings, memory.free_on(device)
    if wanted > there:
        for recorder in pair.recorders.values():
            recorder.refuse(
                f"they and a race take {memory.gigabytes(wanted)} of memory, and {memory.gigabytes(there)} are free"
            )


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
