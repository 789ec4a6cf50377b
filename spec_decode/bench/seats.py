"""Where an engine runs: in a process of its own, or in ours.

In: the name of a peer and its job. Out: a `Seat`, which answers requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import psutil

from ..errors import ModelError
from .engines import Engine, Job
from .engines.service import answer


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
        """Of its process and of what it started."""
        total = 0.0
        for process in self._processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def close(self) -> None:
        processes = self._processes()  # a server that it started would stay
        self.process.kill()
        self.process.wait()
        for process in processes[1:]:
            with suppress(psutil.Error):
                process.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                with suppress(OSError):  # a request that was not read
                    pipe.close()

    def _processes(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.Error:
            return []

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
