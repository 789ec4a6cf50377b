"""Other engines with one interface, and the search for the fastest settings of each.

In: prompt ids and a number of tokens. Out: the ids that the engine emitted and the seconds it took. `python -m
spec_decode.bench.engines` serves one engine to its parent process; see `peers`. torch and the packages of the engines
are imported only when an engine is created. Independent of our lanes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

Option = dict[str, str]
CLOSE = 0.01  # nats; a dtype whose mean KL divergence from float32 is larger is not considered
_WARM_UP = 8  # tokens
_TRIAL = (8, 48)  # tokens of a trial, at least and at most
_TRIAL_SECONDS = 1.0


@dataclass(frozen=True)
class Run:
    """The output of an engine for a prompt.

    ids: emitted tokens, the stop token included.
    first: seconds from the start to the first token.
    seconds: from the first token to the last.
    """

    ids: list[int]
    first: float
    seconds: float

    @property
    def rate(self) -> float | None:
        """(emitted − 1) / time since the first token, in tokens/s, as for our lanes; None for fewer than two tokens."""
        return (len(self.ids) - 1) / self.seconds if len(self.ids) > 1 and self.seconds > 0 else None


@dataclass(frozen=True)
class Job:
    """The task, the same for every engine.

    path: a checkpoint directory or a GGUF file.
    stop: ids that end a text.
    context: positions of the longest prompt with its output.
    """

    path: str
    stop: tuple[int, ...] = ()
    context: int = 4096
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    revision: str | None = None
    attention: str | None = None
    dtypes: tuple[str, ...] = ("float32",)


class Engine(Protocol):
    """An engine that holds one model.

    options: settings, apart from the number of threads, to try on this prompt.
    use: prepares the engine to run with these settings.
    run: emits up to `tokens` tokens; with `stop` false, exactly that many.
    facts: version, weights and current settings.
    close: frees the model.
    """

    def options(self, ids: list[int]) -> list[Option]: ...

    def use(self, threads: int, option: Option) -> None: ...

    def run(self, ids: list[int], tokens: int, stop: bool = True) -> Run: ...

    def facts(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tuning:
    """The fastest settings of an engine, and all trials with their rates in tokens/s."""

    threads: int
    option: Option
    trials: list[dict[str, Any]] = field(default_factory=list)


def tune(engine: Engine, counts: Sequence[int], ids: list[int]) -> Tuning:
    """Finds the number of threads, out of `counts`, and the option that decode fastest. Leaves `engine` warm with them.

    All combinations are run in two blocks, the second in reverse order, so that a temporary slowdown of the machine
    does not affect only one of them. In a block, each has a warm-up and two runs; its rate is the median of the four
    runs.
    """
    combinations = [(option, threads) for option in engine.options(ids) for threads in counts]
    rates: list[list[float]] = [[] for _ in combinations]
    for order in (range(len(combinations)), reversed(range(len(combinations)))):
        for index in order:
            option, threads = combinations[index]
            engine.use(threads, option)
            warm = engine.run(ids, _WARM_UP, stop=False).rate or 0.0
            tokens = int(min(max(warm * _TRIAL_SECONDS, _TRIAL[0]), _TRIAL[1]))
            rates[index] += [engine.run(ids, tokens, stop=False).rate or 0.0 for _ in range(2)]
    medians = [median(found) for found in rates]
    best = max(range(len(combinations)), key=medians.__getitem__)
    option, threads = combinations[best]
    engine.use(threads, option)
    engine.run(ids, _WARM_UP, stop=False)
    trials = [
        {"threads": threads, **option, "tokens_per_second": rate}
        for (option, threads), rate in zip(combinations, medians, strict=True)
    ]
    return Tuning(threads, option, trials)


class Transformers:
    """`model.generate` of transformers, with the fastest dtype and kind of KV cache, not compiled. PyTorch's number of
    threads is changed during a run only.

    model: a loaded model, which keeps its dtype; if None, `job.path` is loaded in each of `job.dtypes`.
    clock: returns seconds.
    """

    def __init__(self, job: Job, model: Any = None, clock: Callable[[], float] = time.perf_counter) -> None:
        import torch

        self.job = job
        self.clock = clock
        self.given = model
        self.model = model
        self.threads = torch.get_num_threads()
        self.cache = "dynamic"
        self.drift: dict[str, float] = {}

    def options(self, ids: list[int]) -> list[Option]:
        dtypes = self.job.dtypes if self.given is None else (_name(self.given.dtype),)
        if self.given is None:
            dtypes = tuple(dtype for dtype in dtypes if self._close(dtype, ids))
        return [{"dtype": dtype, "cache": cache} for dtype in dtypes for cache in ("dynamic", "static")]

    def use(self, threads: int, option: Option) -> None:
        self._load(option["dtype"])
        self.threads, self.cache = threads, option["cache"]

    def run(self, ids: list[int], tokens: int, stop: bool = True) -> Run:
        import torch

        prompt = torch.tensor([ids], device=self.model.device)
        never = int(self.model.config.get_text_config(decoder=True).vocab_size)  # not the id of any token
        arguments: dict[str, Any] = {"do_sample": self.job.temperature > 0}
        if self.job.temperature > 0:
            torch.manual_seed(self.job.seed)
            arguments |= {name: getattr(self.job, name) for name in ("temperature", "top_p", "top_k")}
        if self.cache != "dynamic":
            arguments |= {"cache_implementation": self.cache, "disable_compile": True}
        marks, before = _Marks(self.clock), torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            begun = self.clock()
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                eos_token_id=list(self.job.stop if stop and self.job.stop else (never,)),
                pad_token_id=0,
                streamer=marks,
                **arguments,
            )
        finally:
            torch.set_num_threads(before)
        made = output[0, len(ids) :].tolist()
        return Run(made, marks.times[0] - begun, marks.times[-1] - marks.times[0])

    def facts(self) -> dict[str, Any]:
        import torch
        import transformers

        kept = getattr(self.model.config, "quantization_config", None)
        method = getattr(kept, "quant_method", None)
        return {
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "weights": _name(self.model.dtype) + (f", {getattr(method, 'value', method)}" if method else ""),
            "settings": {
                "attention": self.model.config._attn_implementation,
                "cache": self.cache,
                **{f"KL divergence of {dtype} from float32": f"{kl:.4f} nats" for dtype, kl in self.drift.items()},
            },
        }

    def close(self) -> None:
        self.model = None

    def _load(self, dtype: str) -> None:
        if self.model is not None and _name(self.model.dtype) == dtype:
            return
        import torch

        from ..loading.checkpoints import How, load_model

        self.model = None  # frees its memory before the next one is loaded
        how = How(attention=self.job.attention, revision=self.job.revision)
        self.model = load_model(self.job.path, torch.device("cpu"), dtype, how)

    def _close(self, dtype: str, ids: list[int]) -> bool:
        """Whether the model in `dtype` predicts nearly the same as in float32: the KL divergence of its next-token
        distributions, averaged over the positions of a prompt, is at most `CLOSE`."""
        import torch

        def predictions() -> torch.Tensor:
            with torch.inference_mode():
                return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

        if dtype == "float32":
            return True
        self._load("float32")
        exact = predictions()
        self._load(dtype)
        self.drift[dtype] = float((exact.exp() * (exact - predictions())).sum(-1).mean())
        return self.drift[dtype] <= CLOSE


class _Marks:
    """A streamer that records when `generate` emits each token."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.prompt = True
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        if not self.prompt:  # the first call is the prompt
            self.times.append(self.clock())
        self.prompt = False

    def end(self) -> None:
        pass


class LlamaCpp:
    """llama.cpp as packaged by `xllamacpp`, on the unchanged GGUF file. Plain decoding, timed by llama.cpp itself.

    llama.cpp also stops at tokens whose names it recognizes as the end of a turn.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.server: Any = None

    def options(self, ids: list[int]) -> list[Option]:
        return [{}]

    def use(self, threads: int, option: Option) -> None:
        import xllamacpp

        self.server = None  # two servers would share the cores
        parameters = xllamacpp.CommonParams()
        parameters.model.path = self.job.path
        parameters.n_ctx = self.job.context
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(parameters)

    def run(self, ids: list[int], tokens: int, stop: bool = True) -> Run:
        job = self.job
        request: dict[str, Any] = {"samplers": ["top_k"], "top_k": 1}  # greedy, without the cost of other samplers
        if job.temperature > 0:
            request = {
                "samplers": ["temperature", "top_k", "top_p"],
                "temperature": job.temperature,
                "top_p": job.top_p,
                "top_k": job.top_k,
                "seed": job.seed,
            }
        request |= {
            "prompt": ids,
            "n_predict": tokens,
            "ignore_eos": not stop,
            "cache_prompt": False,
            "return_tokens": True,
            "verbose": True,  # only the verbose answer has the emitted ids
        }
        answers: list[Any] = []
        self.server.handle_completions(json.dumps(request), answers.append)
        answer = answers[-1] if isinstance(answers[-1], dict) else json.loads(answers[-1])
        if "timings" not in answer:
            raise RuntimeError(f"it answered {json.dumps(answer)[:200]}")
        # The first token ends prompt_ms and begins predicted_ms.
        timings = answer["timings"]
        return Run(answer["__verbose"]["tokens"], timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3)

    def facts(self) -> dict[str, Any]:
        import xllamacpp

        features = xllamacpp.get_system_info().replace(" ", "").split("|")
        built = [part.removesuffix("=1").rpartition(":")[2] for part in features if part.endswith("=1")]
        return {
            "version": f"xllamacpp {xllamacpp.__version__}",
            "weights": "Q4_1, the head Q8_0: as in the file",
            "settings": {"built_with": " ".join(built), "flash_attention": "auto", "kv_cache": "float16"},
        }

    def close(self) -> None:
        self.server = None


class OpenVINO:
    """OpenVINO GenAI, which converts the GGUF file when it loads it, with the fastest attention backend.

    Its reader keeps Q4_1 weights in 4 bits with the same scales and rounds the offset of each block to a 4-bit zero
    point, which changes the values (`check openvino-weights`). Prompt lookup and prefix caching are off.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pipeline: Any = None
        self.backend = ""

    def options(self, ids: list[int]) -> list[Option]:
        return [{"attention": "PA"}, {"attention": "SDPA"}]

    def use(self, threads: int, option: Option) -> None:
        import openvino_genai

        self.pipeline = None
        self.backend = option["attention"]
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ATTENTION_BACKEND": self.backend,
        }
        if self.backend == "PA":
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False  # a repeated prompt is read again
            scheduler.max_num_batched_tokens = self.job.context
            properties["scheduler_config"] = scheduler
        self.pipeline = openvino_genai.LLMPipeline(self.job.path, "CPU", **properties)

    def run(self, ids: list[int], tokens: int, stop: bool = True) -> Run:
        import numpy as np
        import openvino
        import openvino_genai

        job, config = self.job, openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = not stop
        if job.stop and stop:
            config.eos_token_id, config.stop_token_ids = job.stop[0], set(job.stop)
        config.do_sample = job.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p, config.rng_seed = job.temperature, job.top_p, job.seed
            if job.top_k:
                config.top_k = job.top_k
        prompt = np.array([ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
        answer = self.pipeline.generate(inputs, config)
        made, timings = list(answer.tokens[0]), answer.perf_metrics
        # milliseconds: time to first token, and mean time per further token
        each = timings.get_tpot().mean if len(made) > 1 else 0.0
        return Run(made, timings.get_ttft().mean / 1e3, (len(made) - 1) * each / 1e3)

    def facts(self) -> dict[str, Any]:
        import openvino
        import openvino_genai

        core = openvino.Core()

        def default(name: str) -> str:
            value = core.get_property("CPU", name)
            return str(value.to_string() if isinstance(value, openvino.Type) else value)

        return {
            "version": f"openvino-genai {openvino_genai.__version__}",
            "weights": "4 bits, zero points rounded; the head 8 bits",
            "settings": {
                "attention": self.backend,
                "activations": default("INFERENCE_PRECISION_HINT"),
                "kv_cache": default("KV_CACHE_PRECISION"),
                "dynamic_quantization_group": default("DYNAMIC_QUANTIZATION_GROUP_SIZE"),
            },
        }

    def close(self) -> None:
        self.pipeline = None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


ENGINES: dict[str, Callable[[Job], Engine]] = {
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVINO,
}


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Executes `request` on `engine` and returns the result as an object: {"do": "tune", "counts", "ids"} or
    {"do": "run", "ids", "tokens"}."""
    if request["do"] == "tune":
        tuned = tune(engine, request["counts"], request["ids"])
        return {**engine.facts(), "threads": tuned.threads, "option": tuned.option, "trials": tuned.trials}
    run = engine.run(request["ids"], request["tokens"])
    return {"ids": run.ids, "first": run.first, "seconds": run.seconds, "tokens_per_second": run.rate}


def serve() -> None:
    """Reads {"engine", "job"} and then requests from standard input, one a line, and writes an answer for each to
    standard output, {"error"} if it failed. Returns at the end of the input."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the output of engines goes to stderr

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if engine is None:
                engine = ENGINES[request["engine"]](Job(**request["job"]))
                reply({})
            else:
                reply(answer(engine, request))
        except Exception as error:  # the benchmark continues without this engine
            reply({"error": " ".join(str(error).split())[:300] or type(error).__name__})
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    serve()
