"""Other engines with one interface, each in a plain and in speculative modes: what they are given and what they answer.

In: the name of a peer. Out: its `Kind`, which makes an `Engine`. `python -m spec_decode.bench.engines` serves one
engine to its parent process; see `peers`. torch and the packages of the engines are imported only when an engine is
created. Independent of our lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

Option = dict[str, str]


@dataclass(frozen=True)
class Run:
    """The output of an engine for a prompt.

    ids: emitted tokens, the stop token included.
    first: seconds from the start to the first output.
    seconds: from the first output to the last.
    head: tokens of the first output; a speculative mode may emit several at once.
    drafted, accepted: tokens; None where the engine does not tell.
    """

    ids: list[int]
    first: float
    seconds: float
    head: int = 1
    drafted: int | None = None
    accepted: int | None = None

    @property
    def rate(self) -> float | None:
        """(emitted − tokens of the first output) / time since the first output, in tokens/s, as for our lanes; None
        where nothing follows the first output."""
        more = len(self.ids) - self.head
        return more / self.seconds if more > 0 and self.seconds > 0 else None


@dataclass(frozen=True)
class Job:
    """The task, the same for every engine.

    path: a checkpoint directory or a GGUF file.
    mode: "" decodes without a draft; else one of `Kind.mode`.
    stop: ids that end a text.
    context: positions of the longest prompt with its output.
    draft: of the modes "draft" and "mtp": the checkpoint of the drafter, a GGUF file or a directory.
    python: of vLLM: the interpreter of the environment that it is installed in.
    """

    path: str
    mode: str = ""
    stop: tuple[int, ...] = ()
    context: int = 4096
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    revision: str | None = None
    attention: str | None = None
    dtypes: tuple[str, ...] = ("float32",)
    draft: str = ""
    python: str = ""


class Engine(Protocol):
    """An engine that holds one model.

    job: what it was made for. Another temperature may take the place of the job's between two runs.
    starts_slowly: `use` takes so long that each combination is prepared once only.
    options: settings, apart from the number of threads and the draft, to try on this prompt.
    drafts: settings of the draft to try; one empty option for plain decoding.
    use: prepares the engine to run with these settings.
    run: emits up to `tokens` tokens, drawn with `seed` (None: the job's); with `stop` false, exactly that many.
    predict: log-probabilities at temperature 1 of the next token after each of the last `last` prefixes of `ids`, the
        whole of it included, float32 `[last, vocabulary]`; None where the engine gives none.
    facts: version, weights and current settings.
    close: frees the model.
    """

    job: Job
    starts_slowly: bool

    def options(self, ids: list[int]) -> list[Option]: ...

    def drafts(self) -> list[Option]: ...

    def use(self, threads: int, option: Option) -> None: ...

    def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run: ...

    def predict(self, ids: list[int], last: int) -> np.ndarray | None: ...

    def facts(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Kind(NamedTuple):
    """A peer: an engine in one of its modes.

    mode: "" decodes without a draft; "lookup" drafts what followed the same n-gram before, "draft" with a smaller
        model, "mtp" with a Gemma 4 assistant.
    module, engine: where its class is, in this package.
    needs: the module that it imports; empty where it is not imported by our interpreter.
    package: what installs that module.
    """

    mode: str
    module: str
    engine: str
    needs: str
    package: str

    def make(self, job: Job) -> Engine:
        """Creates the engine."""
        made: Engine = getattr(import_module(f".{self.module}", __name__), self.engine)(job)
        return made


_TRANSFORMERS = ("huggingface", "Transformers", "transformers", "transformers")
_LLAMA_CPP = ("llama_cpp", "LlamaCpp", "xllamacpp", "xllamacpp")
_OPENVINO = ("openvino_genai", "OpenVINO", "openvino_genai", "openvino-genai")
_VLLM = ("vllm_server", "VLLM", "", "vllm")
KINDS: dict[str, Kind] = {
    "transformers": Kind("", *_TRANSFORMERS),
    "transformers-lookup": Kind("lookup", *_TRANSFORMERS),
    "transformers-mtp": Kind("mtp", *_TRANSFORMERS),
    "llama.cpp": Kind("", *_LLAMA_CPP),
    "llama.cpp-lookup": Kind("lookup", *_LLAMA_CPP),
    "llama.cpp-draft": Kind("draft", *_LLAMA_CPP),
    "openvino": Kind("", *_OPENVINO),
    "openvino-lookup": Kind("lookup", *_OPENVINO),
    "vllm": Kind("", *_VLLM),
    "vllm-ngram": Kind("lookup", *_VLLM),
}


def lookups(tokens: tuple[int, ...] = (3, 5, 10), ngrams: tuple[int, ...] = (2, 3)) -> list[Option]:
    """Settings of prompt lookup to try: numbers of drafted tokens with lengths of the n-gram that is looked for."""
    return [{"tokens": str(count), "ngram": str(size)} for count in tokens for size in ngrams]
