"""The drafter before it has learnt anything, and the file it becomes: a plain `Gemma4AssistantForCausalLM`.

In: a target. Out: an assistant that reads keys and values of chosen layers of it, started from the target's own
embeddings so that there is little left to learn; and a checkpoint which transformers loads. Knows nothing of data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig, PreTrainedModel
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantMaskedEmbedder

from .. import checksums
from ..errors import UserError

FEWEST_LISTS = 6  # for frequent, less frequent and other tokens: see lists.BANDS
KINDS = ("sliding_attention", "full_attention")  # in the order of the drafter's layers


@dataclass(frozen=True)
class Shape:
    """intermediate: width of the drafter's MLPs; as wide as the target's they start as copies. layers: the target's
    layers whose keys and values it reads, one drafter layer each. centroids, chosen: lists the vocabulary is split
    into and how many of them a step looks at; 0 looks at every token."""

    intermediate: int = 1536
    layers: tuple[int, ...] = (20, 29)
    centroids: int = 0
    chosen: int = 64


def build(target: Any, shape: Shape) -> Gemma4AssistantForCausalLM:
    """A random assistant for a target with text config `target`.

    Raises:
        UserError: the shape does not fit the target.
    """
    if not 1 <= len(shape.layers) <= len(KINDS):
        raise UserError(f"A drafter reads one or two layers, not {len(shape.layers)}.")
    if any(not 0 <= layer < target.num_hidden_layers for layer in shape.layers):
        raise UserError(f"The target's layers are 0…{target.num_hidden_layers - 1}.")
    own = target.num_hidden_layers - (getattr(target, "num_kv_shared_layers", 0) or 0)
    if any(layer >= own for layer in shape.layers):
        raise UserError(f"Of the target's layers only 0…{own - 1} have keys and values of their own to read.")
    if shape.intermediate < 1:
        raise UserError(f"An MLP cannot be {shape.intermediate} wide.")
    if shape.centroids and (shape.centroids < FEWEST_LISTS or target.vocab_size % shape.centroids):
        raise UserError(
            f"{target.vocab_size} tokens cannot be split into {shape.centroids} equal lists; choose a divisor of at "
            f"least {FEWEST_LISTS}, or 0 for no lists."
        )
    if shape.centroids and not 1 <= shape.chosen <= shape.centroids:
        raise UserError(f"A step looks at 1…{shape.centroids} lists, not {shape.chosen}.")
    kinds = list(KINDS[-len(shape.layers) :])
    head = getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
    rope = getattr(target, "rope_parameters", None) or {}
    turning = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)}
    text = Gemma4TextConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=shape.intermediate,
        num_hidden_layers=len(kinds),
        num_attention_heads=target.num_attention_heads,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=head,
        global_head_dim=head,
        layer_types=kinds,
        sliding_window=target.max_position_embeddings,
        max_position_embeddings=target.max_position_embeddings,
        rope_parameters=dict.fromkeys(KINDS, turning),
        hidden_activation=getattr(target, "hidden_act", None) or target.hidden_activation,
        rms_norm_eps=1e-6,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        num_kv_shared_layers=len(kinds),
        bos_token_id=target.bos_token_id,
        eos_token_id=target.eos_token_id,
        pad_token_id=target.pad_token_id,
    )
    config = Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=target.hidden_size,
        use_ordered_embeddings=shape.centroids > 0,
        num_centroids=max(shape.centroids, 1),
        centroid_intermediate_top_k=shape.chosen,
    )
    config.target_kv_layers = dict(zip(kinds, shape.layers, strict=True))
    return Gemma4AssistantForCausalLM(config)


class Learner(nn.Module):
    """The assistant while it learns.

    It is as wide as the target and its head is the target's own, frozen: a narrower one could not tell the target's
    favourites apart (of SmolLM2's, a projection to 320 of 576 dimensions keeps 74 %), and a token that the texts show
    once moves with all others.
    """

    embed: Tensor  # [V, H], the target's, scaled as it scales it
    head: Tensor  # [V, H]

    def __init__(self, target: PreTrainedModel, shape: Shape) -> None:
        super().__init__()
        config = target.config.get_text_config()
        self.shape = shape
        self.assistant = build(config, shape)
        self.assistant.requires_grad_(True)
        self.assistant.lm_head.requires_grad_(False)
        embedding = target.get_input_embeddings()
        scale = getattr(embedding, "scalar_embed_scale", 1.0)
        self.register_buffer("embed", embedding.weight.detach().float() * float(scale), persistent=False)
        self.register_buffer("head", target.get_output_embeddings().weight.detach().float(), persistent=False)

        self._start(target)

    @torch.no_grad()
    def _start(self, target: PreTrainedModel) -> None:
        """Begins as a drafter that repeats the hidden state it is given, with queries and memories of the target's."""
        assistant: Any = self.assistant
        theirs = target.base_model
        same = torch.eye(self.head.shape[1])
        # Back from what the last norm made of it to the stream that all of the target's layers read.
        weight = theirs.norm.weight.detach().float()
        size = weight.abs().clamp_min(0.05 * weight.abs().mean()) * weight.sign()
        assistant.pre_projection.weight.copy_(torch.cat([0.3 / self.embed.std() * same, same / size], 1))
        assistant.model.norm.weight.copy_(weight)
        assistant.post_projection.weight.copy_(same)
        for layer, source in zip(assistant.model.layers, self.shape.layers, strict=True):
            layer.post_attention_layernorm.weight.fill_(0.3)
            layer.post_feedforward_layernorm.weight.fill_(0.3)
            layer.self_attn.q_norm.weight.fill_(2.0 / math.sqrt(layer.self_attn.head_dim))
            like = dict(theirs.layers[source].named_parameters())
            layer.input_layernorm.weight.copy_(like["input_layernorm.weight"])
            before_mlp = like.get("pre_feedforward_layernorm.weight", like["post_attention_layernorm.weight"])
            layer.pre_feedforward_layernorm.weight.copy_(before_mlp)
            for name, mine in layer.named_parameters():
                if name.endswith("proj.weight") and name in like and like[name].shape == mine.shape:
                    mine.copy_(like[name])

    @torch.no_grad()
    def adopt(self, folder: Path) -> None:
        """Takes over what a drafter in `folder` has learnt, but for attention to layers that this one does not read.

        Raises:
            UserError: there is no drafter of this shape.
        """
        try:
            learnt = load_file(folder / "model.safetensors")
            before = json.loads((folder / "config.json").read_text(encoding="utf-8"))["target_kv_layers"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} holds no drafter to begin with: {error}") from error
        own = dict(self.assistant.named_parameters())
        for i, (kind, layer) in enumerate(self.assistant.config.target_kv_layers.items()):
            if before.get(kind) != layer:
                learnt = {name: value for name, value in learnt.items() if f"layers.{i}.self_attn." not in name}
        for name, value in learnt.items():
            if name not in own or name == "model.embed_tokens.weight":  # lists, and the head that is the target's
                continue
            if own[name].shape != value.shape:
                raise UserError(
                    f"The drafter in {folder} has another shape: {name} is {list(value.shape)} there and "
                    f"{list(own[name].shape)} here."
                )
            own[name].copy_(value)


@torch.no_grad()
def with_lists(learner: Learner, order: Tensor, centroids: Tensor, chosen: int) -> None:
    """Gives the assistant a vocabulary in lists: `order` `[V]` of tokens, list after list, `centroids` `[lists, H]`."""
    assistant: Any = learner.assistant
    config = assistant.config
    config.use_ordered_embeddings, config.num_centroids = True, len(centroids)
    config.centroid_intermediate_top_k = chosen
    assistant.masked_embedding = Gemma4AssistantMaskedEmbedder(config)
    assistant.masked_embedding.centroids.weight.copy_(centroids)
    assistant.masked_embedding.token_ordering.copy_(order)


@torch.no_grad()
def save(learner: Learner, folder: Path, head: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the assistant to `folder` as a transformers checkpoint.

    Without its `head`, which is the target's, it is a tenth of the size, and `MTPDrafter` takes the head from the
    target; transformers alone needs it in the file.
    """
    assistant: Any = learner.assistant
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().to("cpu") for name, value in assistant.state_dict().items()}
    state.pop("lm_head.weight")
    state.pop("model.embed_tokens.weight")
    if head:
        state["model.embed_tokens.weight"] = learner.head.cpu()
    out = {n: value.to(dtype if value.is_floating_point() else value.dtype).contiguous() for n, value in state.items()}
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    checksums.write(folder)
    assistant.config.shares_target_head = True
    assistant.config.dtype = dtype
    assistant.config.architectures = [type(assistant).__name__]
    assistant.config.save_pretrained(folder)
