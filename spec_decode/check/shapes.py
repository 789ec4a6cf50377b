"""Random pairs in the shapes of Gemma 4, in memory, and a tokenizer of words for them.

In: names of the catalog, or a model. Out: models on their device, a tokenizer, a `Pair`. No download, and no weights on
disk: a model is made where it runs. Random weights measure the cost of a pass; their acceptance rate means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as pieces
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..errors import UserError
from ..loading import catalog
from ..loading.checkpoints import quantized_copy
from ..loading.pair import Pair, assemble
from . import tiny

# Tiny stand-ins for the catalog's shapes, of the same classes, for a rehearsal.
STAND_INS = {
    "gemma-4-E2B": "shared",
    "gemma-4-E4B": "shared",
    "gemma-4-12B": "unified",
    "gemma-4-26B-A4B": "moe",
    "gemma-4-31B": "k_eq_v",
}


def shaped(name: str, device: torch.device) -> Iterator[PreTrainedModel]:
    """Target and drafter of a catalog entry with random bfloat16 weights, made on the device, one after the other.

    Raises:
        UserError: the catalog has no such pair.
    """
    entry = _entry(name)
    for kind, shape in ((entry.kind, entry.shape), (entry.drafter_kind, entry.drafter_shape)):
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape), dtype=torch.bfloat16)
            if kind == entry.drafter_kind and model.config.use_ordered_embeddings:
                ordering = model.masked_embedding.token_ordering
                ordering.copy_(torch.randperm(len(ordering)))
        model.config.get_text_config().eos_token_id = model.generation_config.eos_token_id = None
        yield model


def stand_in(name: str, device: torch.device) -> Iterator[PreTrainedModel]:
    """As `shaped`, of a tiny pair of the same classes.

    Raises:
        UserError: the catalog has no such pair.
    """
    entry = _entry(name)
    kind = STAND_INS[entry.name]
    for model in tiny.gemma4(kind, ordered=kind == "shared", hidden_size=64, max_position_embeddings=2048):
        model.generation_config.eos_token_id = None
        yield model.to(device, torch.bfloat16)


def words(vocabulary: int, template: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, …; with a chat template if asked for."""
    known = {f"w{i}": i for i in range(vocabulary)}
    made = Tokenizer(pieces.WordLevel(known, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
    if template:
        tokenizer.chat_template = "w1 {{ messages[0]['content'] }} w2 w3 "
    return tokenizer


def text(tokens: int) -> str:
    """A prompt of that many words."""
    return " ".join(f"w{(7 * i * i + 3 * i) % 90}" for i in range(tokens))


def pair(name: str, models: Iterator[PreTrainedModel] | tuple[PreTrainedModel, PreTrainedModel], **how: Any) -> Pair:
    """A pair of a target and its drafter, measured and ready to race.

    Args:
        models: the target and the drafter.
        how: "quantize" as `load_pair` takes it, and the options of `loading.pair.assemble`.
    """
    target, assistant = models
    precisions = catalog.quantization(how.pop("quantize", None))
    if "target" in precisions:
        target = quantized_copy(target, precisions["target"], target.device)
    if "drafter" in precisions:
        assistant = quantized_copy(assistant, precisions["drafter"], assistant.device)
    return assemble(name, target, assistant, words(target.config.get_text_config().vocab_size), **how)


def _entry(name: str) -> catalog.Entry:
    entry = catalog.find(name)
    if entry is None:
        raise UserError(f"There is no pair {name!r}; `python -m spec_decode models` lists them.")
    return entry
