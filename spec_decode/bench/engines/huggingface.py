"""transformers: `model.generate`, plain, with prompt lookup, or with a Gemma 4 assistant.

In: a job, or loaded models. Out: an `Engine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import Job, Option, Run, lookups

if TYPE_CHECKING:
    import numpy as np

CLOSE = 0.01  # nats; a dtype whose mean KL divergence from float32 is larger is not considered


class Transformers:
    """`model.generate` of transformers, with the fastest dtype and kind of KV cache, not compiled. PyTorch's number of
    threads is changed during a run only. Assisted generation takes a dynamic cache only.

    model: a loaded model, which keeps its dtype; if None, `job.path` is loaded in each of `job.dtypes`.
    assistant: a loaded Gemma 4 assistant for it; if None, `job.draft` is loaded in the mode "mtp".
    clock: returns seconds.
    """

    starts_slowly = False

    def __init__(
        self, job: Job, model: Any = None, assistant: Any = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        import torch

        self.job = job
        self.clock = clock
        self.given = model
        self.model = model
        self.given_assistant = assistant
        self.assistant = assistant
        self.threads = torch.get_num_threads()
        self.option: Option = {}
        self.drift: dict[str, float] = {}

    def options(self, ids: list[int]) -> list[Option]:
        dtypes = self.job.dtypes if self.given is None else (_name(self.given.dtype),)
        if self.given is None:
            dtypes = tuple(dtype for dtype in dtypes if self._close(dtype, ids))
        caches = ("dynamic",) if self.job.mode else ("dynamic", "static")
        return [{"dtype": dtype, "cache": cache} for dtype in dtypes for cache in caches]

    def drafts(self) -> list[Option]:
        if self.job.mode == "lookup":
            return lookups()
        if self.job.mode == "mtp":
            return [{"tokens": str(count)} for count in (4, 2, 3, 6)]
        return [{}]

    def use(self, threads: int, option: Option) -> None:
        self._load(option["dtype"])
        self.threads, self.option = threads, option

    def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run:
        import torch

        prompt = torch.tensor([ids], device=self.model.device)
        never = int(self.model.config.get_text_config(decoder=True).vocab_size)  # not the id of any token
        arguments: dict[str, Any] = {"do_sample": self.job.temperature > 0}
        if self.job.temperature > 0:
            torch.manual_seed(self.job.seed if seed is None else seed)
            arguments |= {name: getattr(self.job, name) for name in ("temperature", "top_p", "top_k")}
        if self.option.get("cache", "dynamic") != "dynamic":
            arguments |= {"cache_implementation": self.option["cache"], "disable_compile": True}
        arguments |= self._drafting()
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
        head = min(marks.tokens[0], len(made))
        return Run(made, marks.times[0] - begun, marks.times[-1] - marks.times[0], head)

    def predict(self, ids: list[int], last: int) -> np.ndarray:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                logits = self.model(torch.tensor([ids], device=self.model.device)).logits[0, -last:]
        finally:
            torch.set_num_threads(before)
        found: np.ndarray = logits.float().log_softmax(-1).cpu().numpy()
        return found

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
                **{name: value for name, value in self.option.items() if name != "dtype"},
                **{f"KL divergence of {dtype} from float32": f"{kl:.4f} nats" for dtype, kl in self.drift.items()},
            },
        }

    def close(self) -> None:
        self.model = self.assistant = None

    def _drafting(self) -> dict[str, Any]:
        if self.job.mode == "lookup":
            return {
                "prompt_lookup_num_tokens": int(self.option["tokens"]),
                "max_matching_ngram_size": int(self.option["ngram"]),
            }
        if self.job.mode == "mtp":
            self.assistant.generation_config.num_assistant_tokens = int(self.option["tokens"])
            self.assistant.generation_config.num_assistant_tokens_schedule = "constant"
            return {"assistant_model": self.assistant}
        return {}

    def _load(self, dtype: str) -> None:
        if self.model is not None and _name(self.model.dtype) == dtype:
            return
        import torch

        from ...loading.checkpoints import How, load_assistant, load_model

        self.model = self.assistant = None  # frees its memory before the next one is loaded
        how, device = How(attention=self.job.attention, revision=self.job.revision), torch.device("cpu")
        self.model = load_model(self.job.path, device, dtype, how)
        if self.job.mode == "mtp":
            self.assistant = load_assistant(self.job.draft, device, dtype, How(attention=self.job.attention))

    def _close(self, dtype: str, ids: list[int]) -> bool:
        """Whether the model in `dtype` predicts nearly the same as in float32: the KL divergence of its next-token
        distributions, averaged over the positions of a prompt, is at most `CLOSE`."""
        import numpy as np

        if dtype == "float32":
            return True
        self._load("float32")
        exact = self.predict(ids, len(ids))
        self._load(dtype)
        self.drift[dtype] = float((np.exp(exact) * (exact - self.predict(ids, len(ids)))).sum(-1).mean())
        return self.drift[dtype] <= CLOSE


class _Marks:
    """A streamer that records when `generate` emits tokens, and how many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.prompt = True
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        if not self.prompt:  # the first call is the prompt
            self.times.append(self.clock())
            self.tokens.append(int(value.numel()))
        self.prompt = False

    def end(self) -> None:
        pass


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
