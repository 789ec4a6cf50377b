"""vLLM behind its HTTP server, in an environment of its own: plain, or with n-gram speculation.

In: a job whose path is a checkpoint directory and whose `python` is an interpreter that imports vLLM. Out: an `Engine`.
The server listens on the loopback address only and is killed when the engine is closed. Imports no vLLM.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from . import Job, Option, Run

if TYPE_CHECKING:
    import numpy as np

START_SECONDS = 600.0  # for the server to answer; the first start of a model compiles
ANSWER_SECONDS = 600.0
_MODEL = "model"
_HOST = "127.0.0.1"
_LEAST = -100.0  # log-probability of a token whose probability float32 rounded to 0


class VLLM:
    """The server is started for every choice of settings, so each is prepared once. Numbers of threads are given as
    `OMP_NUM_THREADS`, and threads are not bound to cores, as with the other engines. Between its turns the server is
    paused, since its workers poll for a second after each request, which would slow the next engine down.

    clock: returns seconds.
    """

    starts_slowly = True

    def __init__(self, job: Job, clock: Callable[[], float] = time.perf_counter) -> None:
        self.job = job
        self.clock = clock
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.now: tuple[int, Option] | None = None
        self.version = ""

    def options(self, ids: list[int]) -> list[Option]:
        return [{"dtype": dtype} for dtype in self.job.dtypes]

    def drafts(self) -> list[Option]:
        if self.job.mode == "lookup":
            return [{"tokens": tokens, "ngram": ngram} for tokens, ngram in (("5", "3"), ("3", "3"), ("5", "2"))]
        return [{}]

    def use(self, threads: int, option: Option) -> None:
        if self.now == (threads, option) and self.process is not None:
            return
        self.close()  # two servers would share the cores
        with socket.socket() as free:
            free.bind((_HOST, 0))
            self.port = free.getsockname()[1]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        self.process = subprocess.Popen(
            self.command(option),
            env=os.environ | environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its processes are killed together
        )
        self.now = threads, option
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def command(self, option: Option) -> list[str]:
        """What starts the server."""
        job = self.job
        told = [job.python, "-m", "vllm.entrypoints.openai.api_server", "--model", job.path]
        told += ["--served-model-name", _MODEL, "--host", _HOST, "--port", str(self.port), "--dtype", option["dtype"]]
        # One request at a time, as with the other engines; a repeated prompt is read again; all log-probabilities.
        told += ["--max-model-len", str(job.context), "--max-num-seqs", "1", "--no-enable-prefix-caching"]
        told += ["--max-logprobs", "-1"]
        if job.revision:
            told += ["--revision", job.revision]
        if job.mode == "lookup":
            speculative = {
                "method": "ngram",
                "num_speculative_tokens": int(option["tokens"]),
                "prompt_lookup_max": int(option["ngram"]),
                "prompt_lookup_min": 2,
            }
            told += ["--speculative-config", json.dumps(speculative)]
        return told

    def _wait(self) -> None:
        """Waits until the server answers.

        Raises:
            RuntimeError: it ended, or does not answer in time.
        """
        assert self.process is not None
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if (code := self.process.poll()) is not None:
                raise RuntimeError(f"the server ended with exit code {code}: {self._last_line()}")
            with suppress(OSError, http.client.HTTPException):
                self.version = json.loads(self._get("/version", 5))["version"]
                self._get("/health", 5)
                return
            time.sleep(0.2)
        raise RuntimeError(f"the server did not answer within {START_SECONDS:.0f} s: {self._last_line()}")

    def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run:
        job = self.job
        request: dict[str, Any] = {
            "model": _MODEL,
            "prompt": ids,
            "max_tokens": tokens,
            "temperature": job.temperature,
            "top_p": job.top_p,
            "top_k": job.top_k,  # 0: all
            "seed": job.seed if seed is None else seed,
            "ignore_eos": not stop,
            "stop_token_ids": list(job.stop) if stop else [],
            "stream": True,
            "return_token_ids": True,
        }
        made: list[int] = []
        times, head = [], 0
        with self._awake():
            before = self._drafted()
            begun = self.clock()
            for chunk in self._stream("/v1/completions", request):
                found = [token for choice in chunk.get("choices", ()) for token in choice.get("token_ids") or ()]
                if found:
                    times.append(self.clock())
                    head = head or len(found)
                    made += found
            after = self._drafted()
        if not made:
            raise RuntimeError("the server streamed no token ids")
        counts = {name: after[name] - before[name] for name in after} if self.job.mode else {}
        return Run(made, times[0] - begun, times[-1] - times[0], head, counts.get("drafted"), counts.get("accepted"))

    def predict(self, ids: list[int], last: int) -> np.ndarray:
        import numpy as np

        rows = []
        for end in range(len(ids) - last + 1, len(ids) + 1):
            request = {"model": _MODEL, "prompt": ids[:end], "max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
            request |= {"logprobs": -1, "return_tokens_as_token_ids": True}
            with self._awake():
                told = self._post("/v1/completions", request)["choices"][0]["logprobs"]["top_logprobs"][0]
            row = np.full(len(told), _LEAST)
            row[[int(name.rpartition(":")[2]) for name in told]] = list(told.values())
            rows.append(np.maximum(row, _LEAST))
        return np.stack(rows).astype(np.float32)

    def facts(self) -> dict[str, Any]:
        assert self.now is not None
        return {
            "version": f"vLLM {self.version}",
            "weights": self.now[1]["dtype"],
            "settings": {"server": "HTTP, streamed", **{k: v for k, v in self.now[1].items() if k != "dtype"}},
        }

    def close(self) -> None:
        if self.process is None:
            return
        process, self.process = self.process, None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session, which the workers are in
        process.wait()
        self.log.close()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Resumes the server's processes, and pauses them afterwards."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGSTOP)

    def _drafted(self) -> dict[str, int]:
        """Tokens so far, {"drafted", "accepted"}, from the server's counters; empty for plain decoding."""
        if not self.job.mode:
            return {}
        counts = {"drafted": 0, "accepted": 0}
        names = {
            "vllm:spec_decode_num_draft_tokens_total": "drafted",
            "vllm:spec_decode_num_accepted_tokens_total": "accepted",
        }
        for line in self._get("/metrics", ANSWER_SECONDS).decode().splitlines():
            if ours := names.get(line.partition("{")[0]):
                counts[ours] += int(float(line.rpartition(" ")[2]))
        return counts

    def _get(self, path: str, seconds: float) -> bytes:
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=seconds)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise http.client.HTTPException(f"{path} answered {answer.status}")
            return text
        finally:
            connection.close()

    def _post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        connection, answer = self._asked(path, request)
        try:
            found: dict[str, Any] = json.loads(answer.read())
            return found
        finally:
            connection.close()

    def _stream(self, path: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        connection, answer = self._asked(path, request)
        try:
            for line in answer:
                text = line.decode().strip()
                if text.startswith("data:") and text != "data: [DONE]":
                    yield json.loads(text.removeprefix("data:"))
        finally:
            connection.close()

    def _asked(self, path: str, request: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"the server answered {answer.status}: {answer.read(500).decode(errors='replace')}")
        except BaseException:
            connection.close()
            raise
        return connection, answer

    def _last_line(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it printed nothing"])[-1][:200]


def environment(threads: int) -> dict[str, str]:
    """What the server is told by variables: threads, 1 GiB of KV cache, and nothing to reach over the network."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
