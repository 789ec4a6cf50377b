"""The untrained drafter and its checkpoint: a plain `Gemma4AssistantForCausalLM`.

In: a target. Out: an assistant that attends to keys and values of chosen layers of the target and is initialized from
the target's weights; and a checkpoint that transformers loads. Independent of the training data.
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

from ..errors import UserError
from ..loading import checksums

FEWEST_LISTS = 6  # so that every band of frequency has lists, see lists.BANDS
KINDS = ("sliding_attention", "full_attention")  # in the order of the drafter's layers


@dataclass(frozen=True)
class Shape:
    """The shape of a drafter.

    intermediate: width of its MLPs; MLPs as wide as the target's are initialized as copies.
    layers: the target's layers whose keys and values it attends to, one for each drafter layer.
    centroids: number of lists that the vocabulary is split into; 0 for none, the head then scores every token.
    chosen: number of lists whose tokens a step scores.
    """

    intermediate: int = 1536
    layers: tuple[int, ...] = (20, 29)
    centroids: int = 0
    chosen: int = 64


def build(target: Any, shape: Shape) -> Gemma4AssistantForCausalLM:
    """A randomly initialized assistant for a target with text config `target`.

    Raises:
        UserError: the shape does not fit the target.
    """
    if not 1 <= len(shape.layers) <= len(KINDS):
        raise UserError(f"A drafter attends to one or two layers, not {len(shape.layers)}.")
    if any(not 0 <= layer < target.num_hidden_layers for layer in shape.layers):
        raise UserError(f"The target's layers are 0…{target.num_hidden_layers - 1}.")
    own = target.num_hidden_layers - (getattr(target, "num_kv_shared_layers", 0) or 0)
    if any(layer >= own for layer in shape.layers):
        raise UserError(f"Only the target's layers 0…{own - 1} have their own keys and values.")
    if shape.intermediate < 1:
        raise UserError(f"An MLP cannot be {shape.intermediate} wide.")
    if shape.centroids and (shape.centroids < FEWEST_LISTS or target.vocab_size % shape.centroids):
        raise UserError(
            f"{target.vocab_size} tokens cannot be split into {shape.centroids} equal lists; choose a divisor of at "
            f"least {FEWEST_LISTS}, or 0 for no lists."
        )
    if shape.centroids and not 1 <= shape.chosen <= shape.centroids:
        raise UserError(f"A step scores 1…{shape.centroids} lists, not {shape.chosen}.")
    kinds = list(KINDS[-len(shape.layers) :])
    head = getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
    rope = getattr(target, "rope_parameters", None) or {}
    rope_default = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)}
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
        rope_parameters=dict.fromkeys(KINDS, rope_default),
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
    """The assistant during training.

    It has the target's width, and its head is the target's own, frozen. A narrower head loses accuracy: a projection of
    SmolLM2's last hidden state to 320 of its 576 dimensions keeps the argmax at 74 % of positions. The
    frozen head keeps the target's embeddings of tokens that are rare in the texts.
    """

    embed: Tensor  # [V, H], the target's, with its embedding scale applied
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
        """Initializes a drafter that passes its input hidden state through, with projections copied from the target."""
        assistant: Any = self.assistant
        base = target.base_model
        identity = torch.eye(self.head.shape[1])
        # The last hidden state is normed. Division by the weight of the norm undoes its scale, up to a lower bound.
        weight = base.norm.weight.detach().float()
        scale = weight.abs().clamp_min(0.05 * weight.abs().mean()) * weight.sign()
        assistant.pre_projection.weight.copy_(torch.cat([0.3 / self.embed.std() * identity, identity / scale], 1))
        assistant.model.norm.weight.copy_(weight)
        assistant.post_projection.weight.copy_(identity)
        for layer, source in zip(assistant.model.layers, self.shape.layers, strict=True):
            layer.post_attention_layernorm.weight.fill_(0.3)
            layer.post_feedforward_layernorm.weight.fill_(0.3)
            layer.self_attn.q_norm.weight.fill_(2.0 / math.sqrt(layer.self_attn.head_dim))
            like = dict(base.layers[source].named_parameters())
            layer.input_layernorm.weight.copy_(like["input_layernorm.weight"])
            before_mlp = like.get("pre_feedforward_layernorm.weight", like["post_attention_layernorm.weight"])
            layer.pre_feedforward_layernorm.weight.copy_(before_mlp)
            for name, mine in layer.named_parameters():
                if name.endswith("proj.weight") and name in like and like[name].shape == mine.shape:
                    mine.copy_(like[name])

    @torch.no_grad()
    def adopt(self, folder: Path) -> None:
        """Copies the weights of a trained drafter in `folder`, except the attention of layers that attend to another
        layer of the target.

        Raises:
            UserError: `folder` holds no drafter, or one of another shape.
        """
        try:
            trained = load_file(folder / "model.safetensors")
            layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["target_kv_layers"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} holds no drafter to begin with: {error}") from error
        own = dict(self.assistant.named_parameters())
        for i, (kind, layer) in enumerate(self.assistant.config.target_kv_layers.items()):
            if layers.get(kind) != layer:
                trained = {name: value for name, value in trained.items() if f"layers.{i}.self_attn." not in name}
        for name, value in trained.items():
            if name not in own or name == "model.embed_tokens.weight":  # the lists, and the head, which is the target's
                continue
            if own[name].shape != value.shape:
                raise UserError(
                    f"The drafter in {folder} has another shape: {name} is {list(value.shape)} there and "
                    f"{list(own[name].shape)} here."
                )
            own[name].copy_(value)


@torch.no_grad()
def with_lists(learner: Learner, order: Tensor, centroids: Tensor, chosen: int) -> None:
    """Sets the assistant's vocabulary lists.

    Args:
        order: int64 `[V]`, the tokens, list after list.
        centroids: `[lists, H]`.
        chosen: number of lists that a step scores.
    """
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

    With `head` false the file lacks the head, which is the target's, and is about a tenth of the size. `MTPDrafter`
    then uses the target's head; transformers alone needs it in the file.
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
