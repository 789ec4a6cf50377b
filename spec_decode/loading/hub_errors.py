"""What transformers and the Hugging Face Hub raise while a checkpoint is read, as one sentence that says what to do."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError, is_out_of_memory
from . import catalog


class OneSentence:
    """A context manager that turns an exception from loading `part` of `name` into a `ModelError`.

    Args:
        name: Hub id or directory.
        revision: that was asked for.
        part: "config", "tokenizer" or "weights".
    """

    def __init__(self, name: str, revision: str | None = None, part: str = "weights") -> None:
        self.name = name
        self.revision = revision
        self.part = part

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, ModelError):
            return
        raise ModelError(self._sentence(error)) from error

    def _sentence(self, error: Exception) -> str:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ or chain[-1].__context__:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
        kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
        status: set[int] = {getattr(getattr(link, "response", None), "status_code", 0) for link in chain}
        name = self.name
        near = catalog.suggestion(name)
        instead = f"; the nearest real name is {near}" if near else ""
        if is_out_of_memory(error):
            return f"{name} does not fit into memory; quantize it, or choose a smaller model or dtype."
        if "GatedRepoError" in kinds:
            return f"{name} is gated: accept its licence on its Hub page and log in with `hf auth login`."
        if "RevisionNotFoundError" in kinds:
            return f"{name} has no revision {self.revision!r}; name a branch, a tag or a commit of it."
        if Path(name).is_dir():
            return self._unusable(error)
        if Path(name).is_absolute() or name.startswith((".", "~")):
            return f"There is no directory {name!r} on this disk."
        if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
            private = " (a private one needs `hf auth login`)"
            return f"There is no model {name!r} on the Hub or on this disk{instead or private}."
        if 401 in status:
            return f"The Hub does not accept your token, so {name} cannot be read; log in anew with `hf auth login`."
        if 403 in status:
            return f"Your token may not read {name}; give it access to gated repositories on the Hub."
        if busy := [code for code in status if code == 429 or code >= 500]:
            return f"The Hugging Face Hub answers with error {busy[0]}, so {name} cannot be read; try again later."
        if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "TransportError", "ConnectionError"}:
            pinned = f" at revision {self.revision}" if self.revision else ""
            return (
                f"{name}{pinned} is not on this disk and the Hugging Face Hub cannot be reached; check the network or "
                f"the path{instead}."
            )
        return self._unusable(error)

    def _unusable(self, error: Exception) -> str:
        """The checkpoint exists, and `part` is missing or broken."""
        if self.part == "tokenizer":
            return f"{self.name} has no tokenizer that can be read; it takes a tokenizer.json beside its weights."
        if self.part == "config":
            return f"{self.name} has no config.json that can be used: {_first_line(error)}"
        return f"{self.name} is not a usable safetensors checkpoint of a causal language model: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :,")
    return line if line.endswith(".") else f"{line}."
