"""SHA-256 sums of weights, in a file beside them that `sha256sum --check` reads too."""

from __future__ import annotations

from pathlib import Path

from .embedded import sha256
from .errors import ModelError

FILE = "SHA256SUMS"


def write(folder: Path) -> None:
    """Writes the sums of all safetensors files in `folder`."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def check(folder: Path) -> None:
    """Compares the files in `folder` with their sums, where there are any.

    Raises:
        ModelError: a file is missing, differs or cannot be read, or the sums cannot.
    """
    sums = folder / FILE
    if not sums.is_file():
        return
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
        named = {name: wanted for wanted, name in (line.split("  ", 1) for line in lines)}
        wrong = next((name for name, wanted in named.items() if sha256(folder / name) != wanted), None)
    except (OSError, ValueError) as error:
        raise ModelError(f"The sums in {sums} cannot be compared: {error}.") from error
    if wrong:
        raise ModelError(
            f"{folder / wrong} is damaged or was not fetched whole (its SHA-256 is not that in {FILE}); fetch it again."
        )
