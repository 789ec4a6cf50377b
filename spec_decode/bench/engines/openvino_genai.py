"""OpenVINO GenAI: plain, or with prompt lookup.

In: a job whose path is a GGUF file. Out: an `Engine`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import Job, Option, Run, lookups

if TYPE_CHECKING:
    import numpy as np


class OpenVINO:
    """OpenVINO GenAI, which converts the GGUF file when it loads it, with the fastest attention backend.

    Its reader keeps Q4_1 weights in 4 bits with the same scales and rounds the offset of each block to a 4-bit zero
    point, which changes the values (`check openvino-weights`). Prefix caching is off. Prompt lookup needs the backend
    of paged attention.
    """

    starts_slowly = False

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pipeline: Any = None
        self.option: Option = {}
        self.threads = 1
        self._loaded: tuple[int, str] | None = None
        self._compiled: Any = None

    def options(self, ids: list[int]) -> list[Option]:
        return [{"attention": "PA"}] if self.job.mode else [{"attention": "PA"}, {"attention": "SDPA"}]

    def drafts(self) -> list[Option]:
        return lookups() if self.job.mode == "lookup" else [{}]

    def use(self, threads: int, option: Option) -> None:
        self.option, self.threads = option, threads
        if self._loaded == (threads, option["attention"]):  # settings of the draft belong to each request
            return
        self.pipeline = None
        self._loaded = threads, option["attention"]
        self.pipeline = self._pipeline(self.job.path)

    def _pipeline(self, path: str, **more: Any) -> Any:
        import openvino_genai

        properties: dict[str, Any] = {**self._properties(), "ATTENTION_BACKEND": self.option["attention"], **more}
        if self.job.mode == "lookup":
            properties["prompt_lookup"] = True
        if self.option["attention"] == "PA":
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.enable_prefix_caching = False  # a repeated prompt is read again
            scheduler.max_num_batched_tokens = self.job.context
            properties["scheduler_config"] = scheduler
        return openvino_genai.LLMPipeline(path, "CPU", **properties)

    def _properties(self) -> dict[str, Any]:
        return {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}

    def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run:
        import numpy as np
        import openvino
        import openvino_genai

        job, config = self.job, openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = not stop
        if job.stop and stop:
            config.eos_token_id, config.stop_token_ids = job.stop[0], set(job.stop)
        if job.mode == "lookup":
            config.num_assistant_tokens, config.max_ngram_size = int(self.option["tokens"]), int(self.option["ngram"])
        config.do_sample = job.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = job.temperature, job.top_p
            config.rng_seed = job.seed if seed is None else seed
            if job.top_k:
                config.top_k = job.top_k
        prompt = np.array([ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
        answer = self.pipeline.generate(inputs, config)
        made, timings = list(answer.tokens[0]), answer.perf_metrics
        # milliseconds: time to first token, and mean time per further token
        each = timings.get_tpot().mean if len(made) > 1 else 0.0
        return Run(made, timings.get_ttft().mean / 1e3, (len(made) - 1) * each / 1e3)

    def predict(self, ids: list[int], last: int) -> np.ndarray:
        """OpenVINO GenAI gives no distributions. The model that its reader makes of the file is saved, and run by
        OpenVINO with the same properties, the whole text in one pass."""
        import numpy as np

        if self._compiled is None:
            self._compiled = self._converted()
        request = self._compiled.create_infer_request()
        count = len(ids)
        inputs = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, count), dtype=np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        wanted = {name for port in self._compiled.inputs for name in port.names}
        logits = request.infer({name: value for name, value in inputs.items() if name in wanted})
        rows = np.array(logits[self._compiled.output(0)], dtype=np.float64)[0, -last:]
        rows -= rows.max(-1, keepdims=True)
        found: np.ndarray = (rows - np.log(np.exp(rows).sum(-1, keepdims=True))).astype(np.float32)
        return found

    def _converted(self) -> Any:
        import openvino
        import openvino_genai

        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / Path(self.job.path).name  # the reader saves beside the file
            os.symlink(Path(self.job.path).resolve(), copy)
            openvino_genai.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
            return openvino.Core().compile_model(str(Path(folder) / "openvino_model.xml"), "CPU", self._properties())

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
                **self.option,
                "activations": default("INFERENCE_PRECISION_HINT"),
                "kv_cache": default("KV_CACHE_PRECISION"),
                "dynamic_quantization_group": default("DYNAMIC_QUANTIZATION_GROUP_SIZE"),
            },
        }

    def close(self) -> None:
        self.pipeline = self._compiled = None
