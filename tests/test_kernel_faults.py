"""What goes wrong around the kernels: damaged files, no place to keep any, threads that fail, forks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import njit

from spec_decode import noise_hash
from spec_decode.cpu.kernels import compiled, sharing
from spec_decode.cpu.kernels.sharing import team

ROOT = Path(__file__).parents[1]
SOURCE = """
from spec_decode.cpu.kernels.compiled import kernel

@kernel
def thrice(x, out):
    for i in range(x.shape[0]):
        out[i] = 3 * x[i] + 0.25
"""


class Kept:
    """A small kernel and the files it is kept in."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "small.py"
        self.source.write_text(SOURCE)
        self.folder = folder / "__pycache__"

    def use(self, dtype: Any = np.float32) -> int:
        """As a new process would: loads or compiles, and runs. Returns how often something kept was used."""
        spec = importlib.util.spec_from_file_location("small", self.source)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        x = np.arange(40, dtype=dtype)
        out = np.zeros_like(x)
        module.thrice(x, out)
        assert np.array_equal(out, 3 * x + 0.25)
        return sum(module.thrice.stats.cache_hits.values())

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*.nb*"))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return Kept(tmp_path)


def flip(at: float) -> Callable[[Path], None]:
    """One bit of one byte, this far into the file."""

    def harm(path: Path) -> None:
        held = bytearray(path.read_bytes())
        held[int(at * (len(held) - 1))] ^= 4
        path.write_bytes(held)

    return harm


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(b"garbage " * 100),
        *(flip(at) for at in (0.0, 0.2, 0.5, 0.8, 1.0)),
    ],
    ids=["empty", "truncated", "garbage", "first", "flip 20 %", "flip 50 %", "flip 80 %", "last"],
)
def test_a_damaged_kernel_is_compiled_again(kept: Kept, harm: Callable[[Path], None]) -> None:
    assert (kept.use(), kept.use()) == (0, 1)
    for path in kept.files():
        harm(path)
    assert kept.use() == 0, "damaged, it was run"
    assert kept.use() == 1, "it was not mended"


def test_a_whole_file_in_anothers_place_is_not_taken_for_it(kept: Kept) -> None:
    """The machine code of one kind of arguments would read another kind's beyond its end."""
    assert (kept.use(np.float32), kept.use(np.float64)) == (0, 0)
    one, other = (path for path in kept.files() if path.suffix == ".nbc")
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    assert (kept.use(np.float32), kept.use(np.float64)) == (0, 0)
    assert (kept.use(np.float32), kept.use(np.float64)) == (1, 1)


def test_nothing_can_be_kept(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's directory cannot be written and there is no home."""
    kept.folder.write_text("a file where a directory is wanted")
    monkeypatch.setenv("HOME", os.devnull)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert (kept.use(), kept.use()) == (0, 0)


def test_the_place_is_lost_while_it_runs(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills, say, or is made read-only, after the kernel has found its place."""
    import tempfile

    real = tempfile.TemporaryFile

    def lost(*arguments: Any, **options: Any) -> Any:
        made = real(*arguments, **options)  # Numba's probe, when the kernel is defined
        shutil.rmtree(kept.folder, ignore_errors=True)
        kept.folder.write_text("a file where a directory is wanted")
        return made

    monkeypatch.setattr(tempfile, "TemporaryFile", lost)
    assert kept.use() == 0


def test_kept_code_depends_on_every_source_it_was_made_of() -> None:
    """The hash lies outside the kernels' directory."""
    assert Path(noise_hash.__file__) in compiled._SOURCES
    assert {path.name for path in compiled._SOURCES} >= {"rows.py", "floats.py", "products.py", "arguments.py"}


def meet() -> None:
    """Returns once two threads are inside a kernel.

    Raises threading.BrokenBarrierError where no helper comes.
    """
    barrier = threading.Barrier(2)
    team.run(lambda tickets: barrier.wait(10), 1, threads=2)


@njit(nogil=True)
def both(tickets: Any, fails: Any) -> Any:
    """Two chunks, one for each of two threads, since neither is done before both are drawn. One may fail."""
    c = sharing.next_chunk(tickets, 0, 2)
    while c >= 0:
        while sharing._look(tickets, 0) < 2:
            pass
        if fails:
            raise ValueError("no memory left")
        c = sharing.finish_chunk(tickets, 0, 2)
    return 7


@pytest.mark.parametrize("who", ["helper", "caller"])
def test_a_thread_that_fails_holds_up_nobody(who: str) -> None:
    meet()
    seen: list[Any] = []

    def call() -> None:
        caller = threading.current_thread()

        def kernel(tickets: np.ndarray) -> Any:
            return both(tickets, (threading.current_thread() is caller) == (who == "caller"))

        try:
            seen.append(team.run(kernel, 1, threads=2))
        except ValueError as error:
            seen.append(str(error))

    both(np.full(sharing.TICKETS, 5), False)  # compiled
    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(20)
    assert seen == ["no memory left"]
    meet()  # there is a helper again


def test_the_buffers_are_the_callers_own_again_when_it_is_told() -> None:
    """Even those of a helper that is still at work when the caller fails."""
    begun, out = threading.Event(), []

    def kernel(tickets: np.ndarray) -> None:
        if threading.current_thread().name != "kernel":
            begun.wait(10)
            raise ValueError("no memory left")
        begun.set()
        threading.Event().wait(0.3)
        out.append("written")

    with pytest.raises(ValueError, match="no memory left"):
        team.run(kernel, 1, threads=2)
    assert out == ["written"]


def run(script: str, **environment: str) -> str:
    """What a Python process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_helpers_of_its_own() -> None:
    said = run(
        """
        import os, sys, threading, warnings
        warnings.simplefilter("ignore")
        import numpy as np
        from spec_decode.cpu.kernels import exponential
        from spec_decode.cpu.kernels.sharing import team

        def meet():
            barrier = threading.Barrier(2)
            team.run(lambda tickets: barrier.wait(10), 1, threads=2)

        def noise():
            return exponential(np.arange(6, dtype=np.uint32).reshape(3, 2), np.arange(500, dtype=np.uint32))

        team.threads = 2
        meet()
        before = noise()
        child = os.fork()
        if child == 0:
            try:
                meet()
                os._exit(0 if np.array_equal(noise(), before) else 3)
            finally:
                os._exit(4)
        print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        meet()
        """
    )
    assert said == "child 0\n"
