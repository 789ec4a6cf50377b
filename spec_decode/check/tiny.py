"""Tiny random models of the real classes, and a tokenizer of one character a token: what checks and tests race.

No download and no weights on disk.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
WINDOW = 16  # positions that a sliding-window layer sees
OTHERS = ("llama", "gemma3", "qwen2", "qwen3")
GEMMA4 = ("dense", "shared", "k_eq_v", "moe", "unified")
SLIDING = ["sliding_attention", "full_attention"] * 2
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # logits far enough apart that float32 rounding decides nothing
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random float32 model of one of `OTHERS`, in evaluation mode.

    Raises:
        ValueError: there is no such kind.
    """
    torch.manual_seed(seed)
    options = {**COMMON, **changes}
    made: PreTrainedModel
    if kind == "llama":
        made = LlamaForCausalLM(LlamaConfig(**options))
    elif kind == "gemma3":
        made = Gemma3ForCausalLM(Gemma3TextConfig(**options, head_dim=8, sliding_window=WINDOW, layer_types=SLIDING))
    elif kind == "qwen2":
        made = Qwen2ForCausalLM(Qwen2Config(**options))
    elif kind == "qwen3":
        made = Qwen3ForCausalLM(
            Qwen3Config(**options, head_dim=8, use_sliding_window=True, sliding_window=WINDOW, layer_types=SLIDING)
        )
    else:
        raise ValueError(kind)
    return made.eval()


def gemma4(kind: str, seed: int = 0, ordered: bool = False, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny random Gemma 4 target of a real shape and the assistant to it, float32.

    dense; shared: E2B and E4B, later layers reuse keys and values, are twice as wide, and every layer has its own
    embedding; k_eq_v: 31B, one projection for keys and values in full attention, fewer heads there; moe: 26B-A4B, the
    same with a mixture of experts; unified: 12B, the same in classes of its own.
    """
    torch.manual_seed(seed)
    layers = 6 if kind == "shared" else 4
    options: dict[str, Any] = {
        **COMMON,
        "num_hidden_layers": layers,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": SLIDING[:2] * (layers // 2),
        **changes,
    }
    merged = kind in ("k_eq_v", "moe", "unified")
    heads = {"attention_k_eq_v": True, "num_global_key_value_heads": 1} if merged else {}
    own: dict[str, Any] = {"hidden_size_per_layer_input": 0, **heads}
    if kind == "shared":
        own |= {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "use_double_wide_mlp": True}
        own["vocab_size_per_layer_input"] = options["vocab_size"]
    if kind == "moe":
        own |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    small = {**options, "hidden_size": 16, "num_hidden_layers": 2, "layer_types": SLIDING[:2], **heads}
    lists = {"use_ordered_embeddings": ordered, "num_centroids": 8, "centroid_intermediate_top_k": 3}
    target: PreTrainedModel
    assistant: PreTrainedModel
    if kind == "unified":
        target = Gemma4UnifiedForCausalLM(Gemma4UnifiedTextConfig(**options, **heads))
        assistant = Gemma4UnifiedAssistantForCausalLM(
            Gemma4UnifiedAssistantConfig(
                text_config=Gemma4UnifiedTextConfig(**small), backbone_hidden_size=options["hidden_size"], **lists
            )
        )
    else:
        target = Gemma4ForCausalLM(Gemma4TextConfig(**options, **own))
        text = Gemma4TextConfig(
            **small, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=2
        )
        assistant = Gemma4AssistantForCausalLM(
            Gemma4AssistantConfig(text_config=text, backbone_hidden_size=options["hidden_size"], **lists)
        )
    if ordered:
        assistant.masked_embedding.token_ordering.copy_(torch.randperm(options["vocab_size"]))
    return target.eval(), assistant.eval()


class Characters:
    """A tokenizer of one character a token."""

    chat_template = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(32 + i) for i in ids)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [(ord(c) - 32) % VOCABULARY for c in text]}
