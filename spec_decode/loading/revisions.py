"""Which version of a checkpoint was loaded: the commit of a repository, and SHA-256 sums of its weights.

In: a Hub id or a directory that was loaded. Out: a `Revision` for the trace of a race. No file is hashed for it: the
sums are those that were compared when the weights were loaded, or those that the Hub gives for a downloaded file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict

from huggingface_hub import try_to_load_from_cache

from . import embedded

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Revision(TypedDict):
    """A loaded checkpoint.

    Keys:
        id: Hub id, directory, or the name of what comes with the app.
        revision: the commit where it is known, else the revision that was asked for, else None.
        sha256: of its files of weights, by file name; None where they are not known.
    """

    id: str
    revision: str | None
    sha256: dict[str, str] | None


def of_checkpoint(path: str, revision: str | None = None) -> Revision:
    """The revision of a Hub id or directory that was loaded; `revision` is the one that was asked for."""
    snapshot = _snapshot(path, revision)
    if snapshot is None:
        return {"id": path, "revision": revision, "sha256": None}
    # The Hub's cache links to a large file by its SHA-256.
    sums = {file.name: file.resolve().name for file in sorted(snapshot.glob("*.safetensors"))}
    known = bool(sums) and all(map(_SHA256.fullmatch, sums.values()))
    return {"id": path, "revision": snapshot.name, "sha256": sums if known else None}


def of_embedded() -> Revision:
    """The revision of the embedded target, which is in the cache."""
    sums = embedded.weights_sha256()
    from_hub = embedded.HUB_WEIGHTS_SHA256 in sums.values()
    return {
        "id": embedded.NAME,
        "revision": embedded.HUB_REVISION if from_hub else embedded.REQUIREMENT,
        "sha256": sums,
    }


def _snapshot(path: str, revision: str | None) -> Path | None:
    """The directory of a Hub repository's commit in the Hub's cache, None for a local directory."""
    if Path(path).is_dir():
        return None
    config = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None
