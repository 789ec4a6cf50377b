"""The peers of the benchmark: other engines on the same prompts and machine, each with its fastest settings.

In: a pair, settings, prompt ids. Out: `Peers`, which runs a prompt through each engine, with the same prompt ids and
stop ids. On the CPU each peer has its own process, so that the threads and settings of peers and lanes do not affect
each other; the CPU time that a peer uses outside its turns is measured. On other devices, and for a target quantized by
bitsandbytes, transformers is the only peer; it runs in this process on the loaded weights. Independent of our lanes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from ..errors import ModelError, UserError
from ..loading.catalog import EMBEDDED
from .engines import ENGINES, Engine, Job, Transformers, answer

if TYPE_CHECKING:
    from ..loading.pair import Pair
    from ..settings import Settings

Say = Callable[[str], None]

PACKAGES = {"llama.cpp": ("xllamacpp", "xllamacpp"), "openvino": ("openvino_genai", "openvino-genai")}
_FEW = 8  # with more cores, not every number of threads is tried


def parse(names: str) -> list[str]:
    """The peers of a comma-separated list, each once.

    Raises:
        UserError: a name is unknown, or there is only one and its package is missing.
    """
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in found:
        if name not in ENGINES:
            raise UserError(f"Unknown peer {name!r}; choose among {', '.join(ENGINES)}.")
    if len(found) == 1 and (reason := _missing(found[0])):
        raise UserError(reason)
    return found


def thread_counts() -> list[int]:
    """Numbers of threads to try: all from 1 to the number of usable cores; with more than `_FEW` cores, the powers of
    two and the numbers of physical and logical cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable <= _FEW:
        return list(range(1, usable + 1))
    physical = min(psutil.cpu_count(logical=False) or usable, usable)
    return sorted({2**i for i in range(usable.bit_length()) if 2**i <= usable} | {physical, usable})


class Seat(Protocol):
    """The place where an engine runs. `ask` sends it a request for `engines.answer`. `cpu` is the CPU time of its
    process so far in seconds, or None if it runs in our process."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]: ...

    def cpu(self) -> float | None: ...

    def close(self) -> None: ...


class Beside:
    """An engine in its own process.

    Raises:
        ModelError: the engine cannot be started.
    """

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.engines"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            encoding="utf-8",
        )
        try:
            self.ask({"engine": name, "job": asdict(job)})
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ModelError: the engine failed, or its process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise ModelError(f"The peer {self.name} ended with exit code {self.process.wait()}: {self._last_line()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ModelError(f"The peer {self.name} failed: {found['error'].rstrip('.')}.")
        return found

    def cpu(self) -> float | None:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return None
        return float(times.user + times.system)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                with suppress(OSError):  # a request that was not read
                    pipe.close()

    def _last_line(self) -> str:
        self.log.seek(0)
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else "it printed no error"


class Inside:
    """An engine in this process."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self.engine = engine

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return answer(self.engine, request)
        except RuntimeError as error:
            raise ModelError(f"The peer {self.name} failed: {' '.join(str(error).split())[:300]}") from error

    def cpu(self) -> float | None:
        return None

    def close(self) -> None:
        self.engine.close()


class Peer:
    """An engine with its fastest settings, and the facts to report about it.

    Raises:
        ModelError: the engine failed while it was tuned.
    """

    def __init__(self, name: str, seat: Seat, counts: Sequence[int], ids: list[int]) -> None:
        self.name = name
        self.seat = seat
        self.facts = seat.ask({"do": "tune", "counts": list(counts), "ids": ids})
        self.turns = {"own": _Load(), "others": _Load()}
        self.ours = _Load()
        self.since = time.perf_counter(), seat.cpu()

    def run(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """Runs a prompt: {"ids", "first", "seconds", "tokens_per_second"}, as `engines.Run`.

        Raises:
            ModelError: the engine failed.
        """
        self._note("others")
        wall, cpu = time.perf_counter(), time.process_time()
        found = self.seat.ask({"do": "run", "ids": ids, "tokens": tokens})
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
    """The engines of `names` that can run the pair, tuned and warm; a context manager that closes them.

    Attributes:
        skipped: by name, a sentence that says why an engine does not run.

    Args:
        prompts: ids of all prompts of the benchmark; settings are tried on the first one.

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
        counts: Sequence[int] | None = None,
    ) -> None:
        self.say = progress or (lambda line: None)
        self.running: dict[str, Peer] = {}
        self.skipped: dict[str, str] = {}
        self.tokens = settings.max_new_tokens
        self._ended: dict[str, dict[str, Any]] = {}
        names = parse(",".join(names))
        for name in names:
            seat: Seat | None = None
            try:
                self.say(f"Finding the fastest settings for {name} …")
                seat = _seat(name, pair, settings, max(map(len, prompts), default=1), self.say)
                tried = [_current()] if pair.target.device.type != "cpu" else counts or thread_counts()
                self.running[name] = Peer(name, seat, tried, prompts[0] if prompts else [1, 2, 3])
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
                self.close()
                raise

    def run(self, name: str, ids: list[int]) -> dict[str, Any] | None:
        """Runs a prompt through an engine, as `Peer.run`. None for one that does not run; one that fails is removed."""
        if name not in self.running:
            return None
        try:
            return self.running[name].run(ids, self.tokens)
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


def _missing(name: str) -> str | None:
    module, package = PACKAGES.get(name, ("transformers", "transformers"))
    if importlib.util.find_spec(module) is not None:
        return None
    return f"The peer {name} needs the package {package}; run `pip install {package}`."


def _current() -> int:
    import torch

    return torch.get_num_threads()


def _seat(name: str, pair: Pair, settings: Settings, longest: int, say: Say) -> Seat:
    if reason := _missing(name):
        raise UserError(reason)
    from ..loading import embedded

    how, own = pair.plan.target, pair.name == EMBEDDED
    job = Job(
        path=pair.name,
        stop=tuple(sorted(pair.target.eos)),
        context=longest + settings.max_new_tokens + 1,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed,
        revision=how.revision,
        attention=how.attention,
        dtypes=("float32", "bfloat16"),
    )
    device = pair.target.device.type
    if name == "transformers":
        if device != "cpu" or how.precision:
            return Inside(name, Transformers(job, pair.target.model))
        if not own:
            _check_memory(pair)
        return Beside(name, _at(job, str(embedded.prepare()) if own else pair.name))
    if not own or device != "cpu":
        raise UserError(f"{name} is a peer of the embedded target on the CPU only, since it reads its GGUF file.")
    return Beside(name, _at(job, str(embedded.gguf(say))))


def _at(job: Job, path: str) -> Job:
    return Job(**{**asdict(job), "path": path})


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
