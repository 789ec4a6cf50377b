"""The file of raw measurements: JSON Lines, written as they are made, from which an interrupted run goes on.

In: a header and measurements. Out: a file whose first line is the header, {"header": {…}}, and whose other lines are
measurements, or notes, {"note": {…}}; the note "end" stands last in a finished one. Every line is flushed. Imports no
torch.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError, quoted
from .measurement import Measurement

FORMAT = "spec-decode bench"
VERSION = 1
# What must agree before a run goes on in a file, and how a message calls it. Other fields of the header may differ.
SAME = {"version": "format", "pair": "pair", "machine": "machine", "versions": "versions", "plan": "settings"}


class Contents:
    """What a file holds.

    Attributes:
        header: of the run that began it.
        measurements: in the order in which they were made.
        notes: by name, the last of each.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header
        self.measurements: list[Measurement] = []
        self.notes: dict[str, Any] = {}

    @property
    def ended(self) -> bool:
        """Whether the run came to its end."""
        return "end" in self.notes


def read(path: str | Path) -> Contents:
    """What a file holds; its last line is left out where it was cut. A finished one may be compressed by gzip.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    data = _bytes(Path(path))
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is no whole gzip file.") from error
    contents, _ = _parsed(Path(path), data)
    if contents is None:
        raise UserError(f"{path} holds no measurements.")
    return contents


class Record:
    """A file that is open for more measurements; a context manager that closes it.

    Args:
        header: of this run. {"pair", "machine", "versions", "plan"} decide whether the measurements of a run that was
            interrupted belong to it.
        anew: replace what a finished run left in the file.

    Attributes:
        contents: what the file holds, this run's measurements included.

    Raises:
        UserError: the file holds something else, or measurements of another pair, machine, version or settings.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], anew: bool = True) -> None:
        self.path = Path(path)
        header = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **header}))
        found, whole = _parsed(self.path, _bytes(self.path)) if self.path.exists() else (None, 0)
        if found is not None and found.ended and anew:
            found, whole = None, 0
        if found is not None:
            _compare(self.path, found.header, header)
        self.contents = found or Contents(header)
        self._file: BinaryIO = self.path.open("r+b" if self.path.exists() else "w+b")
        try:
            self._file.truncate(whole)
            self._file.seek(whole)
            if found is None:
                self._write({"header": header})
        except BaseException:
            self._file.close()
            raise

    def add(self, measurement: Measurement) -> None:
        """Appends a measurement."""
        self._write(measurement.to_dict())
        self.contents.measurements.append(measurement)

    def note(self, name: str, value: Any) -> None:
        """Appends a note."""
        self._write({"note": {name: value}})
        self.contents.notes[name] = value

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def _parsed(path: Path, data: bytes) -> tuple[Contents | None, int]:
    """What a file holds, and the length of its whole lines in bytes. None where not even the header is whole."""
    whole = data.rfind(b"\n") + 1
    lines = data[:whole].split(b"\n")[:-1]
    if not lines:
        started = json.dumps({"header": {"format": FORMAT}}, separators=(",", ":")).encode()[:-2]
        if data and not (data.startswith(started) or started.startswith(data)):
            raise UserError(f"{path} is no file of measurements; name another with --raw.")
        return None, 0
    contents: Contents | None = None
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            if contents is None:
                contents = Contents(found["header"])
                if contents.header["format"] != FORMAT:
                    raise ValueError
            elif "note" in found:
                contents.notes |= found["note"]
            else:
                contents.measurements.append(Measurement.from_dict(found))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if contents is None or number == 1:
                raise UserError(f"{path} is no file of measurements; name another with --raw.") from error
            raise UserError(f"{path}, line {number}: not a measurement of this version.") from error
    return contents, whole


def _compare(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises UserError where the file's measurements do not belong to this run; the sentence names what differs."""
    for key, name in SAME.items():
        if there.get(key) == here.get(key):
            continue
        where, old, new = _difference(there.get(key), here.get(key))
        raise UserError(
            f"{path} holds a part of a run with other {name} ({where}{quoted(old)} there, {quoted(new)} here); go on "
            "with the command that began it, name another file with --raw, or delete it."
        )


def _difference(old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in (*old, *new):
            if old.get(key) != new.get(key):
                where, *values = _difference(old.get(key), new.get(key))
                return f"{key} {where}", values[0], values[1]
    return "", old, new
