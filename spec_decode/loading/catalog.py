"""The pairs known by name, and the options of loading one.

In: the values of `--pair`, `--target`, `--drafter`, `--quantize` and `--attention`. Out: names of checkpoints and
drafters, precisions, or an error that names the nearest real name. It holds the shapes of the models, so that memory
can be estimated before anything is downloaded. Imports neither torch nor transformers.

The targets' shapes are those of MaxText's configurations, published by Google; the drafters' are those of their own
configurations (docs/gemma4.md has the addresses).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypedDict

from ..drafters import kinds
from ..errors import SettingsError, UserError

EMBEDDED = "embedded"
EMBEDDED_DRAFTER = "mtp+lookup"
ANY_DRAFTER = "lookup"  # of a target that is not listed here
PRECISIONS = ("int8", "nf4")
# Implementations of attention, and what transformers calls them.
ATTENTION = {"sdpa": "sdpa", "grouped": "grouped_sdpa", "eager": "eager"}
DRAFT_LENGTH = 6  # `num_assistant_tokens` in the generation config of each of Google's drafters


class Options(TypedDict, total=False):
    """The options of `pair.load_pair` that are not set by default.

    Keys:
        quantize: linear layers through bitsandbytes, as `quantization` reads it.
        drafter_device: another device for the drafter.
        device_map: "auto" spreads the target over all GPUs.
        attention: a name of `ATTENTION`; None leaves it to transformers, and on CUDA to a measurement.
        compile: compile the target's layers with `torch.compile`.
        target_revision, drafter_revision: a branch, tag or commit.
        batch_invariant: every pass of a text has the same shape, see `Target.padded`.
    """

    quantize: str | None
    drafter_device: str | None
    device_map: str | None
    attention: str | None
    compile: bool
    target_revision: str | None
    drafter_revision: str | None
    batch_invariant: bool


@dataclass(frozen=True)
class Entry:
    """A Gemma 4 target and the drafter made for it.

    Attributes:
        size: in billions of parameters, as in the name; E2B and E4B count the parameters a token is computed with,
            without the per-layer embeddings.
        kind: `model_type` of the target's text model.
        shape: of the text model, as its configuration class takes it.
        note: one phrase for the list of models.
    """

    name: str
    size: int
    kind: str
    shape: dict[str, Any]
    note: str

    @property
    def target(self) -> str:
        return f"google/{self.name}-it"

    @property
    def drafter(self) -> str:
        return f"{self.target}-assistant"

    @property
    def drafter_kind(self) -> str:
        """`model_type` of the drafter."""
        return self.kind.replace("text", "assistant")

    @property
    def drafter_shape(self) -> dict[str, Any]:
        """The drafter's, as its configuration class takes it: four layers with the target's K/V heads; smaller and
        with vocabulary centroids where the target shares keys and values between layers."""
        small = "num_kv_shared_layers" in self.shape
        same = ("num_key_value_heads", "num_global_key_value_heads", "attention_k_eq_v", "sliding_window")
        text = {name: self.shape[name] for name in (*same, "max_position_embeddings") if name in self.shape}
        text |= {
            "model_type": self.kind,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
            "hidden_size": 256 if small else 1024,
            "intermediate_size": 2048 if small else 8192,
            "num_attention_heads": 4 if small else self.shape["num_attention_heads"],
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        }
        if self.kind == "gemma4_text":
            text |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        return {
            "text_config": text,
            "backbone_hidden_size": self.shape["hidden_size"],
            "use_ordered_embeddings": small,
        }


def _shape(
    layers: int, width: int, heads: tuple[int, int], mlp: int, window: int, every: int, context: int, **rest: Any
) -> dict[str, Any]:
    """The shape of a text model with `heads` = (query heads, K/V heads); every `every`-th layer has full attention."""
    layer_types = ["sliding_attention"] * (every - 1) + ["full_attention"]
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": mlp,
        "sliding_window": window,
        "layer_types": layer_types * (layers // every),
        "max_position_embeddings": context,
        "final_logit_softcapping": 30.0,
        **rest,
    }


_EDGE = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
_LARGE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
GEMMA4 = (
    Entry(
        "gemma-4-E2B",
        2,
        "gemma4_text",
        _shape(35, 1536, (8, 1), 6144, 512, 5, 131072, num_kv_shared_layers=20, use_double_wide_mlp=True, **_EDGE),
        "half of it is per-layer embeddings, which are looked up and not multiplied",
    ),
    Entry(
        "gemma-4-E4B",
        4,
        "gemma4_text",
        _shape(42, 2560, (8, 2), 10240, 512, 6, 131072, num_kv_shared_layers=18, **_EDGE),
        "a third of it is per-layer embeddings, which are looked up and not multiplied",
    ),
    Entry(
        "gemma-4-12B",
        12,
        "gemma4_unified_text",
        _shape(48, 3840, (16, 8), 15360, 1024, 6, 262144, num_global_key_value_heads=1, attention_k_eq_v=True),
        "dense, no vision or audio encoder",
    ),
    Entry(
        "gemma-4-26B-A4B",
        26,
        "gemma4_text",
        _shape(
            30,
            2816,
            (16, 8),
            2112,
            1024,
            6,
            262144,
            num_global_key_value_heads=2,
            enable_moe_block=True,
            num_experts=128,
            top_k_experts=8,
            moe_intermediate_size=704,
            **_LARGE,
        ),
        "mixture of experts, 8 of 128 active; bitsandbytes does not quantize the experts",
    ),
    Entry(
        "gemma-4-31B",
        31,
        "gemma4_text",
        _shape(60, 5376, (32, 16), 21504, 1024, 6, 262144, num_global_key_value_heads=4, **_LARGE),
        "dense",
    ),
)
_REAL = re.compile(r"google/gemma-4-(E2B|E4B|12B|26B-A4B|31B)(-it(-assistant)?)?", re.IGNORECASE)


def find(name: str) -> Entry | None:
    """The entry with this name, target or drafter; case does not matter."""
    wanted = name.lower().removeprefix("google/").removesuffix("-assistant").removesuffix("-it")
    return next((entry for entry in GEMMA4 if entry.name.lower() == wanted), None)


def pair(name: str) -> tuple[str, str | None]:
    """Target and drafter of `--pair NAME`; the drafter is None for the target's own.

    Raises:
        UserError: there is no such pair; the message names the nearest.
    """
    if name.lower() == EMBEDDED:
        return EMBEDDED, None
    entry = find(name)
    if entry is None:
        known = ", ".join([EMBEDDED, *(known.name for known in GEMMA4)])
        near = _nearest(name)
        did = f"did you mean {near.name}? " if near else ""
        raise UserError(f"There is no pair {name!r}; {did}Known pairs: {known}.")
    return entry.target, entry.drafter


def own_drafter(target: str) -> str:
    """The name of the drafter that `target` gets where none is named."""
    entry = find(target)
    return EMBEDDED_DRAFTER if target == EMBEDDED else entry.drafter if entry else ANY_DRAFTER


def drafters(target: str) -> tuple[str, ...]:
    """The names of the drafters on offer for `target`, besides `own_drafter`: the kind made for it, alone and in
    combinations, and the kinds without weights."""
    entry = find(target)
    own, _ = kinds.split(own_drafter(target))
    made = kinds.of_checkpoint(entry.drafter_kind) if entry else kinds.named(own)
    names = [kind.name for kind in kinds.KINDS if kind.by_name and not kind.model_types]
    if made is None or not made.model_types:
        return tuple(names)
    joined = [kinds.join(made.name, kind) for kind in kinds.KINDS if kind.combines]
    return (*joined, *([] if entry else [made.name]), *names)


def suggestion(name: str) -> str | None:
    """The nearest real name to one that looks like a Gemma 4 name and is none; None where there is nothing to
    correct."""
    near = _nearest(name)
    if near is None or _REAL.fullmatch(name):
        return None
    helper = re.search("assistant|draft|mtp", name, re.IGNORECASE)
    return near.drafter if helper else near.target


def _nearest(name: str) -> Entry | None:
    if not re.search(r"gemma[-_ ]?4", name, re.IGNORECASE):
        return None
    rest = re.sub(r".*gemma[-_ ]?4", "", name, flags=re.IGNORECASE)
    sizes = re.findall(r"(\d+(?:\.\d+)?)\s*b", rest, re.IGNORECASE)
    size = float(sizes[0]) if sizes else 4.0
    return min(GEMMA4, key=lambda entry: abs(entry.size - size))


def quantization(text: str | None) -> dict[str, str]:
    """Precisions by model: "target=nf4,drafter=int8" → {"target": "nf4", "drafter": "int8"}; a precision alone is the
    target's.

    Raises:
        SettingsError: anything else.
    """
    chosen: dict[str, str] = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        role, given, precision = part.partition("=")
        role, precision = (role, precision) if given else ("target", role)
        if role not in ("target", "drafter") or precision not in PRECISIONS or role in chosen:
            raise SettingsError(
                "quantize",
                f"Cannot quantize {part!r}; write nf4 or int8, for one of them target=nf4 or drafter=int8, for both "
                "target=nf4,drafter=int8.",
            )
        chosen[role] = precision
    return chosen


def attention(name: str | None) -> str | None:
    """The attention implementation under its transformers name; None leaves the choice to transformers.

    Raises:
        SettingsError: it does not exist or takes no mask.
    """
    if name in (None, "", "auto"):
        return None
    if name in ATTENTION:
        return ATTENTION[str(name)]
    if re.search("flash|paged|kernels", str(name)):
        raise SettingsError(
            "attention",
            f"Attention {name!r} cannot be used: the cache's buffers are longer than the text, which takes a mask, and "
            "flash kernels read none; choose sdpa, grouped or eager.",
        )
    raise SettingsError("attention", f"Unknown attention {name!r}; choose auto, sdpa, grouped or eager.")
