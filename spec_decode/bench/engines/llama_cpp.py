"""llama.cpp, as packaged by `xllamacpp`: plain, with n-gram lookup, or with a draft model.

In: a job whose path is a GGUF file. Out: an `Engine`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from . import Job, Option, Run, lookups

if TYPE_CHECKING:
    import numpy as np


class LlamaCpp:
    """The server of llama.cpp, called without HTTP, on the unchanged GGUF file; timed by llama.cpp itself.

    llama.cpp also stops at tokens whose names it recognizes as the end of a turn.
    """

    starts_slowly = False

    def __init__(self, job: Job) -> None:
        self.job = job
        self.server: Any = None
        self.option: Option = {}

    def options(self, ids: list[int]) -> list[Option]:
        return [{}]

    def drafts(self) -> list[Option]:
        if self.job.mode == "lookup":
            return [{"kind": "ngram-simple", **option} for option in lookups()] + [{"kind": "ngram-cache"}]
        if self.job.mode == "draft":
            return [{"kind": "draft-simple", "tokens": str(count)} for count in (4, 2, 3, 8)]
        return [{}]

    def use(self, threads: int, option: Option) -> None:
        import xllamacpp

        self.server = None  # two servers would share the cores
        self.option = option
        parameters = xllamacpp.CommonParams()
        parameters.model.path = self.job.path
        parameters.n_ctx = self.job.context
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        if option:
            types = xllamacpp.common_speculative_type
            name = f"COMMON_SPECULATIVE_TYPE_{option['kind'].upper().replace('-', '_')}"
            # "draft-simple" is named DRAFT_SIMPLE, "ngram-cache" NGRAM_CACHE
            parameters.speculative.types = [getattr(types, name)]
            self._draft(parameters.speculative, threads, option)
        self.server = xllamacpp.Server(parameters)

    def _draft(self, speculative: Any, threads: int, option: Option) -> None:
        if option["kind"] == "ngram-simple":
            speculative.ngram_simple.size_n = int(option["ngram"])
            speculative.ngram_simple.size_m = int(option["tokens"])
        elif option["kind"] == "draft-simple":
            speculative.draft.mparams.path = self.job.draft
            speculative.draft.n_max = int(option["tokens"])
            speculative.draft.n_gpu_layers = 0
            speculative.draft.cpuparams.n_threads = speculative.draft.cpuparams_batch.n_threads = threads

    def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run:
        job = self.job
        request: dict[str, Any] = {"samplers": ["top_k"], "top_k": 1}  # greedy, without the cost of other samplers
        if job.temperature > 0:
            request = {
                "samplers": ["temperature", "top_k", "top_p"],
                "temperature": job.temperature,
                "top_p": job.top_p,
                "top_k": job.top_k,
                "seed": job.seed if seed is None else seed,
            }
        answer = self._ask({
            **request,
            "prompt": ids,
            "n_predict": tokens,
            "ignore_eos": not stop,
            "cache_prompt": False,
            "return_tokens": True,
            "verbose": True,  # only the verbose answer has the emitted ids
        })  # fmt: skip
        # The first token ends prompt_ms and begins predicted_ms.
        timings = answer["timings"]
        return Run(
            answer["__verbose"]["tokens"],
            timings["prompt_ms"] / 1e3,
            timings["predicted_ms"] / 1e3,
            drafted=timings.get("draft_n", 0) if job.mode else None,
            accepted=timings.get("draft_n_accepted", 0) if job.mode else None,
        )

    def predict(self, ids: list[int], last: int) -> np.ndarray:
        import numpy as np

        rows = []
        for end in range(len(ids) - last + 1, len(ids) + 1):
            answer = self._ask({
                "prompt": ids[:end],
                "n_predict": 1,
                "n_probs": 1 << 20,  # all tokens
                "samplers": ["top_k"],
                "top_k": 1,
                "cache_prompt": True,
                "ignore_eos": False,
                "verbose": True,
            })  # fmt: skip
            told = answer["__verbose"]["completion_probabilities"][0]["top_logprobs"]
            row = np.full(len(told), -np.inf)
            row[[token["id"] for token in told]] = [token["logprob"] for token in told]
            rows.append(np.maximum(row, _LEAST))
        return np.stack(rows).astype(np.float32)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        answers: list[Any] = []
        self.server.handle_completions(json.dumps(request), answers.append)
        answer: dict[str, Any] = answers[-1] if isinstance(answers[-1], dict) else json.loads(answers[-1])
        if "timings" not in answer:
            raise RuntimeError(f"it answered {json.dumps(answer)[:200]}")
        return answer

    def facts(self) -> dict[str, Any]:
        import xllamacpp

        features = xllamacpp.get_system_info().replace(" ", "").split("|")
        built = [part.removesuffix("=1").rpartition(":")[2] for part in features if part.endswith("=1")]
        return {
            "version": f"xllamacpp {xllamacpp.__version__}",
            "weights": "Q4_1, the head Q8_0: as in the file",
            "settings": {
                "built_with": " ".join(built), "flash_attention": "auto", "kv_cache": "float16", **self.option
            },
        }  # fmt: skip

    def close(self) -> None:
        self.server = None


_LEAST = -100.0  # log-probability of a token that is answered as impossible, which float32 rounded to 0
