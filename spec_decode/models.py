"""Loading: names go in, a `Pair` ready to race comes out.

In: a target and a drafter by name ("embedded", "lookup", a Hub id, a local directory), where they are to go and in
what precision. Out: a `Pair` with its measured costs, or a `ModelError` of one sentence.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from . import catalog, cpu, embedded, memory, quantized, sampling
from .catalog import EMBEDDED
from .checkpoints import (
    DTYPES,
    How,
    is_assistant,
    load_assistant,
    load_model,
    load_tokenizer,
    read_config,
    read_target_config,
)
from .costs import isotonic
from .drafters import Drafter
from .drafters.either import EitherDrafter
from .drafters.lookup import LookupDrafter
from .drafters.model import ModelDrafter, check_same_vocabulary
from .drafters.mtp import MTPDrafter
from .errors import ModelError, is_out_of_memory
from .events import Costs
from .kernels import sharing
from .settings import MAX_DRAFT_LENGTH, Settings
from .target import Target, choose_chunks
from .text import can_think

Say = Callable[[str], None]

LOOKUP = "lookup"
MTP = "mtp"
BESIDE = f"+{LOOKUP}"  # a drafter's name may end so: prompt lookup where that does better
OWN = f"{MTP}{BESIDE}"  # the embedded target's drafter
SHIPPED = Path(__file__).parents[1] / "assets" / "drafter"
_MEASURED = (0, 1, 2, 3, 0, 4, 6, 8, 0, 12, 16)  # tokens drafted before a pass; plain steps lie between
_DRAFTED = 5
_MOST_REPEATS = 15
_PROBE = 8  # tokens on each side of the rollback that tries a model out
# Of the spread of logits: more than rounding does in float32, less than a state that is not rolled back.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Plan:
    """Where the two models of a pair go, and how."""

    device: torch.device
    drafter_device: torch.device
    dtype: str
    target: How
    drafter: How

    def __str__(self) -> str:
        chosen = {"target": self.target.precision, "drafter": self.drafter.precision}
        held = ", ".join(f"{who} {precision}" for who, precision in chosen.items() if precision)
        return f"{self.dtype} ({held})" if held else self.dtype


class Pair:
    """A target, its tokenizer and a drafter, with the costs measured where they are.

    Attributes:
        info: {"target", "drafter", "device", "dtype"}, as names.
        context: positions there is room for, in tokens.
        costs: of a target pass and of a draft step; measured when the pair is loaded.
        learned: the same brought up to date by the races since, None before the first; see `Race`.
        draft_length: what the drafter's own generation config advises, or None.
        machine: what it runs on.
    """

    def __init__(self, target: Target, tokenizer: Any, drafter: Drafter, name: str, plan: Plan) -> None:
        self.target = target
        self.tokenizer = tokenizer
        self.drafter = drafter
        self.name = name
        self.plan = plan
        self.context = target.context
        self.costs: Costs | None = None
        self.learned: Costs | None = None

    @property
    def machine(self) -> dict[str, Any]:
        return {**machine(self.target.device), "prefill_chunks": self.target.chunks}

    @property
    def info(self) -> dict[str, str]:
        return {
            "target": embedded.NAME if self.name == EMBEDDED else self.name,
            "drafter": self.drafter.name,
            "device": str(self.target.device),
            "dtype": str(self.plan),
        }

    def left_out(self) -> list[str]:
        """A sentence for each of the two models in which bitsandbytes could not quantize every linear layer."""
        held: list[tuple[str, Any, How, torch.device]] = [
            ("target", self.target.model, self.plan.target, self.plan.device)
        ]
        drafter = self._drafter_proper
        if isinstance(drafter, (MTPDrafter, ModelDrafter)):
            model = drafter.model.model if isinstance(drafter, ModelDrafter) else drafter.model
            held.append(("drafter", model, self.plan.drafter, self.plan.drafter_device))
        lines = []
        for who, model, how, device in held:
            if how.precision and (names := quantized.left_out(model, how.precision, device)):
                lines.append(quantized.sentence(names, how.precision, who, DTYPES[self.plan.dtype]))
        return lines

    @property
    def _drafter_proper(self) -> Drafter:
        """Without the lookup beside it."""
        return self.drafter.other if isinstance(self.drafter, EitherDrafter) else self.drafter

    @property
    def draft_length(self) -> int | None:
        drafter = self._drafter_proper
        if not isinstance(drafter, MTPDrafter):
            return None
        return getattr(drafter.model.generation_config, "num_assistant_tokens", None)

    @property
    def can_think(self) -> bool:
        """Whether the target's chat template has a switch for thinking."""
        return can_think(self.tokenizer)

    def use_drafter(self, name: str | None) -> None:
        """Changes the drafter and measures anew; the target stays loaded.

        Raises:
            ModelError: there is no such drafter, or it does not fit the target or the memory.
        """
        source, beside = _drafter_source(name, self.name, self.target.config)
        _check_memory(self.plan, self.name, None, source)
        try:
            drafter = _load_drafter(source, beside, self.target, self.tokenizer, self.plan)
            costs = measure_costs(self.target, drafter)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError("The drafter ran out of memory while it was loaded; the one before it stays.") from error
        self.drafter, self.costs, self.learned = drafter, costs, None


def load_pair(
    target: str = EMBEDDED,
    drafter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Say | None = None,
    *,
    quantize: str | None = None,
    drafter_device: str | None = None,
    device_map: str | None = None,
    attention: str | None = None,
    target_revision: str | None = None,
    drafter_revision: str | None = None,
) -> Pair:
    """Loads a pair and measures its costs.

    Args:
        target: "embedded", a Hub id, or a local directory.
        drafter: None for the target's own (lookup, where there is none), "lookup", "mtp", a Hub id, or a local
            directory of a Gemma 4 assistant or of a causal model; with "+lookup" behind it, prompt lookup drafts where
            it is likelier to be right.
        device: "auto" (CUDA, then MPS, then CPU), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float16 on MPS and on GPUs without bfloat16; on the CPU int8 for the embedded
            target, else float32), "int8" (CPU), "float32", "float16" or "bfloat16".
        progress: hears what is being done, a short line at a time.
        quantize: linear layers through bitsandbytes, as `catalog.quantization` reads it.
        drafter_device: another device for the drafter.
        device_map: "auto" spreads the target over all GPUs.
        attention: "sdpa" or "eager"; None leaves it to transformers.
        target_revision, drafter_revision: a branch, tag or commit.

    Raises:
        ModelError: a name, device or dtype that does not exist or fit; no network; no memory.
        SettingsError: a `quantize` or `attention` that cannot be used.
    """
    say = progress or (lambda line: None)
    precisions, kernels = catalog.quantization(quantize), catalog.attention(attention)
    place = find_device(device)
    plan = Plan(
        place,
        place if drafter_device in (None, "") else find_device(str(drafter_device)),
        _dtype(dtype, place, target),
        How(precisions.get("target"), device_map == "auto", kernels, target_revision),
        How(precisions.get("drafter"), False, kernels, drafter_revision),
    )
    if device_map not in (None, "", "auto"):
        raise ModelError(f"Unknown device map {device_map!r}; the only one is auto.")
    if plan.dtype == "int8" and (precisions or device_map):
        raise ModelError("The dtype int8 is a quantization of its own; choose float32 or bfloat16 with --quantize.")
    if precisions and "cpu" in (plan.device.type, plan.drafter_device.type):
        say("bitsandbytes works on the CPU, but slowly: expect a fraction of the speed of float32")
    path = str(embedded.prepare(say)) if target == EMBEDDED else target
    name = embedded.NAME if target == EMBEDDED else target
    config = read_target_config(path, target_revision)
    source, beside = _drafter_source(drafter, target, config.get_text_config(decoder=True))
    if target != EMBEDDED:
        _check_memory(plan, name, config, source)
    say(f"Loading {name} …")
    tokenizer = load_tokenizer(path, target_revision)
    try:
        lead = Target(load_model(path, place, plan.dtype, plan.target))
        if target != EMBEDDED:
            check_rollback(lead, name, plan.target)
        say("Loading the drafter …")
        helper = _load_drafter(source, beside, lead, tokenizer, plan)
        pair = Pair(lead, tokenizer, helper, target, plan)
        for line in pair.left_out():
            say(line)
        if pair.draft_length:
            say(f"The drafter comes with a draft length of {pair.draft_length}")
        once = " (the first start compiles for this processor, half a minute at most)" if plan.dtype == "int8" else ""
        say(f"Measuring the costs of a target pass{once} …")
        if place.type == "cpu":
            sampling.get_ready()
            choose_threads(lead, plan.dtype == "int8")
        choose_chunks(lead)
        pair.costs = measure_costs(lead, helper)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name} ran out of memory while it was loaded; quantize it, or choose a smaller one."
        ) from error
    say("Ready")
    return pair


def check_rollback(target: Target, name: str, how: How | None = None) -> None:
    """Tries out a model on a cache of fixed size that is rolled back: what follows must be predicted as in a single
    pass. Models with a state or a count of positions elsewhere, or that read both ways, are found out. Only in float32,
    since rounding to fewer bits may matter as much.

    Raises:
        ModelError: the model predicts something else, or a pass fails.
    """
    tokens = (7 * torch.arange(2 * _PROBE, device=target.device) + 3) % target.vocabulary
    before, after = tokens.chunk(2)
    straight, detour = (target.new_cache(len(tokens)) for _ in range(2))
    try:
        expected = target.verify(tokens, straight).logits[_PROBE:]
        target.prefill(before, detour)
        target.verify(after.flip(0), detour)
        detour.rollback(_PROBE)
        found = target.verify(after, detour).logits
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"{name} cannot be used: a pass over a cache of fixed size fails ({said}).") from error
    finally:
        straight.free()
        detour.free()
    if found.dtype != torch.float32 or (how and how.precision):
        return
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    # The median, since a mixture may choose another expert at a near-tie.
    if ((found - expected).norm(dim=-1) / spread).median() > _ROUNDING:
        raise ModelError(
            f"{name} cannot be used: after a rollback it predicts something else than before, so it keeps a state "
            "beside its cache or reads text in both directions."
        )


def measure_costs(target: Target, drafter: Drafter, context: int = 128, repeats: int = 3) -> Costs:
    """Medians over at least `repeats` passes of each width, after one that warms up, and over more where that takes no
    second; widths between are interpolated.

    Each pass is compared with the plain steps of the same turn, a few milliseconds away, so that a slow moment of the
    machine divides out; turns go up and down in width, so that one that is getting slower does too. On a CPU wider
    passes cannot be cheaper, and what noise put out of order is pooled. `Costs.doubt` is the scatter that was left.
    """
    room = min(context, target.context - MAX_DRAFT_LENGTH - 1)
    tokens = torch.arange(room + MAX_DRAFT_LENGTH + 1, device=target.device) % target.vocabulary
    cache = target.new_cache(len(tokens))
    prefix = target.prefill(tokens[:room], cache, drafter.needs_hidden)

    def verify(length: int) -> float:
        begun = time.perf_counter()
        target.verify(tokens[room : room + length + 1], cache, drafter.needs_hidden).logits[0, 0].item()
        seconds = time.perf_counter() - begun
        cache.rollback(room)
        return seconds

    for length in (0, 4):
        verify(length)
    turns: list[list[tuple[int, float]]] = []
    begun = time.perf_counter()
    while len(turns) < repeats or (len(turns) < _MOST_REPEATS and time.perf_counter() - begun < 1):
        turns.append([(length, verify(length)) for length in _MEASURED[:: -1 if len(turns) % 2 else 1]])
    plain = [median(seconds for length, seconds in turn if length == 0) for turn in turns]
    step = median(plain)
    widths = sorted(set(_MEASURED))
    ratios = [[dict(turn)[w] / alone for turn, alone in zip(turns, plain, strict=True)] for w in widths[1:]]
    middles = [median(column) for column in ratios]
    off = [abs(math.log(x / middle)) for column, middle in zip(ratios, middles, strict=True) for x in column]
    doubt = 1.48 * median(off)  # of a normal distribution that is the standard deviation
    if target.device.type == "cpu":
        middles = isotonic([max(middle, 1.0) for middle in middles]).tolist()
    known = dict(zip(widths, [1.0, *middles], strict=True))
    ratio = [_between(known, length) for length in range(MAX_DRAFT_LENGTH + 1)]

    words = tokens[:room].tolist()
    drafter.start(words, Settings(max_new_tokens=32), len(words) + 32)
    drafter.extend(words[:1], prefix)

    def draft(length: int) -> float:
        verify(0)  # a draft comes behind a pass, which leaves nothing of the drafter in the processor's caches
        begun = time.perf_counter()
        made = drafter.draft(length)
        if len(made.ids):
            made.ids[0].item()
        seconds = time.perf_counter() - begun
        drafter.extend([next(others)], prefix)
        return seconds

    others = cycle(words[:: max(room // 20, 1)])  # never the same two in a row: lookup finds nothing
    pairs = [(draft(1), draft(_DRAFTED)) for _ in turns]
    drafter.close()
    cache.free()
    one, many = (median(column) / step for column in zip(*pairs, strict=True))
    ratio_each = min(max(many - one, 0.0) / (_DRAFTED - 1), many / _DRAFTED)
    return Costs(step, tuple(ratio), ratio_each, max(one - ratio_each, 0.0), doubt=doubt)


def choose_threads(target: Target, int8: bool) -> int:
    """Chooses the number of threads with which a plain step is fastest now, and returns it.

    Those of our kernels (`int8`) or PyTorch's, one or all. On an idle machine all of a few cores win. Many get
    into each other's way, and where others are at work, every operation of PyTorch waits for the slowest of its threads
    to be scheduled, so that one can be several times faster.
    """
    everything = cpu.MOST_THREADS
    counts = [2**i for i in range(everything.bit_length()) if 2**i < everything and (int8 or i == 0)] + [everything]
    token = torch.zeros(1, dtype=torch.long, device=target.device)
    cache = target.new_cache(1)
    torch.set_num_threads(1)  # beside our kernels: little is left to PyTorch, and its idle threads would take our cores

    def seconds(threads: int) -> float:
        use(threads)
        cache.reset()
        begun = time.perf_counter()
        target.verify(token, cache)
        return time.perf_counter() - begun

    def use(threads: int) -> None:
        if int8:
            sharing.threads = threads
        else:
            torch.set_num_threads(threads)

    seconds(everything)
    samples = [[seconds(threads) for threads in counts] for _ in range(5)]
    medians = dict(zip(counts, (median(column) for column in zip(*samples, strict=True)), strict=True))
    best = min(counts, key=lambda threads: medians[threads] * (0.9 if threads == everything else 1.0))
    use(best)
    return best


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on: processor, device, memory, versions."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": max(torch.get_num_threads(), sharing.threads) if device.type == "cpu" else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    else:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def _drafter_source(name: str | None, target: str, config: Any) -> tuple[str | None, bool]:
    """Path or Hub id of the drafter called `name` beside a target with text configuration `config`, None for lookup;
    and whether lookup drafts beside it.

    Raises:
        ModelError: `name` is "mtp" and the target has none.
    """
    if not name and target == EMBEDDED:
        name = OWN
    if name and name.endswith(BESIDE):
        source, _ = _drafter_source(name.removesuffix(BESIDE), target, config)
        return source, source is not None
    return _alone(name, target, config), False


def _alone(name: str | None, target: str, config: Any) -> str | None:
    if name == LOOKUP:
        return None
    if name == EMBEDDED:
        return str(embedded.prepare())
    known = catalog.find(target)
    if not name:
        return known.drafter if known else None
    if name == MTP:
        if known:
            return known.drafter
        if config.vocab_size != 49152 or config.hidden_size != 576:
            raise ModelError("This target has no MTP drafter here; train one (train-drafter), or choose lookup.")
        return str(SHIPPED)
    return name


def _load_drafter(source: str | None, beside: bool, target: Target, tokenizer: Any, plan: Plan) -> Drafter:
    if source is None:
        return LookupDrafter(target.device)
    drafter = _load_model_drafter(source, target, tokenizer, plan)
    return EitherDrafter(drafter, LookupDrafter(target.device)) if beside else drafter


def _load_model_drafter(source: str, target: Target, tokenizer: Any, plan: Plan) -> Drafter:
    place, how = plan.drafter_device, plan.drafter
    config = read_config(source, how.revision)
    if is_assistant(config):
        if place != plan.device and getattr(config, "shares_target_head", False):
            raise ModelError("This drafter uses the target's head, so it must be on the target's device.")
        name = MTP if source == str(SHIPPED) else Path(source).name
        assistant = load_assistant(source, place, plan.dtype, how)
        return MTPDrafter(assistant, target, name, int8=plan.dtype == "int8")
    check_same_vocabulary(tokenizer, load_tokenizer(source, how.revision))
    model = Target(load_model(source, place, plan.dtype, how))
    check_rollback(model, source, how)
    choose_chunks(model)
    name = embedded.NAME if source == str(embedded.cache_dir() / embedded.NAME) else source
    return ModelDrafter(model, name, target.vocabulary, target.device)


def _check_memory(plan: Plan, name: str, config: Any, source: str | None) -> None:
    """Refuses a pair that cannot fit; `config` is None for a target that is loaded already.

    Raises:
        ModelError: by how much it is too large, and what would fit instead.
    """
    target = drafter = None
    dtype = DTYPES[plan.dtype]
    if config is not None:
        target = memory.Part(memory.empty(config), plan.device, dtype, plan.target.precision, spread=plan.target.spread)
    if source is not None:
        helper = read_config(source, plan.drafter.revision)
        drafter = memory.Part(
            memory.empty(helper), plan.drafter_device, dtype, plan.drafter.precision, not is_assistant(helper)
        )
    memory.check(name, target, drafter, memory.free)


def _dtype(name: str, device: torch.device, target: str) -> str:
    if name == "auto":
        if device.type == "cpu":
            return "int8" if target == EMBEDDED else "float32"
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"
    if name not in DTYPES:
        raise ModelError(f"Unknown dtype {name!r}; choose one of auto, {', '.join(DTYPES)}.")
    if name == "int8" and device.type != "cpu":
        raise ModelError("int8 runs on the CPU only; choose float32 or bfloat16 here, or --quantize int8.")
    return name


def find_device(name: str) -> torch.device:
    """The device called `name`; auto is CUDA, then MPS, then the CPU.

    Raises:
        ModelError: it does not exist.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"Unknown device {name!r}; choose auto, cpu, cuda or mps.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("No CUDA device is available; choose --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"There is no {name}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("Apple's MPS is not available here; choose --device cpu.")
    return device


def _between(known: dict[int, float], x: int) -> float:
    low, high = max(k for k in known if k <= x), min(k for k in known if k >= x)
    return known[low] if low == high else known[low] + (known[high] - known[low]) * (x - low) / (high - low)


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
