"""Checkpoints of transformers models.

In: a Hub id or a local directory. Out: a configuration, a tokenizer, or a model on its device. Reads safetensors only,
runs no remote code, and sends requests only for the repository that was named. What transformers and the Hub raise
becomes a `ModelError` of one sentence (`hub_errors`). A model that cannot be raced is refused by its configuration,
before its weights are downloaded. Independent of pairs.
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

from .. import attention  # noqa: F401  (transformers then knows its implementation)
from ..cache import layer_kinds
from ..cpu import llama as cpu
from ..drafters import kinds
from ..errors import ModelError
from . import checksums, memory, quantized
from .hub_errors import OneSentence

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,  # loaded in float32, then quantized by `cpu.llama`
}
SHORTEST_CONTEXT = 32  # positions: the longest draft and a few tokens before it
_OTHER_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack")
_TOWERS = ("gemma4", "gemma4_unified")  # multimodal; of their checkpoints only the text model is loaded


@dataclass(frozen=True)
class How:
    """How a model is loaded, besides its device and dtype.

    Attributes:
        precision: of linear layers quantized with bitsandbytes, a name of `catalog.PRECISIONS`.
        spread: over all GPUs, with accelerate.
        attention: the implementation, by its name in transformers; None leaves it to transformers.
        revision: a branch, tag or commit of the repository.
    """

    precision: str | None = None
    spread: bool = False
    attention: str | None = None
    revision: str | None = None


def read_config(path: str, revision: str | None = None) -> Any:
    """The configuration of the model that `load_model` or `load_assistant` loads from `path`; of a multimodal Gemma 4
    that of its text model.

    Raises:
        ModelError: it cannot be found, downloaded or read, or the model can be neither a target nor a drafter.
    """
    _check_directory(path)
    with OneSentence(path, revision, "config"):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if config.model_type in _TOWERS:
        text = config.get_text_config(decoder=True)
        if hasattr(config, "quantization_config"):
            text.quantization_config = config.quantization_config
        config = text
    _check_architecture(path, config)
    return config


def read_target_config(path: str, revision: str | None = None) -> Any:
    """As `read_config`, of a model that can be a target.

    Raises:
        ModelError: as `read_config`; or it is a drafter only, or its context is too short for a draft.
    """
    config = read_config(path, revision)
    kind = kinds.of_checkpoint(config.model_type)
    if not kind.stands_alone:
        raise ModelError(
            f"{path} is an {kind.title} drafter and writes nothing alone; name it with --drafter, beside its target."
        )
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(context, int) and context and context < SHORTEST_CONTEXT:
        raise ModelError(f"{path} has a context of {context} tokens; a race takes at least {SHORTEST_CONTEXT}.")
    return config


def _check_architecture(path: str, config: Any) -> None:
    """Raises ModelError for a model that does not generate text autoregressively, or whose state cannot roll back."""
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
    """Refuses a local path that holds no usable checkpoint. A path that does not exist may be a Hub id.

    Raises:
        ModelError: it is a file, cannot be read, or holds Git LFS pointers, only an adapter, or another format.
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
    except OSError as error:  # also for a name that is too long
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
    other = [name for name in names if name.endswith(_OTHER_FORMATS)]
    if other and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise ModelError(f"{path} holds its weights as {other[0]}; only safetensors checkpoints are read.")


def _is_pointer(file: Path) -> bool:
    """Whether this is a Git LFS pointer, in place of a large file that was not fetched."""
    if file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(40).startswith(b"version https://git-lfs.github.com/spec/")


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a Hub id or directory.

    Raises:
        ModelError: it cannot be found, downloaded or read.
    """
    with OneSentence(path, revision, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def load_model(path: str, device: torch.device, dtype: str, how: How | None = None) -> PreTrainedModel:
    """A causal language model from a Hub id or directory, on `device`, in a dtype of `DTYPES`.

    Raises:
        ModelError: it cannot be found, downloaded or read, or does not fit into memory.
    """
    how = how or How()
    read_target_config(path, how.revision)
    model = _from_pretrained(path, device, dtype, how)
    with OneSentence(path):
        return (cpu.quantize(model) if dtype == "int8" else model).eval().requires_grad_(False)


def load_assistant(path: str, device: torch.device, dtype: str, how: How | None = None) -> PreTrainedModel:
    """A model that is a drafter only, such as a Gemma 4 assistant, with or without its head (see `MTPDrafter`), in a
    dtype of `DTYPES`.

    Raises:
        ModelError: it cannot be found, downloaded or read, does not fit into memory, or differs from the checksums
            beside it.
    """
    checksums.check(Path(path))
    model = _from_pretrained(path, device, dtype, how or How())
    return model.eval().requires_grad_(False)


def quantized_copy(model: PreTrainedModel, precision: str, device: torch.device) -> PreTrainedModel:
    """A model that is in memory already, with its linear layers quantized by bitsandbytes as `load_model` does it from
    a checkpoint. Both are in memory for a while.

    Args:
        precision: a name of `catalog.PRECISIONS`.

    Raises:
        ModelError: bitsandbytes is not installed, or takes none of its layers on this device.
    """
    with _quiet():
        copy: PreTrainedModel = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            dtype=model.dtype,
            quantization_config=_bitsandbytes(precision, model.dtype, device, model.config, type(model).__name__),
            device_map={"": device},
        )
    copy.generation_config = model.generation_config
    return copy.eval().requires_grad_(False)


def advised_length(path: str) -> int | None:
    """The draft length in the generation config of a drafter, where that is on this disk; None otherwise. Sends no
    request."""
    with suppress(OSError, ValueError):
        advice = GenerationConfig.from_pretrained(path, local_files_only=True).num_assistant_tokens
        return advice if isinstance(advice, int) else None
    return None


def _from_pretrained(path: str, device: torch.device, dtype: str, how: How) -> PreTrainedModel:
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # it sends a request to another repository
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
    with _quiet(), OneSentence(path, how.revision):
        model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    # transformers initializes missing weights at random. Only a head that is shared with the target may be missing.
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
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a cast to float16 for every layer
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
        # A list replaces the patterns that transformers skips by default.
        llm_int8_skip_modules=[*quantized.kept(empty), *(f"{re.escape(name)}$" for name in left)] if left else None,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no report of weights that are not loaded on purpose."""
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
