"""Compiled kernels, and where they are kept on disk.

Numba trusts the files of its cache: a truncated one raises an exception, and machine code with a flipped bit is run.
Here a file begins with a seal, the SHA-256 of its name and of its content. A file whose seal does not match counts as
absent: the kernel is compiled again and the file replaced. Where no directory can be written, neither the package's nor
the user's, kernels are compiled at every start.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

from ... import noise_hash

# What machine code depends on besides the kernel's own source, which Numba looks at: the functions it calls, and the
# compiler.
_SOURCES = [*sorted(Path(__file__).parent.glob("*.py")), Path(noise_hash.__file__)]
_EDITION = hashlib.sha256(
    b"".join(path.read_bytes() for path in _SOURCES) + f"{numba.__version__} {llvmlite.__version__}".encode()
).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function at its first call with each type of arguments, and keeps the result on disk if it can."""
    compiled = njit(nogil=True)(function)
    with suppress(RuntimeError):  # no directory can be written
        compiled._cache = _KernelCache(function)
    return compiled


class _KernelCache(FunctionCache):
    """Numba's cache of a function's compiled versions, in sealed files."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _SealedFiles(Path(self.cache_path), self._impl.filename_base)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever is wrong with the file, the function can be compiled
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # the disk is full, say; the kernel works without its file
            super().save_overload(sig, data)


class _SealedFiles:
    """Objects on disk by key, each in a file of its own. A file that `save` did not write counts as absent."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def _path(self, key: Any) -> Path:
        of = hashlib.sha256(f"{_EDITION} {key}".encode()).hexdigest()
        return self._folder / f"{self._name}.{of[:24]}.nbc"

    def load(self, key: Any) -> Any:
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        seal, data = content[:32], content[32:]
        return pickle.loads(data) if seal == _seal(path, data) else None

    def save(self, key: Any, value: Any) -> None:
        path, data = self._path(key), dumps(value)
        handle, temporary = tempfile.mkstemp(prefix=f"{self._name}.", suffix=".tmp", dir=self._folder)
        try:
            with open(handle, "wb") as file:
                file.write(_seal(path, data) + data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)  # atomic
        except BaseException:
            os.unlink(temporary)
            raise

    def flush(self) -> None:
        for path in self._folder.glob(f"{self._name}.*.nbc"):
            path.unlink(missing_ok=True)


def _seal(path: Path, data: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + data).digest()
