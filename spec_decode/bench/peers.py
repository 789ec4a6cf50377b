"""The peers of the benchmark: other engines on the same prompts and machine, each with its fastest settings.

In: a pair, settings, prompt ids. Out: `Peers`, which runs a prompt through each engine, with the same prompt ids and
stop ids, and says how far its distributions are from float32. On the CPU each peer has its own process, so that the
threads and settings of peers and lanes do not affect each other; the CPU time that a peer uses outside its turns is
measured. On other devices, and for a target quantized by bitsandbytes, the modes of transformers are the only peers;
they run in this process on the loaded weights. Independent of our lanes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from ..errors import ModelError, UserError
from ..loading.catalog import EMBEDDED
from .engines import KINDS, Job
from .engines.huggingface import Transformers
from .fidelity import Reference, fidelity, kl
from .seats import Beside, Inside, Seat

if TYPE_CHECKING:
    from ..loading.pair import Pair
    from ..settings import Settings

Say = Callable[[str], None]

ALL = "all"
VLLM_PYTHON = "SPEC_DECODE_VLLM"  # environment variable
_FEW = 8  # with more cores, not every number of threads is tried
_TUNING = 3  # prompts that settings are tried on
_ROOM = 64  # positions beyond a prompt that fidelity and trials need


class Extras(NamedTuple):
    """What peers need besides the pair.

    vllm: the interpreter of an environment with vLLM; empty takes the variable SPEC_DECODE_VLLM, or our own.
    llama_draft: a GGUF file of a draft model for llama.cpp.
    room: tokens that later turns of a conversation may add to the longest prompt.
    draws: the settings whose draws are checked; None for those that the engines are tuned with.
    """

    vllm: str = ""
    llama_draft: str = ""
    room: int = 0
    draws: Settings | None = None


def parse(names: str, extras: Extras | None = None) -> list[str]:
    """The peers of a comma-separated list, each once; "all" stands for all of them.

    Raises:
        UserError: a name is unknown, or there is only one and its package is missing.
    """
    found: dict[str, None] = {}
    for name in (part.strip() for part in names.split(",")):
        if name and name != ALL and name not in KINDS:
            raise UserError(f"Unknown peer {name!r}; choose among {', '.join(KINDS)}, {ALL}.")
        found |= dict.fromkeys(KINDS if name == ALL else [name] if name else [])
    chosen = list(found)
    if len(chosen) == 1 and (reason := _missing(chosen[0], extras or Extras())):
        raise UserError(reason)
    return chosen


def thread_counts() -> list[int]:
    """Numbers of threads to try: all from 1 to the number of usable cores; with more than `_FEW` cores, the powers of
    two and the numbers of physical and logical cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable <= _FEW:
        return list(range(1, usable + 1))
    physical = min(psutil.cpu_count(logical=False) or usable, usable)
    return sorted({2**i for i in range(usable.bit_length()) if 2**i <= usable} | {physical, usable})


class Peer:
    """An engine with its fastest settings, and the facts to report about it.

    Raises:
        ModelError: the engine failed while it was tuned.
    """

    def __init__(self, name: str, seat: Seat, counts: Sequence[int], prompts: Sequence[list[int]]) -> None:
        self.name = name
        self.seat = seat
        self.facts = seat.ask({"do": "tune", "counts": list(counts), "prompts": [list(ids) for ids in prompts]})
        self.turns = {"own": _Load(), "others": _Load()}
        self.ours = _Load()
        self.begin()

    def begin(self) -> None:
        """Leaves the CPU time that was used so far out of the report."""
        self.since = time.perf_counter(), self.seat.cpu()

    def run(self, ids: list[int], settings: Settings) -> dict[str, Any]:
        """Runs a prompt, as `engines.service.answer`, with the number of new tokens, the temperature and the seed of
        these settings.

        Raises:
            ModelError: the engine failed.
        """
        self._note("others")
        wall, cpu = time.perf_counter(), time.process_time()
        asked = {"temperature": settings.temperature, "seed": settings.seed}
        found = self.seat.ask({"do": "run", "ids": ids, "tokens": settings.max_new_tokens, **asked})
        self.ours.add(time.perf_counter() - wall, time.process_time() - cpu)
        self._note("own")
        return found

    def report(self) -> dict[str, Any]:
        """The engine's facts and the trials of its settings. For an engine in its own process, "busy_cores" gives the
        mean number of busy cores: of its process in its "own" turns and in those of "others", and of our process in
        its turns ("ours")."""
        self._note("others")
        if self.seat.cpu() is None:
            return self.facts
        busy = {"own": self.turns["own"].cores, "others": self.turns["others"].cores, "ours": self.ours.cores}
        return {**self.facts, "busy_cores": busy}

    def _note(self, whose: str) -> None:
        now = time.perf_counter(), self.seat.cpu()
        (wall, cpu), self.since = self.since, now
        if cpu is not None and now[1] is not None:
            self.turns[whose].add(now[0] - wall, now[1] - cpu)


class _Load:
    """CPU seconds and wall-clock seconds, summed."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def add(self, wall: float, cpu: float) -> None:
        self.wall += wall
        self.cpu += cpu

    @property
    def cores(self) -> float | None:
        return self.cpu / self.wall if self.wall else None


class Peers:
    """The engines of `names` that can run the pair, tuned, checked and warm; a context manager that closes them.

    Attributes:
        skipped: by name, a sentence that says why an engine does not run.

    Args:
        prompts: ids of all prompts of the benchmark; settings are tried on `_TUNING` of them, spread over all.
        check: measure the fidelity of every engine as well.

    Raises:
        UserError: there is only one name, and it cannot run this pair or its package is missing.
        ModelError: there is only one name, and its engine failed while it was started or tuned.
    """

    def __init__(
        self,
        names: Iterable[str],
        pair: Pair,
        settings: Settings,
        prompts: Sequence[list[int]],
        progress: Say | None = None,
        extras: Extras | None = None,
        *,
        counts: Sequence[int] | None = None,
        check: bool = True,
    ) -> None:
        self.say = progress or (lambda line: None)
        self.running: dict[str, Peer] = {}
        self.skipped: dict[str, str] = {}
        self._ended: dict[str, dict[str, Any]] = {}
        extras = extras or Extras()
        names = parse(",".join(names), extras)
        tuning = list(prompts[:: max(1, len(prompts) // _TUNING)][:_TUNING]) or [[1, 2, 3]]
        tried = [_current()] if pair.target.device.type != "cpu" else counts or thread_counts()
        checks = Checks(pair, extras.draws or settings, tuning) if check else None
        longest = max(map(len, prompts), default=1)
        if extras.room:  # what does not fit into the context is not asked
            longest = max(longest, min(longest + extras.room, pair.context - max(settings.max_new_tokens, _ROOM) - 1))
        try:
            for name in names:
                seat: Seat | None = None
                try:
                    self.say(f"Finding the fastest settings for {name} …")
                    seat = _seat(name, pair, settings, (longest, extras), self.say)
                    peer = Peer(name, seat, tried, tuning)
                    if checks is not None:
                        self.say(f"Checking the distribution of {name} …")
                        peer.facts["fidelity"] = checks.of(seat)
                        peer.begin()
                    self.running[name] = peer
                except UserError as error:
                    if seat is not None:
                        seat.close()
                    if len(names) == 1:
                        raise
                    self.skipped[name] = str(error)
                    self.say(f"Without {name}: {error}")
                except BaseException:
                    if seat is not None:
                        seat.close()
                    raise
        except BaseException:
            self.close()
            raise
        finally:
            if checks is not None:
                checks.close()

    def run(self, name: str, ids: list[int], settings: Settings) -> dict[str, Any] | None:
        """Runs a prompt through an engine, as `Peer.run`. None for one that does not run; one that fails is removed."""
        if name not in self.running:
            return None
        try:
            return self.running[name].run(ids, settings)
        except ModelError as error:
            failed = self.running.pop(name)
            self._ended[name] = {**failed.facts, "failed": str(error)}
            failed.seat.close()
            self.say(str(error))
            return None

    def report(self) -> dict[str, dict[str, Any]]:
        """By name: `Peer.report`, with "failed" for an engine that failed; {"skipped": reason} for one that did not
        run."""
        ran = {name: peer.report() for name, peer in self.running.items()} | self._ended
        return ran | {name: {"skipped": why} for name, why in self.skipped.items()}

    def close(self) -> None:
        """Closes all engines."""
        running, self.running = self.running, {}
        for peer in running.values():
            peer.seat.close()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Checks:
    """The fidelity of engines, against float32 weights of the same target in a process of its own, which is started
    when it is first asked for."""

    def __init__(self, pair: Pair, settings: Settings, prompts: Sequence[list[int]]) -> None:
        self.pair, self.settings, self.prompts = pair, settings, prompts
        self._reference: Reference | None = None
        self._why = ""
        self._ours: float | None = None

    def of(self, seat: Seat) -> dict[str, Any]:
        """`fidelity.fidelity` of an engine, with "ours", the divergence of our target; or {"failed": why}."""
        if self._reference is None and not self._why:
            try:
                self._reference = self._start()
                self._ours = kl(Inside("our target", Transformers(Job(""), self.pair.target.model)), self._reference)
            except ModelError as error:
                self._why = str(error)
        if self._reference is None:
            return {"failed": self._why}
        try:
            return {**fidelity(seat, self._reference, self.settings), "ours": self._ours}
        except ModelError as error:
            return {"failed": str(error)}

    def close(self) -> None:
        """Ends the process."""
        if self._reference is not None:
            self._reference.close()

    def _start(self) -> Reference:
        pair = self.pair
        if pair.target.device.type != "cpu":
            raise ModelError("Distributions are compared on the CPU only.")
        _check_memory(pair)
        seat = Beside("transformers", Job(_checkpoint(pair), revision=pair.plan.target.revision))
        try:
            seat.ask({"do": "use", "threads": thread_counts()[-1], "option": {"dtype": "float32", "cache": "dynamic"}})
            return Reference(seat, self.prompts, sorted(pair.target.eos))
        except BaseException:
            seat.close()
            raise


def _missing(name: str, extras: Extras) -> str | None:
    kind = KINDS[name]
    if kind.engine == "VLLM":
        if extras.vllm and shutil.which(extras.vllm) is None:
            return f"The peer {name} needs a Python with vLLM, and {extras.vllm} cannot be run."
        if not _vllm(extras):
            return (
                f"The peer {name} needs vLLM, best in an environment of its own: name its Python with --vllm PYTHON or "
                f"in the variable {VLLM_PYTHON}."
            )
    elif importlib.util.find_spec(kind.needs) is None:
        return f"The peer {name} needs the package {kind.package}; run `pip install {kind.package}`."
    if kind.mode == "draft" and not Path(extras.llama_draft).is_file():
        return f"The peer {name} needs a draft model for llama.cpp, a GGUF file: name it with --llama-draft FILE."
    return None


def _vllm(extras: Extras) -> str:
    """The Python to start vLLM with, empty where there is none."""
    named = extras.vllm or os.environ.get(VLLM_PYTHON, "")
    return named or (sys.executable if importlib.util.find_spec("vllm") else "")


def _current() -> int:
    import torch

    return torch.get_num_threads()


def _seat(name: str, pair: Pair, settings: Settings, asked: tuple[int, Extras], say: Say) -> Seat:
    """asked: tokens of the longest prompt, and what some peers need besides."""
    longest, extras = asked
    if reason := _missing(name, extras):
        raise UserError(reason)
    from ..loading import embedded

    kind, how = KINDS[name], pair.plan.target
    job = Job(
        path=pair.name,
        mode=kind.mode,
        stop=tuple(sorted(pair.target.eos)),
        context=longest + max(settings.max_new_tokens, _ROOM) + 1,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed,
        revision=how.revision,
        attention=how.attention,
        dtypes=("float32", "bfloat16"),
        draft=extras.llama_draft if kind.mode == "draft" else _assistant(name, pair) if kind.mode == "mtp" else "",
        python=_vllm(extras),
    )
    device = pair.target.device.type
    if kind.engine == "Transformers":
        if device != "cpu" or how.precision:
            assistant = pair.drafter_model if kind.mode == "mtp" else None
            return Inside(name, Transformers(job, pair.target.model, assistant))
        _check_memory(pair)
        return Beside(name, replace(job, path=_checkpoint(pair)))
    if device != "cpu":
        raise UserError(f"{name} is a peer on the CPU only.")
    if kind.engine == "VLLM":
        return Beside(name, replace(job, path=_checkpoint(pair)))
    if pair.name != EMBEDDED:
        raise UserError(f"{name} is a peer of the embedded target on the CPU only, since it reads its GGUF file.")
    return Beside(name, replace(job, path=str(embedded.gguf(say))))


def _checkpoint(pair: Pair) -> str:
    """Directory or Hub id of the target's checkpoint."""
    from ..loading import embedded

    return str(embedded.prepare()) if pair.name == EMBEDDED else pair.name


def _assistant(name: str, pair: Pair) -> str:
    """Directory or Hub id of the pair's Gemma 4 assistant.

    Raises:
        UserError: the pair is no Gemma 4 pair.
    """
    target, drafter = (getattr(model, "config", None) for model in (pair.target.model, pair.drafter_model))
    types = [str(getattr(config, "model_type", "")) for config in (target, drafter)]
    if not (types[0].startswith("gemma4") and types[1].startswith("gemma4") and "assistant" in types[1]):
        raise UserError(
            f"{name} drafts with a Gemma 4 assistant for a Gemma 4 target, the only ones that transformers takes, and "
            "this pair is none."
        )
    return pair.drafter_path


def _check_memory(pair: Pair) -> None:
    """Checks that memory is free for a second copy of the target.

    Raises:
        ModelError: the copy does not fit.
    """
    import torch

    from ..loading import memory

    needed = memory.weights(memory.empty(pair.target.config), torch.float32)
    free = memory.free_on(torch.device("cpu"))
    if needed > free:
        raise ModelError(
            f"The peer transformers needs {memory.gigabytes(needed)} for its own weights in float32, and "
            f"{memory.gigabytes(free)} are free."
        )
