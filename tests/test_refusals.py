"""What cannot be raced, read, written or trained is refused in one sentence, before weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from test_models import PROMPT, tokenizer

import app
from spec_decode.__main__ import main
from spec_decode.errors import ModelError, PromptError, UserError
from spec_decode.loading import checkpoints
from spec_decode.loading.pair import load_pair
from spec_decode.loading.placement import find_device
from spec_decode.loading.rollback import check_rollback
from spec_decode.request import Request
from spec_decode.settings import Settings
from spec_decode.sources.local import Race
from spec_decode.target import Target
from spec_decode.text import encode_chat

CPU = torch.device("cpu")
SMALL = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 32}
# A configuration of each family, and a part of the message
FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("Mamba", {}, "linear_attention layers, whose state cannot roll back"),
    ("Mamba2", {}, "linear_attention layers, whose state cannot roll back"),
    ("Rwkv", {"vocab_size": 96, "hidden_size": 32}, "recurrent layers, whose state cannot roll back"),
    ("RecurrentGemma", SMALL, "layers, whose state cannot roll back"),  # "linear_attention" from transformers 5.24 on
    ("Jamba", {**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1}, "linear_attention layers"),
    ("Bamba", {**HEADS, "attn_layer_indices": [1], "mamba_n_heads": 4}, "linear_attention layers"),
    ("FalconH1", HEADS, "hybrid layers"),
    ("Qwen3Next", HEADS, "linear_attention layers"),
    ("Lfm2", {**HEADS, "layer_types": ["conv", "full_attention"]}, "conv layers"),
    ("Llama4Text", HEADS, "chunked_attention layers"),
    ("T5", {}, "an encoder and a decoder"),
    ("Bart", {}, "an encoder and a decoder"),
    ("Whisper", {}, "an encoder and a decoder"),
    ("ViT", {}, "vit is no causal language model"),
    ("CLIP", {}, "clip is no causal language model"),
    ("Bert", SMALL, "an encoder, which reads text in both directions"),
    ("Roberta", SMALL, "an encoder, which reads text in both directions"),
]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command wrote to standard error, which is one line."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return str(line)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("llama")
    tiny.model("llama").save_pretrained(home)
    tokenizer().save_pretrained(home)
    return home


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(checkpoints, "_from_pretrained", never)


# Models


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(("family", "numbers", "reason"), FAMILIES, ids=[family for family, _, _ in FAMILIES])
def test_a_model_that_cannot_be_raced_is_refused_by_its_configuration(
    family: str,
    numbers: dict[str, Any],
    reason: str,
    llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a target and as a drafter, with no weights there yet."""
    getattr(transformers, f"{family}Config")(**numbers).save_pretrained(tmp_path)
    race = ["race", "--prompt", PROMPT, "--device", "cpu"]
    for roles in (["--target", str(tmp_path)], ["--target", str(llama_dir), "--drafter", str(tmp_path)]):
        assert main([*race, *roles]) == 1
        line = one_line(capsys)
        assert line.startswith(f"spec_decode: {tmp_path} cannot be used: ") and reason in line


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_drafter_is_no_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.gemma4("dense")[1].config.save_pretrained(tmp_path)
    assert main(["race", "--prompt", PROMPT, "--device", "cpu", "--target", str(tmp_path)]) == 1
    assert "is an MTP drafter and writes nothing alone; name it with --drafter" in one_line(capsys)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_a_model_that_rolls_back_is_accepted(kind: str) -> None:
    check_rollback(Target(tiny.model(kind)), "x")


def test_a_model_with_a_state_outside_its_cache_is_refused() -> None:
    """By its predictions after a rollback, where its configuration does not show it."""
    model = tiny.model("llama")
    state = torch.zeros(model.config.hidden_size)

    def remember(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Adds to every position the decayed sum of all inputs so far, which no rollback undoes."""
        seen = []
        for row in args[0][0]:
            state.mul_(0.9).add_(row)
            seen.append(state.clone())
        return (args[0] + torch.stack(seen)[None], *args[1:])

    target = Target(model)
    check_rollback(target, "x")
    model.model.norm.register_forward_pre_hook(remember)
    with pytest.raises(ModelError, match="after a rollback it predicts something else"):
        check_rollback(target, "x")


def test_a_model_whose_pass_fails_is_refused(tmp_path: Path) -> None:
    """GPT-Neo has a fixed attention mask, which is shorter here than the cache."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256}
    config = transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]])
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be used: a pass over a cache of fixed size fails \(The size of"):
        load_pair(str(tmp_path), "lookup", device="cpu")


@pytest.mark.parametrize(
    ("name", "available", "sentence"),
    [
        ("meta", True, "Unknown device 'meta'; choose auto, cpu, cuda or mps"),
        ("xpu", True, "Unknown device 'xpu'"),
        ("cuda:2", True, "There is no cuda:2: this machine has 2 CUDA devices"),
        ("cuda", False, "No CUDA device is available"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(
    name: str, available: bool, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match=sentence):
        find_device(name)
    assert find_device("cpu") == CPU


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943\nsize 12345\n"


@pytest.mark.parametrize(
    ("file", "content", "lost", "sentence"),
    [
        (
            "model.safetensors",
            POINTER,
            None,
            "holds Git LFS pointers instead of the files themselves (model.safetensors)",
        ),
        ("tokenizer.json", POINTER, None, "fetch them with `git lfs pull`"),
        ("config.json", POINTER, None, "Git LFS pointers instead of the files themselves (config.json)"),
        ("adapter_config.json", b"{}", "config.json", "holds an adapter alone; merge it into its base model"),
        ("model.gguf", b"GGUF", "model.safetensors", "holds its weights as model.gguf; only safetensors"),
        ("pytorch_model.bin", b"PK", "model.safetensors", "holds its weights as pytorch_model.bin; only safetensors"),
        ("config.json", b"[1, 2]", None, "has no config.json that can be used"),
        ("config.json", b"null", None, "has no config.json that can be used"),
        ("config.json", b"", None, "has no config.json that can be used"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_directory_without_a_usable_checkpoint_is_refused(
    file: str, content: bytes, lost: str | None, sentence: str, llama_dir: Path, tmp_path: Path
) -> None:
    home = tmp_path / "model"
    shutil.copytree(llama_dir, home)
    if lost:
        (home / lost).unlink()
    (home / file).write_bytes(content)
    for pair in ((str(home), "lookup"), (str(llama_dir), str(home))):
        with pytest.raises(ModelError) as caught:
            load_pair(*pair, device="cpu")
        message = str(caught.value)
        assert message.startswith(f"{home} ") and sentence in message and "\n" not in message


def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf is a file; name the directory of a safetensors checkpoint"):
        load_pair(str(tmp_path / "model.gguf"), device="cpu")
    with pytest.raises(ModelError, match=r"cannot be read: File name too long\.$"):
        load_pair("x" * 5000, device="cpu")


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"vocab_size": -5}, "has a config.json of which no llama model can be made"),
        ({"hidden_act": "nothing"}, "has a config.json of which no llama model can be made"),
        ({"rope_parameters": {"rope_type": "no"}}, "has a config.json of which no llama model can be made"),
        ({"max_position_embeddings": 8}, "has a context of 8 tokens; a race takes at least 32"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_configuration_that_makes_no_model_is_refused(
    numbers: dict[str, Any], sentence: str, llama_dir: Path, tmp_path: Path
) -> None:
    config = json.loads((llama_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **numbers}))
    with pytest.raises(ModelError) as caught:
        load_pair(str(tmp_path), "lookup", device="cpu")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_of_a_larger_model_is_refused_where_it_shows() -> None:
    pair: Any = tiny.PairOf(Target(tiny.model("llama", vocab_size=64)), SimpleNamespace(name="none"))
    assert Race(pair, Request("ABC", Settings(max_new_tokens=4))).ids == [33, 34, 35]
    with pytest.raises(PromptError, match="makes token 65 of this prompt, and the target knows 64 tokens"):
        Race(pair, Request("Aa", Settings(max_new_tokens=4)))


@pytest.mark.parametrize(
    "template", ["{% for x in %}", "{{ raise_exception('No system role') }}", "{{ messages[5].a }}"]
)
def test_a_chat_template_that_fails_says_why(template: str) -> None:
    with pytest.raises(UserError, match=r"chat template of this target does not take this conversation: .*\.$"):
        encode_chat(tokenizer(template), "w9", "w8")


# The command line


@pytest.mark.parametrize("size", ["nan", "inf", "-inf", "-3", "0", "1e400", "plenty"])
def test_memory_is_a_number_above_0(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", f"--memory={size}"]) == 2
    assert one_line(capsys) == f"spec_decode: --memory takes a number of gigabytes above 0, not '{size}'."


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"id": 1, "category": "x", "prompt": "café"}'.encode("latin-1"), "is not UTF-8 text"),
        ('{"id": 1, "category": "x", "prompt": "tea"}'.encode("utf-16"), "is not UTF-8 text"),
        (b'{"id": 1, "category": "x", "prompt": " "}', "line 1: the prompt is empty or no text"),
        (b'{"id": 1, "category": "x", "prompt": null}', "line 1: the prompt is empty or no text"),
        (b'{"id": 1, "category": "x", "prompt": "\\ud800"}', "line 1: the prompt is empty or no text"),
    ],
)
def test_a_file_of_prompts_is_read_before_the_model(
    content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    # the target is not there either
    assert main(["bench", "--prompts", str(tmp_path / "prompts.jsonl"), "--target", str(tmp_path / "none")]) == 2
    assert sentence in one_line(capsys)


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    from spec_decode.bench.datasets import read_prompts

    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 1, "category": "x", "prompt": "tea"}')
    assert read_prompts(tmp_path / "a.jsonl") == [{"id": "1", "category": "x", "prompt": "tea"}]


def test_what_cannot_be_written_is_refused_before_the_race(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    race = ["race", "--prompt", "x", "--target", str(tmp_path / "none"), "--trace"]
    for path, sentence in (
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "t.json", "its folder does not exist"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        assert main([*race, str(path)]) == 2
        assert one_line(capsys) == f"spec_decode: Cannot write {path}: {sentence}."
    assert main([*race, str(tmp_path / "t.json")]) == 1
    assert "There is no directory" in one_line(capsys) and not (tmp_path / "t.json").exists()


def test_a_trace_that_cannot_be_written_after_the_race_is_one_line(
    llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--target", str(llama_dir), "--device", "cpu", "--max-new-tokens", "2", "--trace", "/dev/full"]
    assert main(["race", "--prompt", PROMPT, *options]) == 1
    printed = capsys.readouterr()
    assert "tokens/s" in printed.out and "No space left on device" in printed.err.splitlines()[-1]


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused_before_the_model_is_looked_for(
    prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["race", "--prompt", prompt, "--target", str(tmp_path / "none")]) == 2
    assert one_line(capsys) == "spec_decode: The prompt is empty; type something for the model to answer."


@pytest.mark.parametrize("host", ["192.0.2.1", "999.1.1.1", "x" * 300])
def test_a_host_that_cannot_be_bound_says_so(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    """192.0.2.0/24 is reserved for documentation (RFC 5737)."""
    assert app.main(["--host", host]) == 1
    line = one_line(capsys)
    assert line.startswith(f"app.py: cannot serve on {host}: ") and "port" not in line
    assert line.endswith("; choose an address of this machine with --host.")


# Training


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--length 96 --answer 24 48", "Texts of 96 tokens are too short: a user turn has up to 150"),
        ("--length 40 --answer 4 16 --turn 40", "Texts of 40 tokens are too short: a user turn has up to 40"),
        ("--length 1000", "longer than the target's context of 512"),
        ("--answer 48 24", "The range of an answer's tokens cannot be 48 to 24"),
        ("--slots 0", "at least one slot"),
        ("--tokens -5", "at least one token, not -5"),
        ("--layers 99", "The target's layers are 0…3"),
        ("--centroids 7", "96 tokens cannot be split into 7 equal lists"),
        ("--chosen 5000", "A step scores 1…12 lists, not 5000"),
        ("--intermediate 0", "An MLP cannot be 0 wide"),
        ("--steps 0", "at least one step"),
        ("--texts 0", "at least one text"),
        ("--rate nan", "The learning rate must be above 0, not nan"),
        ("--unroll 50", "must be from 1 to 8, not 50"),
        ("--temperatures nan", "Temperatures of answers must be from 0 to 5"),
        ("--user-turns 5", "The share of user turns must be from 0 to 1"),
        ("--seed -1", "The seed must be from 0"),
        ("--device meta", "Unknown device 'meta'"),
        ("--init nowhere", "nowhere holds no drafter to begin with"),
        ("--also nowhere", "nowhere holds no texts to train on"),
        ("--data nowhere", "nowhere cannot be read as JSON Lines"),
        ("--held-out nowhere", "nowhere cannot be read as JSON Lines"),
        ("--only train", "work holds no texts to train on"),
    ],
)
def test_settings_of_training_are_refused_before_anything_is_written(
    options: str,
    sentence: str,
    llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = ["--target", str(llama_dir), "--out", "out", "--work-dir", "work", "--centroids", "12", "--chosen", "4"]
    assert main(["train-drafter", *usual, *options.split()]) == (1 if "--device" in options else 2)
    assert sentence in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4), "has no single MLP width"),
        (transformers.T5Config(), "an encoder and a decoder"),
        (transformers.DeepseekV3Config(vocab_size=96), "keys and values are of unequal size"),
        (tiny.gemma4("dense")[0].config, "cannot be made for a target of the kind gemma4_text"),
    ],
    ids=["gpt2", "t5", "deepseek_v3", "gemma4"],
)
def test_a_target_that_no_drafter_can_be_made_for(
    config: Any,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, work = tmp_path / "target", tmp_path / "work"
    config.save_pretrained(home)
    tokenizer().save_pretrained(home)
    monkeypatch.chdir(tmp_path)
    options = ["--target", str(home), "--out", "out", "--work-dir", str(work), "--centroids", "12", "--chosen", "4"]
    assert main(["train-drafter", *options]) in (1, 2)
    assert sentence in one_line(capsys)
    assert not work.exists() and not (tmp_path / "out").exists()
