"""Loading: names go in, a `Pair` ready to race comes out.

In: a target and a drafter by name ("embedded", "lookup", a Hub id, a local directory), a device, a dtype. Out: a
`Pair` with its measured costs, or a `ModelError` of one sentence. safetensors only, no remote code.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from . import cpu, embedded
from .drafters import Drafter
from .drafters.lookup import LookupDrafter
from .drafters.model import ModelDrafter, check_same_vocabulary
from .drafters.mtp import MODEL_TYPES, MTPDrafter
from .errors import ModelError
from .events import Costs
from .settings import MAX_DRAFT_LENGTH, Settings
from .target import Target

Say = Callable[[str], None]

EMBEDDED = "embedded"
LOOKUP = "lookup"
MTP = "mtp"
SHIPPED = Path(__file__).parents[1] / "assets" / "drafter"
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,  # loaded so, then quantized: see cpu
}
_MEASURED = (0, 1, 2, 3, 4, 6, 8, 12, 16)


class Pair:
    """A target, its tokenizer and a drafter on one device, with the costs measured there.

    Attributes:
        info: {"target", "drafter", "device", "dtype"}, as names.
        context: positions there is room for, in tokens.
        costs: of a target pass and of a draft step; measured when the pair is loaded.
        machine: what it runs on.
    """

    def __init__(self, target: Target, tokenizer: Any, drafter: Drafter, name: str, dtype: str) -> None:
        self.target = target
        self.tokenizer = tokenizer
        self.drafter = drafter
        self.name = name
        self.dtype = dtype
        self.context = target.context
        self.costs: Costs | None = None

    @property
    def machine(self) -> dict[str, Any]:
        return machine(self.target.device)

    @property
    def info(self) -> dict[str, str]:
        return {
            "target": embedded.NAME if self.name == EMBEDDED else self.name,
            "drafter": self.drafter.name,
            "device": str(self.target.device),
            "dtype": self.dtype,
        }

    def use_drafter(self, name: str | None) -> None:
        """Changes the drafter and measures anew; the target stays loaded.

        Raises:
            ModelError: there is no such drafter, or it does not fit the target.
        """
        self.drafter = _load_drafter(name, self.target, self.tokenizer, self.dtype)
        self.costs = measure_costs(self.target, self.drafter)


def load_pair(
    target: str = EMBEDDED,
    drafter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Say | None = None,
) -> Pair:
    """Loads a pair and measures its costs.

    Args:
        target: "embedded", a Hub id, or a local directory.
        drafter: "lookup" (also what None means), a Hub id, or a local directory of a causal model.
        device: "auto" (CUDA, then MPS, then CPU), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float16 on MPS; on the CPU int8 for the embedded target, else float32), "int8"
            (CPU), "float32", "float16" or "bfloat16".
        progress: hears what is being done, a short line at a time.

    Raises:
        ModelError: a name, device or dtype that does not exist or fit; no network; no memory.
    """
    say = progress or (lambda line: None)
    place = _device(device)
    if dtype == "auto":
        fast = cpu.supported() and target == EMBEDDED
        dtype = {"cuda": "bfloat16", "mps": "float16"}.get(place.type, "int8" if fast else "float32")
    if dtype not in DTYPES:
        raise ModelError(f"Unknown dtype {dtype!r}; choose one of auto, {', '.join(DTYPES)}.")
    if dtype == "int8" and (place.type != "cpu" or not cpu.supported()):
        raise ModelError("int8 runs on x86 processors only; choose float32 or bfloat16 here.")
    path = str(embedded.prepare(say)) if target == EMBEDDED else target
    say(f"Loading {embedded.NAME if target == EMBEDDED else target} …")
    tokenizer = load_tokenizer(path)
    lead = Target(load_model(path, place, dtype))
    say("Loading the drafter …")
    helper = _load_drafter(drafter, lead, tokenizer, dtype)
    pair = Pair(lead, tokenizer, helper, target, dtype)
    say("Measuring the costs of a target pass …")
    try:
        if place.type == "cpu":
            choose_threads(lead)
        pair.costs = measure_costs(lead, helper)
    except ValueError as error:  # a cache that cannot roll back
        raise ModelError(f"{target} cannot be raced: {error}.") from error
    say("Ready")
    return pair


def load_model(path: str, device: torch.device, dtype: str) -> PreTrainedModel:
    """A causal model from a Hub id or directory, on `device`, in a dtype of `DTYPES`.

    Raises:
        ModelError: it cannot be found, fetched, read or fitted.
    """
    transformers_logging.disable_progress_bar()
    with _OneSentence(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], use_safetensors=True)
        model = cpu.quantize(model.eval()) if dtype == "int8" else model.to(device)
    return model.eval().requires_grad_(False)


def load_assistant(path: str, device: torch.device, dtype: str) -> PreTrainedModel:
    """A Gemma 4 assistant, with or without its head (see `MTPDrafter`), in a dtype of `DTYPES`.

    Raises:
        ModelError: it cannot be found, fetched, read or fitted.
    """
    transformers_logging.disable_progress_bar()
    loud = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a head that is left out is the target's
    try:
        with _OneSentence(path):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], use_safetensors=True)
    finally:
        transformers_logging.set_verbosity(loud)
    if dtype == "int8":
        cpu.quantize_linears(model.model)
        for name in ("pre_projection", "post_projection"):
            setattr(model, name, cpu.Int8Linear(getattr(model, name).weight))
    return model.to(device).eval().requires_grad_(False)


def _is_assistant(path: str) -> bool:
    with _OneSentence(path):
        return AutoConfig.from_pretrained(path).model_type in MODEL_TYPES


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a Hub id or directory.

    Raises:
        ModelError: it cannot be found, fetched or read.
    """
    with _OneSentence(path):
        return AutoTokenizer.from_pretrained(path)


def measure_costs(target: Target, drafter: Drafter, context: int = 128, repeats: int = 3) -> Costs:
    """Medians over `repeats` passes of each width, after one that warms up; widths between are interpolated."""
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
    # Widths in turn rather than one after another, so that a slow moment of the machine does not fall on one of them.
    samples = [[verify(length) for length in _MEASURED] for _ in range(repeats)]
    known = dict(zip(_MEASURED, (median(column) for column in zip(*samples, strict=True)), strict=True))
    cache.free()
    step = known[0]
    ratio = [_between(known, length) / step for length in range(MAX_DRAFT_LENGTH + 1)]

    words = tokens[:room].tolist()
    length, spent = 4, []
    drafter.start(words, Settings(max_new_tokens=32), len(words) + 32)
    drafter.extend(words[:1], prefix)
    for _ in range(repeats):
        begun = time.perf_counter()
        draft = drafter.draft(length)
        if len(draft.ids):
            draft.ids[0].item()
        spent.append((time.perf_counter() - begun) / length)
        drafter.extend(words[:1], prefix)
    drafter.close()
    return Costs(step, tuple(ratio), median(spent) / step)


def choose_threads(target: Target) -> int:
    """Sets PyTorch to one thread or to all, whichever makes a plain step faster now, and returns the number.

    On an idle machine all cores win. Where others are at work, every operation waits for the slowest of its threads to
    be scheduled, and one thread can be several times faster.
    """
    everything = torch.get_num_threads()
    token = torch.zeros(1, dtype=torch.long, device=target.device)
    cache = target.new_cache(1)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        cache.reset()
        begun = time.perf_counter()
        target.verify(token, cache)
        return time.perf_counter() - begun

    seconds(everything)
    samples = [[seconds(threads) for threads in (1, everything)] for _ in range(5)]
    alone, together = (median(column) for column in zip(*samples, strict=True))
    best = 1 if alone < 0.9 * together else everything
    torch.set_num_threads(best)
    return best


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure was measured on: processor, device, memory, versions."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    else:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def _load_drafter(name: str | None, target: Target, tokenizer: Any, dtype: str) -> Drafter:
    if name in (None, "", LOOKUP):
        return LookupDrafter(target.device)
    assert name is not None
    if name == MTP:
        if target.config.vocab_size != 49152 or target.config.hidden_size != 576:
            raise ModelError("This target has no MTP drafter here; train one (train-drafter), or choose lookup.")
        return MTPDrafter(load_assistant(str(SHIPPED), target.device, dtype), target)
    path = str(embedded.prepare()) if name == EMBEDDED else name
    if _is_assistant(path):
        return MTPDrafter(load_assistant(path, target.device, dtype), target, Path(name).name)
    check_same_vocabulary(tokenizer, load_tokenizer(path))
    model = Target(load_model(path, target.device, dtype))
    return ModelDrafter(model, embedded.NAME if name == EMBEDDED else name, target.vocabulary)


def _device(name: str) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"Unknown device {name!r}; choose auto, cpu, cuda or mps.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("No CUDA device is available; choose --device cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("Apple's MPS is not available here; choose --device cpu.")
    return device


class _OneSentence:
    """Turns what transformers and the Hub raise while loading `name` into a `ModelError` that says what to do."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, ModelError):
            return
        raise ModelError(self._sentence(error)) from error

    def _sentence(self, error: Exception) -> str:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ or chain[-1].__context__:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
        kinds = {type(link).__name__ for link in chain}
        name = self.name
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return f"{name} does not fit into memory; choose a smaller model or dtype."
        if "GatedRepoError" in kinds:
            return f"{name} is gated: accept its licence on its Hub page and log in with `hf auth login`."
        if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
            return f"There is no model {name!r} on the Hub or on this disk (a private one needs `hf auth login`)."
        if (
            "OfflineModeIsEnabled" in kinds
            or "LocalEntryNotFoundError" in kinds
            or kinds & {"ConnectionError", "ConnectError"}
        ):
            return (
                f"{name} is not on this disk and the Hugging Face Hub cannot be reached; check the network or the path."
            )
        if Path(name).is_dir():
            return f"{name} is not a usable safetensors checkpoint of a causal language model: {_first_line(error)}"
        return f"{name} could not be loaded: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
