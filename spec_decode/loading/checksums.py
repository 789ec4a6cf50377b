"""SHA-256 sums of weights, in a file beside them that `sha256sum --check` reads too."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError
from .embedded import sha256

FILE = "SHA256SUMS"


def write(folder: Path) -> None:
    """Writes the sums of all safetensors files in `folder`."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def read(folder: Path) -> dict[str, str]:
    """The sums that are written in `folder`, by file name; empty where there are none. Compares nothing.

    Raises:
        ModelError: they cannot be read.
    """
    sums = folder / FILE
    if not sums.is_file():
        return {}
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
        return {name: wanted for wanted, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise _unusable(sums, error) from error


def check(folder: Path) -> None:
    """Compares the files in `folder` with their sums, where there are any.

    Raises:
        ModelError: a file is missing, differs or cannot be read, or the sums cannot.
    """
    wanted = read(folder)
    try:
        wrong = next((name for name, value in wanted.items() if sha256(folder / name) != value), None)
    except (OSError, ValueError) as error:
        raise _unusable(folder / FILE, error) from error
    if wrong:
        raise ModelError(
            f"{folder / wrong} is damaged or was not fetched whole (its SHA-256 is not that in {FILE}); fetch it again."
        )


def _unusable(sums: Path, error: Exception) -> ModelError:
    return ModelError(f"The sums in {sums} cannot be compared: {error}.")
