"""The file of `check gpu`: what ran, when, on what, part by part; and the lines that are printed meanwhile.

In: parts, each a function that returns figures and goals. Out: one JSON file that is valid after every part. Knows
nothing of what a part does.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...errors import UserError
from ...loading.placement import machine

FORMAT = 1


class Skip(Exception):
    """This machine, or this version, cannot run the part; the message says why."""


@dataclass(frozen=True)
class Goal:
    """A figure that a part is to reach: `figure` at least (`at_least`) or at most `limit`."""

    name: str
    figure: float | None
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        """None where there is no figure."""
        if self.figure is None:
            return None
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def __str__(self) -> str:
        said = {True: "met   ", False: "MISSED", None: "no figure"}[self.met]
        figure = "–" if self.figure is None else f"{self.figure:.3g}"
        return f"{said} {self.name}: {figure} (goal {'≥' if self.at_least else '≤'} {self.limit:g})"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Result:
    """What a part found: figures as plain data, goals, and whether it proves an error (`wrong`, a sentence)."""

    figures: dict[str, Any]
    goals: tuple[Goal, ...] = ()
    wrong: str = ""


@dataclass(frozen=True)
class Part:
    """name: unique. told: one phrase. estimate: seconds it is expected to take. body: does it; raises `Skip` where it
    cannot."""

    name: str
    told: str
    estimate: float
    body: Callable[[], Result] = field(repr=False)


def default_path(device: torch.device, kind: str = "") -> Path:
    """docs/benchmarks/gpu-DEVICE-DATE.json, below the current directory."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    short = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")
    return Path("docs/benchmarks") / f"gpu-{kind}{short}-{datetime.now(UTC):%Y-%m-%d}.json"


def facts(device: torch.device, command: list[str], rehearsal: bool) -> dict[str, Any]:
    """What a file says of itself: device, versions, command, date."""
    versions = {"spec_decode": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("transformers", "bitsandbytes"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["cublas_workspace"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "default")
    return {
        "format": FORMAT,
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "command": "python -m spec_decode " + " ".join(command),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(machine(device)["processor"]),
        "device_type": device.type,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "rehearsal": rehearsal,
        "machine": machine(device),
        "versions": versions,
    }


class Report:
    """A file of parts.

    Args:
        path: of the file; its folder is made.
        about: see `facts`.
        seconds: time limit of all parts together, from now on.
        resume: keep what the file holds, and run only what is not done in it.

    Attributes:
        failed: names of parts that failed in this run.

    Raises:
        UserError: the file to go on with cannot be read, or is of another device.
    """

    def __init__(self, path: Path, about: dict[str, Any], seconds: float, resume: bool = False) -> None:
        self.path, self.about = path, about
        self.parts: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        self._end = time.monotonic() + seconds
        if resume and path.exists():
            self.parts = self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            found = {part["part"]: part for part in data["parts"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"Cannot go on with {self.path}: {error}.") from error
        for name in ("format", "device", "rehearsal"):
            if data.get(name) != self.about[name]:
                raise UserError(
                    f"Cannot go on with {self.path}: its {name} is {data.get(name)}, and this one's {self.about[name]}."
                )
        self.about = {**self.about, "date": data["date"], "resumed": [*data.get("resumed", []), self.about["date"]]}
        return found

    @property
    def left(self) -> float:
        """Seconds of the time limit that are left."""
        return self._end - time.monotonic()

    def save(self) -> None:
        """Writes the file; a reader finds the old one or the new one, and never half of one."""
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps({**self.about, "parts": [*self.parts.values()]}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def run(self, part: Part) -> None:
        """Runs a part and writes down what came of it, unless it is done already or no longer fits."""
        if self.parts.get(part.name, {}).get("status") == "done":
            print(f"kept    {part.name}", flush=True)
            return
        if part.estimate > self.left:
            self._skipped(part, f"it takes about {part.estimate:.0f} s and {max(self.left, 0):.0f} s are left")
            return
        begun = time.monotonic()
        try:
            result = part.body()
        except Skip as reason:
            self._skipped(part, str(reason))
            return
        except Exception as error:  # the next part may still run
            traceback.print_exc()
            said = " ".join(str(error).split())[:500]
            self._note(part, "failed", begun, why=f"{type(error).__name__}: {said}")
            return
        self._note(part, "failed" if result.wrong else "done", begun, result, result.wrong)

    def _skipped(self, part: Part, why: str) -> None:
        self._note(part, "skipped", time.monotonic(), why=why)

    def _note(self, part: Part, status: str, begun: float, result: Result | None = None, why: str = "") -> None:
        seconds = time.monotonic() - begun
        result = result or Result({})
        goals = [goal.to_dict() for goal in result.goals]
        row = {"part": part.name, "told": part.told, "status": status, "seconds": round(seconds, 2), "why": why}
        self.parts[part.name] = {**row, "figures": result.figures, "goals": goals}
        if status == "failed":
            self.failed.append(part.name)
        print(f"{status:7} {part.name}, {seconds:.1f} s{': ' if why else ''}{why}", flush=True)
        for goal in result.goals:
            print(f"        {goal}", flush=True)
        self.save()

    def close(self) -> None:
        """Prints how many parts and goals there are of each kind."""
        counts = [
            sum(part["status"] == status for part in self.parts.values()) for status in ("done", "failed", "skipped")
        ]
        met = [goal["met"] for part in self.parts.values() for goal in part["goals"]]
        print("\n{} parts done, {} failed, {} skipped".format(*counts), end="; ")
        print(f"{met.count(True)} goals met, {met.count(False)} missed, {met.count(None)} without a figure")
        print(f"Written to {self.path}")
