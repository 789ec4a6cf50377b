"""Mutation testing: deliberate bugs, each of which a named test must find.

    python -m tests.mutants            # all of them
    python -m tests.mutants NAME…      # those whose names contain one of these words

Every mutant replaces one piece of text of one file, in a temporary copy of the tree, and runs the tests that should
fail. The text must occur exactly once: a table that no longer fits the code is an error, not a pass. The named tests
run first without a mutant, since a test that fails anyway kills nothing. Exit code 0: all were killed; 1: one survived;
2: the table is out of date, or a test fails without a mutant. pytest does not collect this file.

Changes that no test can see, and are therefore not in the table:

- Noise of ACCEPT or RESIDUAL taken at position + 1 throughout: a key is still used once, the numbering alone differs.
- `<` for `<=` between a uniform number and a ratio of probabilities: both sides are equal with probability 0.
- A drafter that draws with the stream TARGET under a rule that draws independently: nothing else there reads it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds for the tests of one mutant, compiling kernels included
PASSED, FAILED = 0, 1  # pytest's exit codes; all others mean that it could not run what it was told


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in spec_decode/`file`; `tests` are pytest node ids below tests/, separated by spaces."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def nodes(self) -> list[str]:
        return [f"tests/{node}" for node in self.tests.split()]


MUTANTS: list[Mutant] = []


class Stale(Exception):
    """The table does not fit the code or the tests."""


def mutate(text: str, mutant: Mutant) -> str:
    """`text` with the bug in it.

    Raises:
        Stale: the text to be replaced does not occur exactly once.
    """
    found = text.count(mutant.old)
    if found != 1:
        raise Stale(f"{mutant.name}: found {found} times in {mutant.file}, not once: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def copy_tree(to: Path) -> None:
    """What the tests need of the tree, with times kept, so that compiled kernels remain valid."""
    for name in ("spec_decode", "tests", "assets", "docs"):
        # Python's own compiled files are left out: they are told apart by time and size, which a mutant may share.
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.pyc", "*.tmp.*"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy2(path, to)


def run(tree: Path, nodes: list[str]) -> tuple[int | None, str]:
    """pytest's exit code, None after `TIMEOUT`, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "--durations=0", "-p", "no:cacheprovider", *nodes]
    # One thread: the models of these tests are small.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def check(tree: Path, mutant: Mutant) -> str | None:
    """The test that failed with the bug in place, None if none did.

    Raises:
        Stale: the bug cannot be put in place, or pytest cannot run the tests.
    """
    path = tree / "spec_decode" / mutant.file
    kept = path.with_suffix(".kept")
    shutil.copy2(path, kept)
    try:
        path.write_text(mutate(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
        code, output = run(tree, mutant.nodes)
    finally:
        shutil.move(kept, path)  # with its time
    if code is None:
        return "timeout"
    if code == FAILED:
        failed = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0].removeprefix("tests/") if failed else "a test"
    if code == PASSED:
        return None
    raise Stale(f"{mutant.name}: pytest ended with {code}\n{output[-2000:]}")


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not chosen:
        print("No mutant has such a name.")
        return 2
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        try:
            for mutant in chosen:  # before anything takes time
                mutate((tree / "spec_decode" / mutant.file).read_text(encoding="utf-8"), mutant)
            code, output = run(tree, sorted({node for mutant in chosen for node in mutant.nodes}))
            if code != PASSED:
                raise Stale(f"The tests fail without a mutant:\n{output[-4000:]}")
            for mutant in chosen:
                begun = time.monotonic()
                killer = check(tree, mutant)
                print(
                    f"{'survived' if killer is None else 'killed  '}  {mutant.name}"
                    f"  ({killer or 'by nothing'}, {time.monotonic() - begun:.0f} s)",
                    flush=True,
                )
                if killer is None:
                    survived.append(mutant.name)
        except Stale as error:
            print(error)
            return 2
    print(f"{len(chosen) - len(survived)} of {len(chosen)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
