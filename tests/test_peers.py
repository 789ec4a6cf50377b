"""Peers that decode plainly: the search for the fastest settings, isolation from our lanes, refusals and the report.

The packages of llama.cpp and OpenVINO are not needed: stubs replace them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tiny import PairOf, ScriptedDrafter, model

from spec_decode.__main__ import main
from spec_decode.bench.engines import Job, Run, huggingface
from spec_decode.bench.engines.huggingface import Transformers
from spec_decode.bench.engines.llama_cpp import LlamaCpp
from spec_decode.bench.engines.openvino_genai import OpenVINO
from spec_decode.bench.engines.tuning import tune
from spec_decode.bench.markdown import peer_settings
from spec_decode.bench.markdown import peers as peers_table
from spec_decode.bench.measurement import PEER, Measurement
from spec_decode.bench.method import Bench
from spec_decode.bench.peers import Peer, Peers, parse, thread_counts
from spec_decode.bench.plan import Grid
from spec_decode.bench.seats import Beside
from spec_decode.bench.summary import report as summarize
from spec_decode.errors import ModelError, UserError
from spec_decode.loading import pair as models
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.sources.local import LocalSource
from spec_decode.target import Target

PROMPTS = [{"id": str(i), "category": "c", "prompt": text} for i, text in enumerate(("one two", "three", "four"))]


class Fake:
    """An engine whose speed is a function of (threads, option); it slows down by a share `slowing` with every run."""

    def __init__(self, speed: dict[tuple[int, str], float], slowing: float = 0.0) -> None:
        self.speed, self.slowing = speed, slowing
        self.now: tuple[int, str] | None = None
        self.runs: list[tuple[int, str]] = []

    job = Job("")
    starts_slowly = False

    def options(self, ids: list[int]) -> list[dict[str, str]]:
        return [{"kind": kind} for kind in dict.fromkeys(kind for _, kind in self.speed)]

    def drafts(self) -> list[dict[str, str]]:
        return [{}]

    def use(self, threads: int, option: dict[str, str]) -> None:
        self.now = threads, option["kind"]

    def run(self, ids: list[int], tokens: int, stop: bool = True, seed: int | None = None) -> Run:
        self.runs.append(self.now)
        rate = self.speed[self.now] * (1 - self.slowing) ** len(self.runs)
        return Run(list(range(tokens)), 0.1, (tokens - 1) / rate)

    def facts(self) -> dict[str, Any]:
        return {"version": "fake 1", "weights": "none", "settings": {}}

    def close(self) -> None:
        pass


class FakeSeat:
    """A seat that answers `ids`, or fails with None."""

    def __init__(self, ids: list[int] | None) -> None:
        self.ids = ids
        self.closed = False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "tune":
            trials = [{"threads": n, "tokens_per_second": 10.0 * n} for n in request["counts"]]
            return {"version": "fake 1", "weights": "none", "settings": {}, "threads": 2, "trials": trials}
        if self.ids is None:
            raise ModelError("The peer broken failed: no more.")
        return {"ids": self.ids, "first": 0.5, "seconds": 1.0, "tokens_per_second": float(len(self.ids) - 1)}

    def cpu(self) -> float:
        return 0.0

    def close(self) -> None:
        self.closed = True


def tiny_pair() -> Any:
    pair = PairOf(Target(model("llama")), ScriptedDrafter(lambda tokens, length: [1] * length))
    pair.name = "tiny"
    pair.plan = SimpleNamespace(target=SimpleNamespace(precision=None, revision=None, attention=None))
    return pair


def benched(pair: Any, settings: Settings, peers: Peers, names: list[str]) -> tuple[list[Measurement], dict[str, Any]]:
    """The measurements of a benchmark with these peers, and its report."""
    source = LocalSource(pair)
    grid = Grid(settings, temperatures=(settings.temperature,), drafters=source.drafters, peers=tuple(names), repeats=1)
    made = Bench(source, grid, PROMPTS, peers=peers)
    made.check()
    made.warm_up()
    found = list(made.run())
    header = {"plan": grid.to_dict(), "planned": len(grid.order(len(PROMPTS)))}
    contents = SimpleNamespace(header=header, measurements=found, notes={"peers": peers.report()}, ended=True)
    return found, summarize(contents, "raw.jsonl")


def told(report: dict[str, Any]) -> str:
    return "\n".join([*peers_table(report), *peer_settings(report)])


def checkpoint_of(folder: Path) -> str:
    model("llama").save_pretrained(folder)
    return str(folder)


# The choice of settings


def test_the_fastest_settings_are_chosen_and_every_trial_reported():
    engine = Fake({(1, "a"): 80, (2, "a"): 95, (1, "b"): 60, (2, "b"): 140, (3, "a"): 20, (3, "b"): 30})
    tuned = tune(engine, [1, 2, 3], [[1, 2]])
    assert (tuned.threads, tuned.option) == (2, {"kind": "b"})
    assert engine.now == engine.runs[-1] == (2, "b")  # the engine is left warm with the chosen settings
    assert [(trial["threads"], trial["kind"]) for trial in tuned.trials] == [
        (threads, kind) for kind in "ab" for threads in (1, 2, 3)
    ]
    for trial in tuned.trials:
        assert trial["tokens_per_second"] == pytest.approx(engine.speed[trial["threads"], trial["kind"]])


def test_a_machine_that_slows_down_does_not_affect_the_choice():
    speed = {(threads, "a"): 100.0 + 2 * threads for threads in (1, 2, 3)}
    assert tune(Fake(speed, slowing=0.02), [1, 2, 3], [[1]]).threads == 3


@pytest.mark.parametrize(("cores", "physical", "counts"), [
    (1, 1, [1]),
    (2, 1, [1, 2]),
    (6, 3, [1, 2, 3, 4, 5, 6]),
    (96, 48, [1, 2, 4, 8, 16, 32, 48, 64, 96]),
    (12, 24, [1, 2, 4, 8, 12]),
])  # fmt: skip
def test_thread_counts_are_all_up_to_a_few_cores_and_some_of_many(cores, physical, counts, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: cores if logical else physical)
    assert thread_counts() == counts


# transformers


class Clock:
    """A clock on which a token takes 1 / speed[current number of PyTorch threads] seconds."""

    def __init__(self, speed: dict[int, float]) -> None:
        self.speed, self.now = speed, 0.0
        self.seen: list[int] = []

    def __call__(self) -> float:
        self.seen.append(torch.get_num_threads())
        self.now += 1 / self.speed[self.seen[-1]]
        return self.now


@pytest.mark.parametrize("best", [1, 2])
def test_transformers_gets_its_fastest_thread_count_and_pytorch_keeps_its_own(best, tmp_path, one_thread):
    """A pair in int8 leaves PyTorch with one thread, as `one_thread` does; the peer must not inherit that."""
    clock = Clock({threads: 5.0 if threads == best else 1.0 for threads in (1, 2)})
    engine = Transformers(Job(checkpoint_of(tmp_path)), clock=clock)
    tuned = tune(engine, [1, 2], [[1, 2, 3]])
    assert tuned.threads == best
    assert {trial["threads"]: trial["tokens_per_second"] for trial in tuned.trials} == pytest.approx(clock.speed)
    clock.seen.clear()
    assert engine.run([4, 5, 6], 5).rate == pytest.approx(5)
    assert set(clock.seen) == {best}
    assert torch.get_num_threads() == 1


def test_transformers_emits_the_text_of_the_target_and_stops_at_the_same_token(tmp_path, one_thread):
    engine = Transformers(Job(checkpoint_of(tmp_path)))
    ids = [5, 6, 7, 8]
    free = None
    for option in engine.options(ids):
        engine.use(1, option)
        made = engine.run(ids, 12).ids
        assert len(made) == 12 and free in (None, made)  # a static cache changes nothing
        free = made
    own = model("llama").generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    assert free == own
    stopping = Transformers(Job("", stop=(own[5],)), model=model("llama"))
    end = own.index(own[5]) + 1
    assert stopping.run(ids, 12).ids == own[:end]
    assert stopping.run(ids, 12, stop=False).ids == own


@pytest.mark.parametrize(("limit", "dtypes"), [(-1.0, {"float32"}), (1e9, {"float32", "bfloat16"})])
def test_a_dtype_is_tried_only_if_it_is_close_to_float32(limit, dtypes, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(huggingface, "CLOSE", limit)
    engine = Transformers(Job(checkpoint_of(tmp_path), dtypes=("float32", "bfloat16")))
    assert {option["dtype"] for option in engine.options([1, 2, 3, 4])} == dtypes
    assert 0 < engine.drift["bfloat16"] < 1


def test_transformers_in_its_own_process_reports_and_does_not_change_our_threads(tmp_path, one_thread):
    pair = models.load_pair(_with_tokenizer(tmp_path), device="cpu")
    threads, settings = torch.get_num_threads(), Settings(max_new_tokens=6)
    with Peers(["transformers", "openvino"], pair, settings, [[1, 2, 3]], counts=[1, 2]) as peers:
        found, _ = benched(pair, settings, peers, ["transformers", "openvino"])
        report = peers.report()
    assert torch.get_num_threads() == threads
    reported = report["transformers"]
    assert {trial["threads"] for trial in reported["trials"]} == {1, 2}
    best = max(reported["trials"], key=lambda trial: trial["tokens_per_second"])
    assert reported["threads"] == best["threads"] and reported["option"]["dtype"] == reported["weights"]
    assert torch.__version__ in reported["version"]
    assert reported["busy_cores"]["own"] > 0 and reported["busy_cores"]["others"] is not None
    assert "embedded target" in report["openvino"]["skipped"] or "pip install" in report["openvino"]["skipped"]
    ours, theirs = ({m.prompt: m for m in found if m.condition.peer is peer} for peer in (False, True))
    assert set(ours) == set(theirs) and all(m.lanes[PEER].tokens == 6 for m in theirs.values())
    if reported["weights"] == "float32":
        assert all(ours[name].baseline.token_ids == m.lanes[PEER].token_ids for name, m in theirs.items())


def _with_tokenizer(folder: Path) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["?", *"one two three four Warm up .".split()])}
    words |= {f"w{number}": number for number in range(len(words), 96)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return checkpoint_of(folder)


# llama.cpp and OpenVINO, without their packages


def test_llama_cpp_gets_the_same_request_and_its_rate_has_the_same_definition(monkeypatch):
    made: list[Any] = []

    class Server:
        def __init__(self, parameters: Any) -> None:
            self.parameters, self.asked = parameters, []
            made.append(self)

        def handle_completions(self, asked: str, answer: Any) -> None:
            self.asked.append(json.loads(asked))
            timings = {"prompt_ms": 250.0, "predicted_ms": 2000.0}
            answer(json.dumps({"timings": timings, "__verbose": {"tokens": list(range(41))}}))

    def parameters() -> Any:
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

    _stand_in(monkeypatch, "xllamacpp", Server=Server, CommonParams=parameters)
    engine = LlamaCpp(Job("model.gguf", context=300))
    engine.use(3, {})
    run = engine.run([7, 8, 9], 41)
    assert run.rate == pytest.approx(20) and run.first == 0.25  # 40 tokens after the first one in 2 s
    given, (asked,) = made[0].parameters, made[0].asked
    assert given.cpuparams.n_threads == given.cpuparams_batch.n_threads == 3
    assert (given.model.path, given.n_ctx, given.n_parallel) == ("model.gguf", 300, 1)
    assert asked["prompt"] == [7, 8, 9] and asked["n_predict"] == 41
    assert asked["top_k"] == 1 and asked["samplers"] == ["top_k"]
    assert not asked["ignore_eos"] and not asked["cache_prompt"]
    engine.run([1], 4, stop=False)
    assert made[0].asked[1]["ignore_eos"]


def test_openvino_gets_the_same_request_and_its_rate_has_the_same_definition(monkeypatch):
    made: list[Any] = []

    class Pipeline:
        def __init__(self, path: str, device: str, **properties: Any) -> None:
            self.path, self.device, self.properties, self.asked = path, device, properties, []
            made.append(self)

        def generate(self, given: Any, asked: Any) -> Any:
            self.asked.append((given, asked))
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
    engine = OpenVINO(Job("model.gguf", stop=(2, 5), context=300))
    for option in engine.options([1]):
        engine.use(2, option)
        run = engine.run([7, 8, 9], 11)
        assert run.rate == pytest.approx(50) and run.first == 0.125  # 20 ms for each token after the first
        (ids, mask), asked = made[-1].asked[0]
        assert ids.tolist() == [[7, 8, 9]] and mask.tolist() == [[1, 1, 1]]
        assert asked.max_new_tokens == 11 and asked.stop_token_ids == {2, 5}
        assert not asked.do_sample and not asked.ignore_eos
        assert made[-1].properties["INFERENCE_NUM_THREADS"] == 2
    assert [pipeline.properties["ATTENTION_BACKEND"] for pipeline in made] == ["PA", "SDPA"]
    assert not made[0].properties["scheduler_config"].enable_prefix_caching


def _stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)


# Peers that cannot run


def test_peer_names_are_parsed_or_refused(monkeypatch):
    assert parse("openvino, transformers,,openvino") == ["openvino", "transformers"]
    with pytest.raises(UserError, match=r"Unknown peer 'abacus'; choose among transformers, transformers-lookup, "):
        parse("transformers,abacus")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("llama.cpp", "xllamacpp", "xllamacpp"), ("openvino", "openvino_genai", "openvino-genai")],
)
def test_a_missing_package_of_the_only_peer_is_reported_before_loading(
    name, module, package, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(PROMPTS[0]))
    assert main(["bench", "--prompts", str(prompts), "--peers", name, "--target", str(tmp_path / "none")]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed == [f"spec_decode: The peer {name} needs the package {package}; run `pip install {package}`."]


def test_peers_with_missing_packages_are_skipped(monkeypatch):
    for module in ("xllamacpp", "openvino_genai"):
        monkeypatch.setitem(sys.modules, module, None)
    printed: list[str] = []
    pair, settings = tiny_pair(), Settings(max_new_tokens=4)
    with Peers(["llama.cpp", "openvino"], pair, settings, [[1]], printed.append) as peers:
        _, report = benched(pair, settings, peers, ["llama.cpp", "openvino"])
    assert not peers.running and [peer["name"] for peer in report["peers"]] == ["llama.cpp", "openvino"]
    assert sum("pip install" in line for line in printed) == 2
    text = told(report)
    assert "Without openvino: The peer openvino needs the package openvino-genai" in text
    assert "pip install xllamacpp" in text


@pytest.mark.parametrize("name", ["llama.cpp", "openvino"])
def test_engines_that_read_gguf_are_peers_of_the_embedded_target_only(name, monkeypatch):
    for module in ("xllamacpp", "openvino_genai"):
        _stand_in(monkeypatch, module, __spec__=SimpleNamespace(name=module))
    with pytest.raises(UserError, match="embedded target on the CPU only"):
        Peers([name], tiny_pair(), Settings(), [[1]])


def test_an_engine_that_fails_or_ends_raises_one_sentence(tmp_path):
    seat = Beside("transformers", Job(str(tmp_path / "nowhere")))
    try:
        with pytest.raises(ModelError, match=r"^The peer transformers failed: There is no directory .*nowhere"):
            seat.ask({"do": "tune", "counts": [1], "prompts": [[1]]})
        assert seat.cpu() > 0
        seat.process.kill()
        seat.process.wait()
        with pytest.raises(ModelError, match="ended with exit code -9"):
            seat.ask({"do": "run", "ids": [1], "tokens": 1})
    finally:
        seat.close()


def test_a_peer_that_fails_does_not_affect_others():
    pair, settings = tiny_pair(), Settings(max_new_tokens=4)
    with Peers([], pair, settings, []) as peers:
        broken, sound = FakeSeat(None), FakeSeat([1, 2, 3])
        peers.running |= {"broken": Peer("broken", broken, [1, 2], [[1]]), "sound": Peer("sound", sound, [1, 2], [[1]])}
        found, summary = benched(pair, settings, peers, ["broken", "sound"])
        report = peers.report()
    assert broken.closed and sound.closed
    assert {m.condition.engine for m in found if m.condition.peer} == {"sound"}
    assert report["broken"]["failed"] == "The peer broken failed: no more."
    assert "failed" not in report["sound"]
    assert "It ended early: The peer broken failed: no more." in told(summary)


# The report


def test_agreement_counts_identical_texts_and_the_mean_common_prefix():
    pair, settings = tiny_pair(), Settings(max_new_tokens=4)
    prompt = LocalSource(pair).race(Request(PROMPTS[0]["prompt"], settings)).ids
    ids = Transformers(Job(""), model=pair.target.model).run(prompt, 4).ids
    with Peers([], pair, settings, []) as peers:
        peers.running["twin"] = Peer("twin", FakeSeat(ids), [1, 2], [[1]])
        found, report = benched(pair, settings, peers, ["twin"])
    theirs = {m.prompt: m for m in found if m.condition.peer}
    lane = theirs["0"].lanes[PEER]
    assert (lane.tokens, lane.time_to_first_token, lane.tokens_per_second) == (4, 0.5, 3.0)
    own = {m.prompt: m.baseline.token_ids for m in found if not m.condition.peer}
    assert own["0"] == tuple(ids)
    common = [next((i for i in range(4) if own[name][i] != ids[i]), 4) for name in theirs]
    (twin,) = report["peers"]
    assert twin["agreement"] == {"texts": 3, "identical": common.count(4), "common_prefix": sum(common) / 3}
    text = told(report)
    assert "| twin | none | 2 | 3.0 |" in text
    assert "Tried, tokens/s: 1 thread 10.0, 2 threads 20.0." in text


def test_texts_of_peers_are_not_compared_when_sampling():
    pair, settings = tiny_pair(), Settings(max_new_tokens=4, temperature=0.7)
    with Peers([], pair, settings, []) as peers:
        peers.running["other"] = Peer("other", FakeSeat([1, 2, 3]), [1], [[1]])
        _, report = benched(pair, settings, peers, ["other"])
    assert report["peers"][0]["agreement"]["texts"] == 0
    assert "| – | – tokens |" in told(report)
