"""Compiled kernels, and where they are kept on disk.

Numba trusts what it finds in its cache: of a file that was cut short it makes a traceback, and machine code with a
flipped bit it runs. Here a file begins with a seal, the SHA-256 of its name and of what follows. One whose seal does
not hold counts as absent, so the kernel is compiled once more, and the file replaced. Where nothing can be kept,
because neither the package's directory nor the user's can be written, kernels are compiled at every start.
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

# What machine code is made of besides the function's own source, which Numba looks at: all of ours, and the compiler.
_EDITION = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    + f"{numba.__version__} {llvmlite.__version__}".encode()
).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled for every kind of arguments when they first come, and kept on disk, if there is a place for it."""
    compiled = njit(nogil=True)(function)
    with suppress(RuntimeError):  # there is none
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
        except Exception:  # whatever is wrong with what was kept, it can be compiled
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # no space left, or no right to write any more: it works without
            super().save_overload(sig, data)


class _SealedFiles:
    """Objects on disk by key, each in a file of its own. Anything but what `save` wrote there is as good as nothing."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def _path(self, key: Any) -> Path:
        of = hashlib.sha256(f"{_EDITION} {key}".encode()).hexdigest()
        return self._folder / f"{self._name}.{of[:24]}.nbc"

    def load(self, key: Any) -> Any:
        path = self._path(key)
        try:
            held = path.read_bytes()
        except OSError:
            return None
        seal, data = held[:32], held[32:]
        return pickle.loads(data) if seal == _seal(path, data) else None

    def save(self, key: Any, value: Any) -> None:
        path, data = self._path(key), dumps(value)
        handle, written = tempfile.mkstemp(prefix=f"{self._name}.", suffix=".tmp", dir=self._folder)
        try:
            with open(handle, "wb") as file:
                file.write(_seal(path, data) + data)
            os.chmod(written, 0o644)
            os.replace(written, path)  # at once, or not at all
        except BaseException:
            os.unlink(written)
            raise

    def flush(self) -> None:
        for path in self._folder.glob(f"{self._name}.*.nbc"):
            path.unlink(missing_ok=True)


def _seal(path: Path, data: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + data).digest()
