"""`train-drafter`: from a target's name to a drafter on disk, in stages that can be interrupted and resumed.

In: names, numbers and two folders. Out: `out` with the drafter and its report; `work` with texts, checkpoints and the
curve. Each stage continues from what exists in the folders.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache import ARGUMENT
from ..errors import UserError
from ..loading import embedded, memory
from ..loading.catalog import EMBEDDED
from ..loading.checkpoints import load_model, load_tokenizer, read_target_config
from ..loading.placement import find_device
from .assistant import Learner, Shape, build, save
from .data import Texts, Writing, shards, write
from .lists import sort_vocabulary
from .prompts import HeldOut, Opening, Turns, given, invented, read
from .train import Training, aside, judge, train

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """The parameters of `train-drafter`.

    tokens: number of tokens to generate.
    data: JSON Lines of {"prompt"} to answer; with None the target generates the prompts too.
    held_out: JSON Lines of {"prompt"} that no text may contain.
    layers, intermediate, centroids, chosen: as in `Shape`; None for defaults.
    head: whether the checkpoint holds the head, which is the target's; transformers alone needs it there.
    init: a trained drafter of the same shape to start from.
    also: work folders of other runs, whose texts are used for training too.
    only: "data", "train", or None for both stages.
    """

    target: str
    out: Path
    work: Path
    tokens: int = 1_500_000
    data: Path | None = None
    held_out: tuple[Path, ...] = ()
    layers: tuple[int, ...] | None = None
    intermediate: int | None = None
    centroids: int = 1024
    chosen: int = 64
    head: bool = True
    init: Path | None = None
    also: tuple[Path, ...] = ()
    only: str | None = None
    device: str = "cpu"


def run(recipe: Recipe, training: Training, writing: Writing, say: Say) -> dict[str, Any]:
    """Generates the missing texts, trains, and saves the drafter to `recipe.out`; returns the report saved there.

    Raises:
        ModelError: the target cannot be loaded.
        UserError: a file or the shape does not fit; raised before anything is written.
    """
    device = find_device(recipe.device)
    path = str(embedded.prepare(say)) if recipe.target == EMBEDDED else recipe.target
    whole = read_target_config(path)
    config = whole.get_text_config(decoder=True)
    tokenizer = load_tokenizer(path)
    texts = recipe.work / "texts"
    own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    layers = recipe.layers or (round(0.68 * own), own - 1)
    intermediate = getattr(config, "intermediate_size", None) if recipe.intermediate is None else recipe.intermediate
    if not isinstance(intermediate, int):
        raise UserError(f"A {config.model_type} has no single MLP width; give the drafter's with --intermediate.")
    shape = Shape(intermediate, tuple(layers), 0, recipe.chosen)
    held_out = HeldOut(entry["prompt"] for file in recipe.held_out for entry in read(file))
    folders = [texts, *(work / "texts" for work in recipe.also)]
    check(recipe, writing, whole, tokenizer, shape)
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    model = load_model(path, device, dtype)
    if recipe.only != "train":
        source = recipe.data

        def openings(rng: random.Random) -> Iterator[Opening]:
            return given(tokenizer, source, rng) if source else invented(tokenizer, rng)

        write(model, tokenizer, openings, list(layers), texts, recipe.tokens, writing, held_out, training.seed, say)
    if recipe.only == "data":
        return {}
    model = load_model(path, device, "float32")  # the generation may have quantized it
    torch.manual_seed(training.seed)
    learner = Learner(model, shape)
    del model
    if recipe.init:
        learner.adopt(recipe.init)
    learner.to(device)
    train(learner, folders, recipe.work, training, say)
    return finish(learner.to("cpu"), folders, recipe, training, say)


def check(recipe: Recipe, writing: Writing, config: Any, tokenizer: Any, shape: Shape) -> None:
    """Checks the inputs of all stages before the first one begins; builds the drafter on the meta device.

    Raises:
        UserError: an input does not fit.
    """
    if recipe.tokens < 1:
        raise UserError(f"The target must generate at least one token, not {recipe.tokens}.")
    if recipe.data:
        read(recipe.data)
    text = config.get_text_config(decoder=True)
    writing.check_room(Turns.of(tokenizer), getattr(text, "max_position_embeddings", None) or writing.length)
    lacking = [work for work in recipe.also if not shards(work / "texts")]
    if recipe.only == "train" and not shards(recipe.work / "texts") and not recipe.also:
        lacking = [recipe.work]
    if lacking:
        raise UserError(f"{lacking[0]} holds no texts to train on.")
    if getattr(text, "kv_lora_rank", None):
        raise UserError(f"A drafter cannot be made for a {text.model_type}, whose keys and values are of unequal size.")
    target = memory.empty(config)
    try:
        with torch.device("meta"):
            build(text, replace(shape, centroids=recipe.centroids))
            learner = Learner(target, shape)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        why = str(error).split(". ")[0].rstrip(".")
        raise UserError(f"A drafter cannot be made for a target of the kind {text.model_type}: {why}.") from error
    _check_heads(target, learner)
    if recipe.init:
        learner.adopt(recipe.init)


def _check_heads(target: PreTrainedModel, learner: Learner) -> None:
    """Raises UserError if the target's keys and values do not have the shape of the drafter's attention."""
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):  # not every model runs on the meta device
        seen = target(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)[ARGUMENT]
        config = learner.assistant.config.get_text_config()
        needed = (1, config.num_key_value_heads, 2, config.head_dim)
        for layer in learner.shape.layers:
            keys, values = seen.layers[layer].keys, seen.layers[layer].values
            if (keys.shape, values.shape) != (needed, needed):
                raise UserError(
                    f"A drafter cannot be made for this target: layer {layer} has keys {list(keys.shape)} and values "
                    f"{list(values.shape)}, but the drafter's attention needs {list(needed)} for both."
                )


def finish(learner: Learner, folders: list[Path], recipe: Recipe, training: Training, say: Say) -> dict[str, Any]:
    """Fits the vocabulary lists, evaluates on validation texts, saves the drafter and its report, draws the curve."""
    texts = Texts(folders)
    if recipe.centroids:
        say("Fitting the vocabulary lists …")
        share = sort_vocabulary(learner, texts, recipe.centroids, recipe.chosen, training)
        say(f"The lists that a step scores contain the target's argmax at {share:.1%} of positions")
    _, validation_texts = aside(texts, training.validation)
    report = {
        "target": recipe.target,
        "tokens_written": sum(texts.length(i) for i in range(len(texts))),
        "validation": judge(learner, texts, validation_texts, training.unroll),
    }
    save(learner, recipe.out, recipe.head)
    (recipe.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw_curve(recipe.work)
    return report


def draw_curve(work: Path) -> None:
    """Draws curve.html from curve.csv: tokens per target pass and the share of correct drafts over training tokens."""
    import plotly.graph_objects as go  # type: ignore[import-untyped]

    with (work / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = [float(row["tokens"]) for row in rows]
    figure = go.Figure()
    for name in [key for key in (rows[0] if rows else {}) if key.startswith("right_") and rows[-1][key]]:
        share = [float(row[name]) for row in rows]
        label = f"draft {name.removeprefix('right_')} correct"
        figure.add_scatter(x=tokens, y=share, name=label, yaxis="y2", line={"dash": "dot"})
    figure.add_scatter(x=tokens, y=[float(row["tokens_per_pass"]) for row in rows], name="tokens per target pass")
    figure.update_layout(
        xaxis_title="training tokens",
        yaxis_title="tokens per target pass",
        yaxis2={"overlaying": "y", "side": "right", "range": [0, 1], "title": "share of correct drafts"},
    )
    figure.write_html(work / "curve.html", include_plotlyjs="cdn")
