"""Peers that draft, vLLM behind its server, and the fidelity of peers.

The packages of llama.cpp, OpenVINO and vLLM are not needed: stubs replace them, and a server of our own speaks vLLM's
protocol. Tests with the real packages are skipped where they are missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import scipy.stats
import tiny
import torch
from test_peers import FakeSeat, _stand_in, benched, checkpoint_of, tiny_pair, told

from spec_decode.__main__ import main
from spec_decode.bench import fidelity, peers
from spec_decode.bench.engines import KINDS, Job, Run
from spec_decode.bench.engines.huggingface import Transformers
from spec_decode.bench.engines.llama_cpp import LlamaCpp
from spec_decode.bench.engines.openvino_genai import OpenVINO
from spec_decode.bench.engines.service import answer
from spec_decode.bench.engines.tuning import tune
from spec_decode.bench.engines.vllm_server import VLLM
from spec_decode.bench.fidelity import POSITIONS, Reference, chi_square, divergence, kl
from spec_decode.bench.peers import Extras, Peer, Peers, parse
from spec_decode.bench.seats import Beside, Inside
from spec_decode.errors import ModelError, UserError
from spec_decode.settings import Settings

REPEATING = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Tuning


class Drafting:
    """An engine whose speed depends on threads, option and draft; `starts` counts calls of `use`."""

    job = Job("")

    def __init__(self, slow: bool = False) -> None:
        self.starts_slowly, self.starts = slow, 0
        self.now: tuple[int, dict[str, str]] = (0, {})
        self.prompts: list[int] = []

    def options(self, ids: list[int]) -> list[dict[str, str]]:
        return [{"kind": "a"}, {"kind": "b"}]

    def drafts(self) -> list[dict[str, str]]:
        return [{"tokens": "3", "ngram": "2"}, {"tokens": "5"}, {"tokens": "10"}]

    def use(self, threads: int, option: dict[str, str]) -> None:
        self.starts += 1
        self.now = threads, option

    def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run:
        threads, option = self.now
        self.prompts.append(ids[0])
        rate = 10.0 * threads + 5 * (option["kind"] == "b") + {"3": 0, "5": 4, "10": -4}[option["tokens"]]
        return Run(list(range(tokens)), 0.1, (tokens - 1) / (rate * ids[0]))


@pytest.mark.parametrize("slow", [False, True])
def test_settings_of_the_draft_are_searched_after_threads_and_options(slow: bool) -> None:
    engine = Drafting(slow)
    tuned = tune(engine, [1, 2], [[1], [2], [4]])
    assert (tuned.threads, tuned.option) == engine.now == (2, {"kind": "b", "tokens": "5"})
    assert len(tuned.trials) == 2 * 2 + 3
    assert engine.starts == (1 if slow else 2) * 7 + 1
    assert set(engine.prompts) == {1, 2, 4}
    best = max(tuned.trials, key=lambda trial: trial["tokens_per_second"])
    assert best["tokens"] == "5" and best["kind"] == "b"
    # the prompts run at 29, 58 and 116 tokens/s: three tokens, one of each, take 1/29 + 1/58 + 1/116 s
    assert best["tokens_per_second"] == pytest.approx(3 / (1 / 29 + 1 / 58 + 1 / 116))


def test_the_rate_leaves_out_all_tokens_of_the_first_output() -> None:
    assert Run([1, 2, 3, 4, 5], 0.1, 2.0, head=3).rate == 1.0
    assert Run([1, 2, 3], 0.1, 0.0, head=3).rate is None


# transformers


def test_prompt_lookup_of_transformers_emits_the_same_text_in_fewer_outputs(one_thread: None) -> None:
    model = tiny.model("llama")
    plain = Transformers(Job(""), model=model).run(REPEATING, 40).ids
    ticks = iter(range(10_000))
    engine = Transformers(Job("", mode="lookup"), model=model, clock=lambda: float(next(ticks)))
    assert {option["cache"] for option in engine.options(REPEATING)} == {"dynamic"}
    drafts = engine.drafts()
    assert len(drafts) == len({tuple(draft.items()) for draft in drafts}) > 3
    for draft in (drafts[0], drafts[-1]):
        engine.use(1, {"dtype": "float32", "cache": "dynamic", **draft})
        run = engine.run(REPEATING, 40)
        assert run.ids == plain
        assert run.seconds < 39  # the clock advances by one with every output
        assert run.rate == pytest.approx((40 - run.head) / run.seconds)


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_mtp_of_transformers_emits_the_same_text_with_a_tiny_gemma_4_pair(kind: str, one_thread: None) -> None:
    model, assistant = tiny.gemma4(kind)
    plain = Transformers(Job(""), model=model).run(REPEATING, 24).ids
    engine = Transformers(Job("", mode="mtp"), model=model, assistant=assistant)
    for draft in engine.drafts():
        engine.use(1, {"dtype": "float32", "cache": "dynamic", **draft})
        assert engine.run(REPEATING, 24).ids == plain
        assert assistant.generation_config.num_assistant_tokens == int(draft["tokens"])


def test_mtp_reads_both_checkpoints_of_a_pair(tmp_path: Path, one_thread: None) -> None:
    model, assistant = tiny.gemma4("dense")
    for part, name in ((model, "target"), (assistant, "assistant")):
        part.save_pretrained(tmp_path / name)
    engine = Transformers(Job(str(tmp_path / "target"), mode="mtp", draft=str(tmp_path / "assistant")))
    engine.use(1, {"dtype": "float32", "cache": "dynamic", "tokens": "3"})
    assert engine.run(REPEATING, 12).ids == Transformers(Job(""), model=model).run(REPEATING, 12).ids


def test_mtp_is_skipped_for_other_pairs_and_seated_for_gemma_4() -> None:
    with pytest.raises(UserError, match="Gemma 4 assistant for a Gemma 4 target, the only ones"):
        Peers(["transformers-mtp"], _with_plan(tiny_pair()), Settings(), [[1]])
    model, assistant = tiny.gemma4("dense")
    pair = _with_plan(tiny_pair())
    pair.target = SimpleNamespace(model=model, device=torch.device("meta"), eos={1}, config=model.config)
    pair.drafter_model, pair.drafter_path = assistant, "somewhere"
    seat = peers._seat("transformers-mtp", pair, Settings(), (4, Extras()), print)
    assert isinstance(seat, Inside) and seat.engine.assistant is assistant


def _with_plan(pair: Any) -> Any:
    pair.drafter_model, pair.drafter_path = None, ""
    return pair


# llama.cpp and OpenVINO, without their packages


def _llama(monkeypatch: pytest.MonkeyPatch, vocabulary: int = 8) -> list[Any]:
    made: list[Any] = []

    class Server:
        def __init__(self, parameters: Any) -> None:
            self.parameters, self.asked = parameters, []
            made.append(self)

        def handle_completions(self, asked: str, reply: Any) -> None:
            request = json.loads(asked)
            self.asked.append(request)
            told: dict[str, Any] = {"tokens": list(range(request["n_predict"]))}
            if "n_probs" in request:
                seen = request["prompt"][-1]
                logs = torch.full((vocabulary,), 0.0).index_fill(0, torch.tensor([seen]), 2.0).log_softmax(-1).tolist()
                rows = [{"id": i, "logprob": p} for i, p in enumerate(logs)]
                told["completion_probabilities"] = [{"top_logprobs": rows[::-1]}]
            timings = {"prompt_ms": 250.0, "predicted_ms": 2000.0, "draft_n": 12, "draft_n_accepted": 9}
            reply(json.dumps({"timings": timings, "__verbose": told}))

    def parameters() -> Any:
        def some() -> Any:
            return SimpleNamespace(cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

        draft = some()
        draft.mparams = SimpleNamespace()
        speculative = SimpleNamespace(draft=draft, ngram_simple=SimpleNamespace(), types=[])
        return SimpleNamespace(model=SimpleNamespace(), speculative=speculative, **vars(some()))

    types = SimpleNamespace(**{
        f"COMMON_SPECULATIVE_TYPE_{name}": name for name in ("NGRAM_SIMPLE", "NGRAM_CACHE", "DRAFT_SIMPLE")
    })  # fmt: skip
    _stand_in(monkeypatch, "xllamacpp", Server=Server, CommonParams=parameters, common_speculative_type=types)
    return made


def test_llama_cpp_drafts_by_lookup_and_tells_what_was_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _llama(monkeypatch)
    engine = LlamaCpp(Job("model.gguf", mode="lookup"))
    seen = set()
    for draft in engine.drafts():
        engine.use(2, draft)
        speculative = made[-1].parameters.speculative
        seen.add(tuple(speculative.types))
        if draft["kind"] == "ngram-simple":
            simple = speculative.ngram_simple
            assert (simple.size_m, simple.size_n) == (int(draft["tokens"]), int(draft["ngram"]))
    assert seen == {("NGRAM_SIMPLE",), ("NGRAM_CACHE",)}
    run = engine.run([1, 2], 21)
    assert (run.drafted, run.accepted, run.rate) == (12, 9, 10.0)
    plain = LlamaCpp(Job("model.gguf"))
    plain.use(2, {})
    assert plain.run([1, 2], 21).drafted is None and made[-1].parameters.speculative.types == []


def test_llama_cpp_drafts_with_the_model_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _llama(monkeypatch)
    engine = LlamaCpp(Job("model.gguf", mode="draft", draft="small.gguf"))
    engine.use(2, engine.drafts()[0])
    draft = made[-1].parameters.speculative.draft
    assert draft.mparams.path == "small.gguf" and made[-1].parameters.speculative.types == ["DRAFT_SIMPLE"]
    assert draft.cpuparams.n_threads == draft.cpuparams_batch.n_threads == 2
    assert draft.n_max == int(engine.drafts()[0]["tokens"])


def test_llama_cpp_gives_the_distribution_after_each_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _llama(monkeypatch)
    engine = LlamaCpp(Job("model.gguf"))
    engine.use(1, {})
    logs = engine.predict([1, 2, 3, 4], 2)
    assert logs.shape == (2, 8) and logs.dtype == np.float32
    assert np.exp(logs).sum(-1) == pytest.approx([1, 1], abs=1e-5)
    assert logs.argmax(-1).tolist() == [3, 4]
    assert [request["prompt"] for request in made[-1].asked] == [[1, 2, 3], [1, 2, 3, 4]]


def test_openvino_drafts_by_lookup_and_loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Pipeline:
        def __init__(self, path: str, device: str, **properties: Any) -> None:
            self.properties, self.asked = properties, []
            made.append(self)

        def generate(self, given: Any, asked: Any) -> Any:
            self.asked.append(asked)
            metrics = SimpleNamespace(
                get_ttft=lambda: SimpleNamespace(mean=125.0), get_tpot=lambda: SimpleNamespace(mean=20.0)
            )
            return SimpleNamespace(tokens=[list(range(11))], perf_metrics=metrics)

    _stand_in(
        monkeypatch,
        "openvino_genai",
        LLMPipeline=Pipeline,
        GenerationConfig=SimpleNamespace,
        SchedulerConfig=SimpleNamespace,
        TokenizedInputs=lambda ids, mask: (ids, mask),
    )
    _stand_in(monkeypatch, "openvino", Tensor=lambda array: array)
    engine = OpenVINO(Job("model.gguf", mode="lookup", temperature=0.5, seed=3))
    (option,) = engine.options([1])
    drafts = engine.drafts()
    for draft in drafts:
        engine.use(2, option | draft)
        engine.run([7, 8], 11)
        asked = made[-1].asked[-1]
        assert (asked.num_assistant_tokens, asked.max_ngram_size) == (int(draft["tokens"]), int(draft["ngram"]))
        assert asked.rng_seed == 3
    engine.run([7, 8], 11, seed=9)
    assert made[-1].asked[-1].rng_seed == 9
    assert len(made) == 1 and made[0].properties["prompt_lookup"] is True
    engine.use(1, option | drafts[0])
    assert len(made) == 2 and made[1].properties["INFERENCE_NUM_THREADS"] == 1


# vLLM, with a server of our own in its place

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"], sys.argv
options = sys.argv[3:]
def told(name):
    return options[options.index(name) + 1]
if told("--dtype") == "float16":
    sys.exit("ValueError: no such dtype here")
drafted = 0

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/version":
            return self.send(b'{"version": "0.0-stand-in"}')
        if self.path == "/metrics":
            lines = [f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {drafted}.0',
                     f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {drafted // 2}.0']
            return self.send("\\n".join(lines).encode(), "text/plain")
        if self.path == "/environment":
            return self.send(json.dumps({**dict(os.environ), "options": options, "pid": os.getpid()}).encode())
        return self.send(b"")

    def do_POST(self):
        global drafted
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == told("--served-model-name") and told("--host") == "127.0.0.1"
        if not asked.get("stream"):
            seen = asked["prompt"][-1]
            logs = {f"token_id:{i}": (0.0 if i == seen else -50.0) for i in range(6)}
            return self.send(json.dumps({"choices": [{"logprobs": {"top_logprobs": [logs]}}]}).encode())
        if asked["max_tokens"] == 99:
            return self.send_error(400, "too many")
        drafted += 10
        made = [asked["seed"], *asked["stop_token_ids"], *asked["prompt"]] * asked["max_tokens"]
        made = made[: asked["max_tokens"]]
        parts = [made[:2], *([token] for token in made[2:])]
        text = "".join(f"data: {json.dumps({'choices': [{'token_ids': part}]})}\\n\\n" for part in parts)
        self.send((text + "data: [DONE]\\n\\n").encode(), "text/event-stream")

HTTPServer((told("--host"), int(told("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> str:
    """An executable that is started as the Python of vLLM's environment would be."""
    (tmp_path / "server.py").write_text(SERVER)
    started = tmp_path / "python"
    started.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "server.py"} "$@"\n')
    started.chmod(0o755)
    return str(started)


def _environment(engine: VLLM) -> dict[str, Any]:
    """Variables and options of the server, and its process id."""
    with engine._awake():
        found: dict[str, Any] = json.loads(engine._get("/environment", 5))
    return found


def test_vllm_is_started_asked_and_killed(interpreter: str) -> None:
    ticks = iter(range(1000))
    job = Job("folder", stop=(4,), context=77, seed=3, python=interpreter, dtypes=("float32",))
    engine = VLLM(job, clock=lambda: float(next(ticks)))
    (option,) = engine.options([1])
    try:
        engine.use(2, option)
        run = engine.run([7, 8], 6)
        assert run.ids == [3, 4, 7, 8, 3, 4] and run.head == 2
        assert (run.first, run.seconds, run.rate) == (1.0, 4.0, 1.0)  # five outputs, a tick each
        assert run.drafted is None
        assert engine.run([7, 8], 3, stop=False, seed=5).ids == [5, 7, 8]
        seen = _environment(engine)
        assert seen["OMP_NUM_THREADS"] == "2" and "--speculative-config" not in seen["options"]
        assert seen["options"][seen["options"].index("--max-model-len") + 1] == "77"
        end = time.monotonic() + 10  # between its turns the server is paused
        while psutil.Process(seen["pid"]).status() != psutil.STATUS_STOPPED and time.monotonic() < end:
            time.sleep(0.01)
        assert psutil.Process(seen["pid"]).status() == psutil.STATUS_STOPPED
        assert engine.facts()["version"] == "vLLM 0.0-stand-in" and engine.facts()["weights"] == "float32"
        logs = engine.predict([1, 2, 3], 2)
        assert logs.shape == (2, 6) and logs.argmax(-1).tolist() == [2, 3]
        with pytest.raises(RuntimeError, match="the server answered 400"):
            engine.run([1], 99)
        engine.use(2, option)
        assert _environment(engine)["pid"] == seen["pid"]  # it is not started again
    finally:
        engine.close()
    assert not _lives(seen["pid"])


def test_vllm_with_ngram_speculation_tells_what_was_accepted(interpreter: str) -> None:
    engine = VLLM(Job("folder", mode="lookup", python=interpreter))
    draft = engine.drafts()[0]
    try:
        engine.use(1, {"dtype": "float32", **draft})
        run = engine.run([7, 8], 4)
        assert (run.drafted, run.accepted) == (10, 5)
        options = _environment(engine)["options"]
        given = json.loads(options[options.index("--speculative-config") + 1])
        assert given["method"] == "ngram" and given["num_speculative_tokens"] == int(draft["tokens"])
    finally:
        engine.close()


def test_a_server_that_does_not_start_is_one_sentence(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLLM(Job("folder", python=interpreter))
    with pytest.raises(RuntimeError, match="ended with exit code 1: ValueError: no such dtype here"):
        engine.use(1, {"dtype": "float16"})
    assert engine.process is None
    monkeypatch.setattr("spec_decode.bench.engines.vllm_server.START_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="did not answer within 0 s"):
        engine.use(1, {"dtype": "float32"})
    assert engine.process is None


@pytest.mark.parametrize("gently", [True, False])
def test_the_server_ends_with_the_seat_of_its_engine(gently: bool, interpreter: str) -> None:
    seat = Beside("vllm", Job("folder", python=interpreter))
    try:
        seat.ask({"do": "use", "threads": 1, "option": {"dtype": "float32"}})
        (server,) = (
            p for p in psutil.Process(seat.process.pid).children(recursive=True) if "server.py" in str(p.cmdline())
        )
        assert seat.cpu() > 0
        if gently:  # the parent ended: the engine sees the end of its input
            seat.process.stdin.close()
            seat.process.wait(30)
        seat.close()
        assert not _lives(server.pid)
    finally:
        seat.close()


def _lives(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.05)
    return True


# Fidelity


class Table:
    """An engine that draws from one table of log-probabilities, `[vocabulary]`, but claims another one, if any. `STOP`
    ends its texts."""

    job = Job("")
    starts_slowly = False
    STOP = 1

    def __init__(self, logs: np.ndarray, claims: np.ndarray | None, temperature: float = 1.0) -> None:
        self.logs, self.claims, self.temperature = logs, claims, temperature

    def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run:
        p = np.exp(self.logs / self.temperature)
        made = np.random.default_rng(seed).choice(len(p), size=tokens, p=p / p.sum()).tolist()
        if stop and self.STOP in made:
            made = made[: made.index(self.STOP) + 1]
        return Run(made, 0.1, 1.0)

    def predict(self, ids: list[int], last: int) -> np.ndarray | None:
        return None if self.claims is None else np.tile(self.claims, (last, 1))


def seat_of(logs: np.ndarray, claims: np.ndarray | None, temperature: float = 1.0) -> Any:
    return SimpleNamespace(ask=lambda request: answer(Table(logs, claims, temperature), request), close=lambda: None)


def logs_of(*weights: float) -> np.ndarray:
    p = np.array(weights, dtype=np.float64)
    return np.log(p / p.sum())


def test_divergence_is_the_mean_over_positions() -> None:
    exact, other = logs_of(3, 1, 4), logs_of(1, 1, 1)
    due = sum(p * np.log(p * 3) for p in np.exp(exact))
    assert divergence(np.stack([exact, exact]), np.stack([other, exact])) == pytest.approx(due / 2)
    padded = np.append(other, -100.0)
    assert divergence(exact[None], padded[None]) == pytest.approx(due)


def test_an_engine_is_compared_at_every_position_of_the_texts() -> None:
    exact, other = logs_of(3, 1, 4, 2), logs_of(1, 1, 1, 1)
    reference = Reference(seat_of(exact, exact), [[1, 2], [3], [0], [2]])
    assert [len(text) for text in reference.texts] == [1 + POSITIONS, POSITIONS, POSITIONS]
    assert reference.logs.shape == (3, POSITIONS, 4)
    assert kl(seat_of(exact, exact), reference) == pytest.approx(0, abs=1e-6)
    assert kl(seat_of(other, other), reference) == pytest.approx(divergence(exact[None], other[None]), abs=1e-5)
    assert kl(seat_of(other, None), reference) is None


def test_draws_are_compared_with_what_the_engine_claims() -> None:
    # p-values of honest engines are uniform: of 20, all exceed 1e-4 but with probability 0.002
    honest, other = logs_of(5, 3, 2, 1, 0.01), logs_of(4, 4, 2, 1, 0.01)
    reference = Reference(seat_of(honest, honest), [[1, 2, 3]], [Table.STOP])
    found = [
        chi_square(seat_of(honest, honest), reference, Settings(temperature=1.0, seed=1000 * i)) for i in range(20)
    ]
    assert min(one.p for one in found) > 1e-4 and max(one.p for one in found) > 0.5
    assert all(one.own and one.draws == fidelity.DRAWS and one.cells > 5 for one in found)
    # one that draws from something else is refuted: it misses by more than 200 draws can hide
    settings = Settings(temperature=1.0)
    assert chi_square(seat_of(logs_of(1, 3, 2, 5, 0.01), honest), reference, settings).p < 1e-6
    # without a claim it is held to the float32 distribution
    against = chi_square(seat_of(honest, None), reference, settings)
    assert not against.own and against.p > 1e-4
    assert chi_square(seat_of(logs_of(1, 3, 2, 5, 0.01), None), reference, settings).p < 1e-6
    # of an engine's own distribution, not of float32
    assert chi_square(seat_of(other, other), reference, settings).p > 1e-4


def test_temperature_and_top_k_are_applied_to_what_is_expected() -> None:
    honest = logs_of(5, 3, 2, 1, 1)
    reference = Reference(seat_of(honest, honest), [[1, 2, 3]], [Table.STOP])
    cold = seat_of(honest, honest, temperature=0.5)
    assert chi_square(cold, reference, Settings(temperature=0.5)).p > 1e-4
    assert chi_square(cold, reference, Settings(temperature=1.0)).p < 1e-4
    assert chi_square(cold, reference, Settings(temperature=0.5, top_k=2)).p < 1e-4


def test_an_engine_draws_at_the_temperature_and_with_the_seed_of_the_request() -> None:
    class Told(Table):
        def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run:
            told.append((self.job.temperature, seed))
            return Run([1, 2], 0.1, 1.0)

    told: list[tuple[float, int | None]] = []
    engine = Told(logs_of(1, 1), None)
    asked = {"do": "run", "ids": [1], "tokens": 2}
    answer(engine, {**asked, "temperature": 0.7, "seed": 5})
    answer(engine, asked)
    answer(engine, {"do": "draw", "ids": [1], "tokens": 2, "temperature": 1.2, "seeds": [3, 4], "stop": True})
    assert told == [(0.7, 5), (0.0, None), (1.2, 3), (1.2, 4)] and engine.job == Job("")


def test_other_pairs_that_float32_rounds_to_none_contradict_nothing() -> None:
    """They join the rarest cell, as do those that are expected less than five times."""
    cells = {(0, 0): 0.5, (0, 1): 0.5}
    found = fidelity._tested(Counter({(0, 0): 99, (0, 1): 95, (2, 2): 6}), cells, 200, True)
    due = scipy.stats.chisquare([105, 95], [100, 100])
    assert (found.cells, found.statistic, found.p) == (2, pytest.approx(due.statistic), pytest.approx(due.pvalue))


def test_a_distribution_on_one_pair_cannot_be_tested() -> None:
    sure = logs_of(1, 1e-9, 1e-9)
    reference = Reference(seat_of(sure, sure), [[1, 2, 3]], [Table.STOP])
    assert chi_square(seat_of(sure, sure), reference, Settings(temperature=1.0)).p is None


def test_lookup_of_transformers_is_exact_when_sampling(one_thread: None) -> None:
    """Seeded; the p-value of an exact sampler is below 1e-3 once in a thousand seeds."""
    model = tiny.model("llama")
    reference = Reference(Inside("reference", Transformers(Job(""), model)), [REPEATING])
    settings = Settings(temperature=0.7)
    engine = Transformers(Job("", mode="lookup", temperature=0.7), model=model)
    engine.use(1, {"dtype": "float32", "cache": "dynamic", "tokens": "3", "ngram": "2"})
    found = fidelity.fidelity(Inside("lookup", engine), reference, settings)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["positions"] == POSITIONS
    assert found["chi_square"]["own"] and (found["chi_square"]["p"] is None or found["chi_square"]["p"] > 1e-3)


def test_peers_report_their_fidelity_beside_ours(tmp_path: Path) -> None:
    pair, settings = _with_plan(tiny_pair()), Settings(max_new_tokens=4)
    pair.name = checkpoint_of(tmp_path)
    with Peers(["transformers"], pair, settings, [[1, 2, 3]], counts=[1]) as running:
        _, report = benched(pair, settings, running, ["transformers"])
    facts = report["peers"][0]["facts"]
    assert facts["fidelity"]["ours"] == pytest.approx(0, abs=1e-6)
    assert 0 <= facts["fidelity"]["kl"] < 0.01 and facts["fidelity"]["chi_square"] is None
    assert "nats, mean over 8 positions; of our target 0.0000 nats." in told(report)


def test_a_peer_whose_distribution_cannot_be_measured_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, settings = _with_plan(tiny_pair()), Settings(max_new_tokens=4)
    monkeypatch.setattr(peers, "_seat", lambda *_: FakeSeat([1, 2, 3]))
    monkeypatch.setattr(peers, "_check_memory", _no_memory)
    with Peers(["transformers", "llama.cpp"], pair, settings, [[1]]) as running:
        _, report = benched(pair, settings, running, ["transformers", "llama.cpp"])
    assert set(running.skipped) == set()
    text = told(report)
    assert text.count("Its distribution was not measured: no memory is free.") == 2


def test_later_turns_get_room_as_far_as_the_context_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, settings, longest = _with_plan(tiny_pair()), Settings(max_new_tokens=4), []

    def seat(name: str, pair: Any, settings: Settings, asked: tuple[int, Extras], say: Any) -> FakeSeat:
        longest.append(asked[0])
        return FakeSeat([1, 2, 3])

    monkeypatch.setattr(peers, "_seat", seat)
    for room in (0, 20, 10**9):
        with Peers(["transformers"], pair, settings, [[1] * 7], extras=Extras(room=room), check=False) as running:
            assert "transformers" in running.running
    assert longest == [7, 27, pair.context - peers._ROOM - 1]


def _no_memory(pair: Any) -> None:
    raise ModelError("no memory is free.")


def test_the_report_says_how_draws_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, settings = tiny_pair(), Settings(max_new_tokens=4, temperature=0.7)
    with Peers([], pair, settings, []) as running:
        running.running["other"] = Peer("other", FakeSeat([1, 2, 3]), [1], [[1]])
        drawn = {"draws": 200, "cells": 9, "statistic": 7.04, "p": 0.532, "own": True}
        running.running["other"].facts["fidelity"] = {"kl": 0.01234, "positions": 24, "ours": None, "chi_square": drawn}
        _, report = benched(pair, settings, running, ["other"])
    text = told(report)
    assert "| 0.0123 |" in text and "KL(float32 ‖ engine) 0.0123 nats, mean over 24 positions." in text
    assert (
        "200 drawn pairs of tokens against its own distribution: chi-square 7.0 with 8 degrees of freedom, p = 0.532"
        in text
    )


# Peers that cannot run


def test_all_stands_for_every_peer() -> None:
    assert parse("vllm,all") == ["vllm", *(name for name in KINDS if name != "vllm")]


def test_what_a_peer_needs_besides_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(peers.VLLM_PYTHON, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"name its Python with --vllm PYTHON or in the variable SPEC_DECODE_VLLM\.$"):
        parse("vllm-ngram")
    with pytest.raises(UserError, match="no-such-python cannot be run"):
        parse("vllm", Extras(vllm="no-such-python"))
    assert parse("vllm", Extras(vllm=sys.executable)) == ["vllm"]
    monkeypatch.setenv(peers.VLLM_PYTHON, sys.executable)
    assert parse("vllm") == ["vllm"]
    _stand_in(monkeypatch, "xllamacpp", __spec__=SimpleNamespace(name="xllamacpp"))
    with pytest.raises(UserError, match="a GGUF file: name it with --llama-draft FILE"):
        parse("llama.cpp-draft")
    (tmp_path / "small.gguf").touch()
    assert parse("llama.cpp-draft", Extras(llama_draft=str(tmp_path / "small.gguf"))) == ["llama.cpp-draft"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ["vllm", "--vllm", "no-such-python"],
            "The peer vllm needs a Python with vLLM, and no-such-python cannot be run.",
        ),
        (
            ["llama.cpp-draft", "--llama-draft", "no-such.gguf"],
            "The peer llama.cpp-draft needs a draft model for llama.cpp, a GGUF file: name it with --llama-draft FILE.",
        ),
    ],
)
def test_the_command_hands_on_what_peers_need(
    options: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _stand_in(monkeypatch, "xllamacpp", __spec__=SimpleNamespace(name="xllamacpp"))
    assert main(["bench", "--peers", *options]) == 2
    assert capsys.readouterr().err.strip() == f"spec_decode: {why}"


# The real packages, on the embedded target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama.cpp-lookup", "openvino-lookup"])
def test_real_engines_draft_and_stay_close_to_float32(name: str) -> None:
    kind = KINDS[name]
    if importlib.util.find_spec(kind.needs) is None:
        pytest.skip(f"{kind.package} is not installed")
    from spec_decode.loading import embedded

    path, ids = str(embedded.gguf(print)), [1, 9690, 198, 506, *([260, 1122, 282, 1232, 28, 351] * 4)]
    runs = []
    for mode in ("", "lookup"):
        engine = KINDS[name.removesuffix("-lookup") if not mode else name].make(Job(path, mode=mode, context=256))
        engine.use(1, engine.options(ids)[0] | engine.drafts()[0])
        runs.append(engine.run(ids, 24, stop=False))
        if mode:
            logs = engine.predict(ids, 3)
        engine.close()
    assert all(len(run.ids) == 24 and run.rate for run in runs)
    exact = Transformers(Job(str(embedded.prepare())))
    exact.use(1, {"dtype": "float32", "cache": "dynamic"})
    assert logs is not None and np.exp(logs.astype(np.float64)).sum(-1) == pytest.approx([1] * 3, abs=1e-3)
    assert divergence(exact.predict(ids, 3), logs) < 0.5


@pytest.mark.slow
def test_real_vllm_emits_the_text_of_the_target() -> None:
    python = os.environ.get(peers.VLLM_PYTHON)
    if not python:
        pytest.skip(f"{peers.VLLM_PYTHON} names no Python with vLLM")
    from spec_decode.loading import embedded

    ids = [1, 9690, 198, 506, *([260, 1122, 282, 1232, 28, 351] * 4)]
    seat = Beside("vllm-ngram", Job(str(embedded.prepare()), mode="lookup", context=256, python=python))
    exact = Transformers(Job(str(embedded.prepare())))
    exact.use(1, {"dtype": "float32", "cache": "dynamic"})
    try:
        seat.ask({"do": "use", "threads": 1, "option": {"dtype": "float32", "tokens": "3", "ngram": "2"}})
        made = seat.ask({"do": "run", "ids": ids, "tokens": 24})
        assert made["ids"][:8] == exact.run(ids, 24, stop=False).ids[:8]
        assert made["drafted"] > 0
        reference = Reference(Inside("reference", exact), [ids])
        assert kl(seat, reference) < 1e-3
    finally:
        seat.close()
