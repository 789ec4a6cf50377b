"""Other engines beside ours, for the benchmark: the same prompt ids, in the same process, on the same device.

In: a pair and settings. Out: a function from prompt ids to what the engine took for them. A peer that needs a package
says which. Knows nothing of our lanes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from . import embedded
from .catalog import EMBEDDED
from .checkpoints import load_model
from .errors import ModelError, UserError
from .models import Pair
from .settings import Settings

Run = Callable[[list[int]], dict[str, Any]]


def peer(name: str, pair: Pair, settings: Settings) -> Run:
    """The peer called `name`, ready to run: prompt ids go in, {"tokens", "prefill_seconds", "tokens_per_second"} come
    out, the rate without the first token.

    Raises:
        UserError: there is no such peer. ModelError: it cannot be loaded, or does not run this pair.
    """
    if name not in PEERS:
        raise UserError(f"Unknown peer {name!r}; choose among {', '.join(PEERS)}.")
    return PEERS[name](pair, settings)


class _FirstToken(BaseStreamer):
    """Notes when `generate` hands over the first token it made."""

    def __init__(self) -> None:
        self.calls = 0
        self.first = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call is the prompt
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def _transformers(pair: Pair, settings: Settings) -> Run:
    """Plain `model.generate` of transformers: float32 on the CPU, the pair's dtype elsewhere."""
    device = pair.target.device
    model: PreTrainedModel = pair.target.model
    if pair.plan.dtype == "int8":
        path = str(embedded.prepare()) if pair.name == EMBEDDED else pair.name
        model = load_model(path, device, "float32", pair.plan.target)

    def run(ids: list[int]) -> dict[str, Any]:
        prompt, watch = torch.tensor([ids], device=device), _FirstToken()
        sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            torch.manual_seed(settings.seed)
            sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        begun = time.perf_counter()
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=settings.max_new_tokens,
            streamer=watch,
            pad_token_id=0,
            **sampling,
        )
        ended = time.perf_counter()
        tokens = output.shape[1] - len(ids)
        return {
            "tokens": tokens,
            "prefill_seconds": watch.first - begun,
            "tokens_per_second": (tokens - 1) / (ended - watch.first) if tokens > 1 else None,
        }

    run([1, 2, 3])
    return run


def _llama_cpp(pair: Pair, settings: Settings) -> Run:
    """llama.cpp's plain decoding of the GGUF that the embedded target is made from, by llama.cpp's own clock."""
    if pair.name != EMBEDDED:
        raise ModelError("llama.cpp is a peer of the embedded target alone, whose GGUF both engines read.")
    try:
        import xllamacpp
    except ImportError as error:
        raise ModelError("The peer llama.cpp needs xllamacpp, its wheels; run `pip install xllamacpp`.") from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(embedded.gguf())
    parameters.n_ctx = pair.context
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)

    def run(ids: list[int]) -> dict[str, Any]:
        asked = {
            "prompt": ids,
            "n_predict": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": 0,
            "seed": settings.seed,
            "cache_prompt": False,
        }
        answers: list[Any] = []
        server.handle_completions(json.dumps(asked), answers.append)
        answer = answers[-1] if isinstance(answers[-1], dict) else json.loads(answers[-1])
        if "timings" not in answer:
            raise ModelError(f"llama.cpp answered {json.dumps(answer)[:200]}")
        timings, tokens = answer["timings"], answer["usage"]["completion_tokens"]
        seconds = timings["predicted_ms"] / 1e3
        return {
            "tokens": tokens,
            "prefill_seconds": timings["prompt_ms"] / 1e3,
            "tokens_per_second": (tokens - 1) / seconds if tokens > 1 and seconds else None,
        }

    run([1, 2, 3])
    return run


PEERS: dict[str, Callable[[Pair, Settings], Run]] = {"transformers": _transformers, "llama.cpp": _llama_cpp}
