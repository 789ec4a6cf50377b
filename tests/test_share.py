"""What leaves this machine: links, saved replays, share images, and the comparison with another run."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import types
import zlib
from base64 import b64encode, urlsafe_b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hostile
import pytest
from ui_fakes import FakeSource

from spec_decode import recording
from spec_decode.__main__ import main
from spec_decode.errors import UserError
from spec_decode.events import BASELINE, SPECULATIVE, Round, Token, Trace
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.share import compare, image, link, saved, unpack
from spec_decode.sources.replay import ReplaySource, read
from spec_decode.ui.form import settings_from_form
from spec_decode.ui.linked import form_values, wanted

SCENES = {scene.name: read(scene.path()) for scene in recording.scenes()}
REQUESTS = [
    Request("hello"),
    Request("Zeile 1\nZeile 2 – “ä” 🌈", Settings(draft_length=4, temperature=0.7, top_p=0.9, top_k=40, seed=7)),
    Request("p", Settings("rate", 0.5, rule="block", max_new_tokens=64), drafter="lookup", thinking=True),
    Request("p", Settings(rule="threshold", lenience=0.5, temperature=1.0)),
    Request("p", Settings(rule="rejection")),
]


def packed(data: object) -> str:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    raw = packer.compress(json.dumps(data).encode()) + packer.flush()
    return "race=1." + urlsafe_b64encode(raw).decode().rstrip("=")


# Links


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_a_link_comes_back_as_the_same_request_and_the_same_form(request_: Request) -> None:
    text = link.write(request_)
    assert re.fullmatch(r"race=1\.[A-Za-z0-9_-]+", text) and len(text) < 400
    for fragment in (text, f"#{text}", f"#{text}&run=1", f"#other=1&{text}"):
        assert link.read(fragment) == request_
    values = {"lenience": 0.3, "draft_length": 4} | form_values(request_)
    assert settings_from_form(values) == request_.settings
    assert link.write(request_, run=True) == text + "&run=1"


def test_a_link_holds_the_system_prompt_when_chosen_and_not_otherwise() -> None:
    request = Request("p", system="a secret")
    assert link.read(link.write(request)) == replace(request, system=None)
    assert link.read(link.write(request, system=True)) == request


LOCAL = ("/home/someone/my-drafter", "~/my-drafter/", "./my-drafter", "C:\\models\\my-drafter", "\\\\host\\my-drafter")


@pytest.mark.parametrize("name", LOCAL)
def test_a_link_holds_no_directory_of_this_machine(name: str) -> None:
    asked = link.read(link.write(Request("p", drafter=name)))
    assert asked is not None and asked.drafter == "my-drafter"
    assert link.offered(asked.drafter, ("lookup", name)) == name and link.offered(asked.drafter, ("lookup",)) is None
    assert wanted("#" + link.write(Request("p", drafter=name)), ("lookup", name), False) == (name, False)


def test_a_link_is_bounded() -> None:
    sentence = "The quick brown fox jumps over the lazy dog. "
    assert len(link.write(Request(sentence * 2000))) < link.LONGEST, "it is compressed"
    noise = "".join(chr(0x4E00 + (i * 7919) % 20000) for i in range(9000))
    with pytest.raises(link.LinkError, match="too long for a link"):
        link.write(Request(noise))
    for part in ({"prefix": "x"}, {"draft": (1,)}, {"history": (("a", "b"),)}):
        with pytest.raises(link.LinkError, match="only a trace keeps"):
            link.write(Request("p", **part))


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ("race=", "damaged"),
        ("race=1.", "damaged"),
        ("race=1.A", "damaged"),
        ("race=1.!!!!", "damaged"),
        (link.write(REQUESTS[1])[:-6], "damaged"),
        (link.write(REQUESTS[1]) + "AAAA", "damaged"),
        ("race=2.AAAA", "version 2"),
        ("race=1." + "A" * 9000, "too long"),
        (packed([1]), "damaged"),
        (packed({"prompt": "p", "settings": 3}), "damaged"),
        (packed({"prompt": "p", "owned": 1}), "'owned'"),
        (packed({"prompt": "p", "settings": {"synthetic_acceptance": 0.5}}), "'synthetic_acceptance'"),
        (packed({"prompt": "p", "settings": {"top_p": 7}}), "Top-p must be"),
        (packed({"prompt": ""}), "prompt is empty"),
        (packed({"prompt": "p", "drafter": ["x"]}), "Unknown drafter"),
        (packed({"prompt": "x" * 300_000}), "and no more are read"),
    ],
)
def test_a_bad_link_is_refused_in_one_sentence(fragment: str, said: str) -> None:
    with pytest.raises(link.LinkError, match=said) as refused:
        link.read(fragment)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 260


def test_no_link_is_no_error_and_deep_json_is_refused() -> None:
    assert link.read("") is link.read("#top") is link.read("#embrace=1") is None
    with pytest.raises(link.LinkError):
        link.parse("[" * 100_000)
    drafters = ("own", "lookup")
    assert wanted(link.write(Request("p", drafter="lookup", thinking=True)), drafters, False) == ("lookup", True)
    assert wanted(link.write(Request("p", drafter="/etc/x")), drafters, True) == ("own", False)
    assert wanted("race=1.!", drafters, True) == wanted(None, drafters, True) == ("own", True)


# Saved replays


def long_trace(tokens: int) -> Trace:
    """A trace of so many tokens a lane, with alternatives at every position and numbers in all their digits."""
    source, rounds = SCENES["code"], {}
    for lane in (BASELINE, SPECULATIVE):
        own, made, count = source.lane(lane), [], 0
        for i, r in enumerate(own * 2):
            shift = len(own) * (i // len(own))
            changed = [
                replace(
                    t, p=None if t.p is None else t.p * (1 - 1e-3 / (i + 3)), q=None if t.q is None else t.q / 1.0001
                )
                for t in r.tokens
            ]
            made.append(replace(r, index=r.index + shift, clock=r.clock + 3.1 * (i // len(own)), tokens=tuple(changed)))
            count += len(r.emitted)
            if count >= tokens:
                break
        rounds[lane] = made
    both = tuple(sorted(rounds[BASELINE] + rounds[SPECULATIVE], key=lambda r: r.clock))
    return replace(source, rounds=both)


def test_a_saved_replay_is_one_small_file_that_asks_no_network_and_comes_back() -> None:
    trace = long_trace(256)
    assert len(trace.token_ids(BASELINE)) >= 256
    page = saved.page(trace)
    assert len(page.encode()) < 300_000
    assert read_text(page) == trace
    outside = re.findall(r"""(?:src|href|url|import)\s*[=(]\s*["']?(?:https?:)?//[^"')\s]+""", page)
    assert outside == [] and "Plotly.react" not in page
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert "default-src 'none'" in policy and "connect-src" not in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert "<img" not in page and "onerror" not in page


def read_text(page: str) -> Trace:
    return Trace.from_json(unpack.trace_text(page.encode()))


def test_nothing_of_a_race_is_markup_in_its_replay() -> None:
    request = Request(f"</title>{hostile.STRIKE}").to_dict()
    token = Token(1, hostile.STRIKE, "target")
    rounds = tuple(Round(lane, 0, (token,), 0, 0.0, 0.1, 0.1, 0.1) for lane in (BASELINE, SPECULATIVE))
    trace = Trace(request, {"target": hostile.STRIKE, "drafter": "x"}, {"processor": hostile.STRIKE}, 1, rounds)
    page = saved.page(trace)
    assert page.count("<img") == 0 and page.count("<script") == saved.shell().count("<script")
    assert page.count("</title>") == 1 and read_text(page) == trace
    card = image.svg(image.words(trace))
    assert "<img" not in card and ElementTree.fromstring(card).tag.endswith("svg")


def test_what_is_shared_holds_no_path_and_no_system_prompt(tmp_path: Path) -> None:
    race = FakeSource().race(Request("p", system="a secret", settings=Settings(max_new_tokens=4)))
    list(race.steps())
    trace = replace(race.trace, pair={**race.trace.pair, "target": str(tmp_path)})
    file = tmp_path / "t.json"
    file.write_text(trace.to_json(), encoding="utf-8")
    out = [str(tmp_path / name) for name in ("o.html", "o.svg", "o.json")]
    flags = ["--html", out[0], "--card", out[1], "--trace", out[2]]
    assert main(["replay", str(file), *flags]) == 0
    for name in out:
        trace = read(name) if not name.endswith(".svg") else None  # type: ignore[assignment]
        text = Path(name).read_text(encoding="utf-8") + (trace.to_json() if trace else "")
        assert "a secret" not in text and str(tmp_path) not in text
    assert main(["replay", str(file), *flags, "--keep-system"]) == 0
    assert read(out[0]).request["system"] == "a secret" and str(tmp_path) not in read(out[0]).to_json()


def test_a_file_unpacks_to_no_more_than_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(unpack, "LARGEST", 10_000)
    for name, data in {
        "bomb.gz": gzip.compress(b" " * 20_000),
        "long.json": b" " * 20_000,
        "half.gz": gzip.compress(b"{}")[:-4],
        "page.html": b"<html></html>",
        "bad.html": f'{unpack.OPEN}{{"spec_decode_replay": 1, "trace": 3}}{unpack.CLOSE}'.encode(),
        "bomb.html": (
            unpack.OPEN
            + json.dumps({"spec_decode_replay": 1, "trace": b64encode(gzip.compress(b" " * 20_000)).decode()})
            + unpack.CLOSE
        ).encode(),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="cannot be replayed") as refused:
            read(tmp_path / name)
        assert "\n" not in str(refused.value)


def accepted(data: bytes) -> bool:
    """Whether the reader takes this file; every refusal is one of the two errors that it promises."""
    try:
        ReplaySource(Trace.from_json(unpack.trace_text(data)))
    except (ValueError, UserError):
        return False
    return True


def test_hostile_files_are_refused_by_the_reader() -> None:
    verdicts = [accepted(data) for data in hostile.mutated(50, seed=1)]
    assert 5 < sum(verdicts) < 45, "both kinds are among them"


@pytest.mark.long
def test_a_thousand_hostile_files_are_refused_by_the_reader() -> None:
    assert 100 < sum(accepted(data) for data in hostile.mutated(1000, seed=2)) < 900


# Comparison, image, command


def test_the_comparison_tells_what_differs() -> None:
    trace = SCENES["code"]
    tokens = len(trace.token_ids(SPECULATIVE))
    rows = {row.name: row for row in compare.compare(trace, trace)}
    assert all(row.same in (True, None) for row in rows.values())
    assert rows["speculative text"].here == f"{tokens} tokens, the same" and rows["speedup"].same is None
    first = trace.lane(SPECULATIVE)[4]
    other = replace(first, tokens=tuple(replace(t, id=t.id + 1) for t in first.tokens))
    before = sum(len(r.emitted) for r in trace.lane(SPECULATIVE)[:4])
    pair = {**trace.pair, "revisions": {"target": {"revision": "abc"}}}
    here = replace(trace, rounds=tuple(other if r is first else r for r in trace.rounds), pair=pair, versions={})
    rows = {row.name: row for row in compare.compare(trace, here)}
    assert rows["speculative text"] == compare.Row(
        "speculative text", f"{tokens} tokens", f"{tokens} tokens, differs from token {before + 1}", False
    )
    assert rows["baseline text"].same and rows["target revision"].same is False
    assert rows["Spec Decode"].same is None and rows["drafter revision"].same is None
    asked = replace(trace, request={**trace.request, "prompt": "another"})
    assert {row.name for row in compare.compare(trace, asked) if row.same is False} == {"prompt and settings"}
    assert compare.table(list(rows.values())).splitlines()[2].startswith("≠ speculative text")


def test_the_share_image_has_the_numbers_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = recording.scenes()[0].path(), tmp_path / "card.svg"
    assert main(["replay", str(path), "--card", str(out), "--json", "--link", "http://h/#x"]) == 0
    report = json.loads(capsys.readouterr().out)
    said = "".join(ElementTree.parse(out).getroot().itertext())
    low, high = report["speedup_interval"]
    for text in (
        f"{report['speedup']:.2f}×",
        f"{low:.2f}–{high:.2f}×",
        "SmolLM2-135M-Instruct + mtp+lookup",
        "AMD EPYC",
        report["date"][:10],
        f"{report['speculative']['tokens_per_second']:.1f} tokens/s",
        "identical texts",
    ):
        assert text in said
    address, fragment = report["link"].split("#")
    assert address == "http://h/" and link.read(fragment) == recording.scenes()[0].request


def test_the_command_runs_a_recorded_race_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FakeSource()
    loader, local = types.ModuleType("pair"), types.ModuleType("local")  # the real ones load PyTorch
    monkeypatch.setattr(loader, "load_pair", lambda **_: None, raising=False)
    monkeypatch.setattr(local, "LocalSource", lambda *_, **__: source, raising=False)
    monkeypatch.setitem(sys.modules, "spec_decode.loading.pair", loader)
    monkeypatch.setitem(sys.modules, "spec_decode.sources.local", local)
    race = FakeSource().race(Request("p", Settings(max_new_tokens=20), drafter="lookup"))
    list(race.steps())
    file = tmp_path / "t.html"
    file.write_text(saved.page(race.trace), encoding="utf-8")
    assert main(["replay", str(file), "--rerun"]) == 0
    assert "= speculative text" in capsys.readouterr().out
    source.hit = 0.1
    assert main(["replay", str(file), "--rerun", "--json"]) == 0
    said: Any = {row["name"]: row for row in json.loads(capsys.readouterr().out)["comparison"]}
    assert said["speculative text"]["same"] and not said["acceptance rate"]["same"]
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert main(["replay", str(file), "--html", str(tmp_path / "no" / "x.html")]) == 2
