"""Checkpoints: a Hub id or a local directory goes in; a configuration, a tokenizer or a model on its device comes out.

safetensors only, no remote code, and no request but for the repository that was named. Whatever transformers and the
Hub raise becomes a `ModelError` of one sentence. What cannot be raced is refused by its configuration, before its
weights are fetched. Knows nothing of pairs.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from . import catalog, checksums, cpu, memory, quantized
from .cache import layer_kinds
from .drafters.mtp import MODEL_TYPES
from .errors import ModelError, is_out_of_memory

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,  # loaded so, then quantized: see cpu
}
SHORTEST_CONTEXT = 32  # positions: a draft of the longest kind and something before it
_OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack")
_TOWERS = ("gemma4", "gemma4_unified")  # their checkpoints hold vision and audio too, which are left on the disk


@dataclass(frozen=True)
class How:
    """Besides device and dtype.

    Attributes:
        precision: of linear layers through bitsandbytes, a name of `catalog.PRECISIONS`.
        spread: over all GPUs, through accelerate.
        attention: a name of `catalog.ATTENTION`.
        revision: a branch, tag or commit of the repository.
    """

    precision: str | None = None
    spread: bool = False
    attention: str | None = None
    revision: str | None = None


def read_config(path: str, revision: str | None = None) -> Any:
    """The configuration of what `load_model` or `load_assistant` would load: of a multimodal Gemma 4, its text model's.

    Raises:
        ModelError: it cannot be found, fetched or read, or is of a model that can neither be raced nor draft.
    """
    _check_directory(path)
    with _OneSentence(path, revision, "config"):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if config.model_type in _TOWERS:
        text = config.get_text_config(decoder=True)
        if hasattr(config, "quantization_config"):
            text.quantization_config = config.quantization_config
        config = text
    _check_architecture(path, config)
    return config


def read_target_config(path: str, revision: str | None = None) -> Any:
    """As `read_config`, of a model that can stand alone.

    Raises:
        ModelError: as `read_config`; it is a drafter of Gemma 4's; its context is too short for a draft.
    """
    config = read_config(path, revision)
    if is_assistant(config):
        raise ModelError(
            f"{path} is an MTP drafter and writes nothing alone; name it with --drafter, beside its target."
        )
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(context, int) and context and context < SHORTEST_CONTEXT:
        raise ModelError(f"{path} has a context of {context} tokens; a race takes at least {SHORTEST_CONTEXT}.")
    return config


def _check_architecture(path: str, config: Any) -> None:
    """Raises ModelError for a model that does not write text a token at a time, or whose state cannot roll back."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ModelError(f"{path} cannot be used: {kind} has an encoder and a decoder; choose a decoder-only model.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{path} cannot be used: {kind} is no causal language model to transformers; choose a decoder-only model "
            "that writes text."
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        raise ModelError(
            f"{path} cannot be used: this {kind} is an encoder, which reads text in both directions; choose a "
            "decoder-only model that writes it."
        )
    try:
        layer_kinds(config)
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}; choose a model of attention layers alone.") from error
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False):
        raise ModelError(
            f"{path} cannot be used: {kind} has recurrent layers, whose state cannot roll back; choose a model of "
            "attention layers alone."
        )


def _check_directory(path: str) -> None:
    """Refuses local files that only look like a checkpoint. What is not on this disk may be on the Hub.

    Raises:
        ModelError: it is a file, cannot be read, or holds Git LFS pointers, an adapter or another format.
    """
    home = Path(path)
    try:
        if home.is_file():
            raise ModelError(
                f"{path} is a file; name the directory of a safetensors checkpoint instead (GGUF files are not read)."
            )
        if not home.is_dir():
            return
        files = sorted(file for file in home.iterdir() if file.is_file())
        pointers = [file.name for file in files if _is_pointer(file)]
    except OSError as error:  # a name that is too long, too
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelError(f"{path!r} is no path: {error}.") from error
    names = [file.name for file in files]
    if pointers:
        raise ModelError(
            f"{path} holds Git LFS pointers instead of the files themselves ({', '.join(pointers[:3])}); fetch them "
            "with `git lfs pull`."
        )
    if "config.json" not in names and "adapter_config.json" in names:
        raise ModelError(f"{path} holds an adapter alone; merge it into its base model (merge_and_unload of peft).")
    other = [
        name for name in names if name.endswith((".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack"))
    ]
    if other and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise ModelError(f"{path} holds its weights as {other[0]}; only safetensors checkpoints are read.")


def _is_pointer(file: Path) -> bool:
    """Whether this is what Git leaves in place of a large file that Git LFS has not fetched."""
    if file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(40).startswith(b"version https://git-lfs.github.com/spec/")


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a Hub id or directory.

    Raises:
        ModelError: it cannot be found, fetched or read.
    """
    with _OneSentence(path, revision, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def load_model(path: str, device: torch.device, dtype: str, how: How | None = None) -> PreTrainedModel:
    """A causal model from a Hub id or directory, on `device`, in a dtype of `DTYPES`.

    Raises:
        ModelError: it cannot be found, fetched, read or fitted.
    """
    how = how or How()
    read_target_config(path, how.revision)
    model = _from_pretrained(path, device, dtype, how)
    with _OneSentence(path):
        return (cpu.quantize(model) if dtype == "int8" else model).eval().requires_grad_(False)


def load_assistant(path: str, device: torch.device, dtype: str, how: How | None = None) -> PreTrainedModel:
    """A Gemma 4 assistant, with or without its head (see `MTPDrafter`), in a dtype of `DTYPES`.

    Raises:
        ModelError: it cannot be found, fetched, read or fitted, or it is not what its checksums say.
    """
    checksums.check(Path(path))
    model = _from_pretrained(path, device, dtype, how or How())
    return model.eval().requires_grad_(False)


def is_assistant(config: Any) -> bool:
    """Whether this is the configuration of a Gemma 4 assistant."""
    return config.model_type in MODEL_TYPES


def advised_length(path: str) -> int | None:
    """The draft length in the generation config of an assistant, if that is on this disk; asks nobody."""
    with suppress(OSError, ValueError):
        advice = GenerationConfig.from_pretrained(path, local_files_only=True).num_assistant_tokens
        return advice if isinstance(advice, int) else None
    return None


def _from_pretrained(path: str, device: torch.device, dtype: str, how: How) -> PreTrainedModel:
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # it would ask another repository to convert this one
    config = read_config(path, how.revision)
    options: dict[str, Any] = {
        "config": config,
        "dtype": DTYPES[dtype],
        "revision": how.revision,
        "use_safetensors": True,
        "trust_remote_code": False,
        "key_mapping": {r"^model\.language_model\.": "model."} if config.model_type.startswith("gemma4") else None,
    }
    if how.attention:
        options["attn_implementation"] = how.attention
    if how.precision:
        options["quantization_config"] = _bitsandbytes(how.precision, DTYPES[dtype], device, config, path)
    if how.spread:
        options["device_map"] = "auto"
    elif how.precision or device.type == "cuda":
        options["device_map"] = {"": device}
    with _quiet(), _OneSentence(path, how.revision):
        model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    # transformers would fill a gap with random numbers; only a head that is the target's may be left out.
    missing = {name for name in found["missing_keys"] if not getattr(config, "shares_target_head", False)}
    if missing:
        raise ModelError(
            f"{path} is not a complete checkpoint of {type(model).__name__}: {len(missing)} weights are missing, "
            f"{min(missing)} for one."
        )
    elsewhere = set(map(str, getattr(model, "hf_device_map", {}).values())) & {"cpu", "disk"}
    if how.spread and device.type == "cuda" and elsewhere:
        raise ModelError(
            f"{path} does not fit on the GPUs of this machine together; quantize it, or choose a smaller one."
        )
    return model if "device_map" in options else model.to(device)


def _bitsandbytes(
    precision: str, dtype: torch.dtype, device: torch.device, config: Any, path: str
) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("Quantizing takes bitsandbytes, which is not installed; run `pip install bitsandbytes`.")
    if device.type == "mps":
        raise ModelError("bitsandbytes cannot quantize on Apple's MPS; leave --quantize out, or choose --device cpu.")
    if precision == "int8":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a cast to float16 in every layer
        return BitsAndBytesConfig(load_in_8bit=True)
    empty = memory.empty(config)
    left, every = quantized.left_out(empty, precision, device), quantized.linears(empty)
    if left and len(left) == len(every):
        raise ModelError(
            f"bitsandbytes can hold none of the linear layers of {path} in {precision} on this processor "
            f"({quantized.TAKES}); leave --quantize out, or choose int8."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # A list stands in for the patterns that transformers skips of itself.
        llm_int8_skip_modules=[*quantized.kept(empty), *(f"{re.escape(name)}$" for name in left)] if left else None,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no report of weights that are left on the disk on purpose."""
    transformers_logging.disable_progress_bar()
    loud = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(loud)


class _OneSentence:
    """Turns what transformers and the Hub raise while loading `part` of `name`, its "config", "tokenizer" or
    "weights", into a `ModelError` that says what to do."""

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
        """It is there, and something in it is missing or broken."""
        if self.part == "tokenizer":
            return f"{self.name} has no tokenizer that can be read; it takes a tokenizer.json beside its weights."
        if self.part == "config":
            return f"{self.name} has no config.json that can be used: {_first_line(error)}"
        return f"{self.name} is not a usable safetensors checkpoint of a causal language model: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :,")
    return line if line.endswith(".") else f"{line}."
