"""The kernels against the same arithmetic in plain NumPy, and one process against others: the same to the bit.

The reference adds in the order that `kernels.rows` defines, one operation at a time.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numba import njit
from transformers import PreTrainedModel

from spec_decode.cache import RollbackCache
from spec_decode.cpu import kernels
from spec_decode.cpu import llama as cpu
from spec_decode.cpu.assistant import FusedAssistant
from spec_decode.cpu.kernels import floats, rows
from spec_decode.cpu.kernels.sharing import team
from spec_decode.target import Target

F = np.float32
LENGTH = 45  # of the text, in tokens
TESTS = Path(__file__).parent


def fma(a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once to float32. In float64 the product is exact, and what their sum loses is known; rounding
    that sum again is wrong only where it fell midway between two float32."""
    x, y = np.float64(a) * np.float64(b), np.float64(c)
    total = x + y
    part = total - x
    lost = (x - (total - part)) + (y - part)
    near = total.astype(F)
    other = np.nextafter(near, np.where(total > near, F(np.inf), F(-np.inf)))
    midway = (near.astype(np.float64) + other) / 2 == total
    aside = np.where(lost > 0, np.maximum(near, other), np.minimum(near, other))
    return np.where(midway & (lost != 0), aside, near)


def added(x: np.ndarray, square: bool = False) -> Any:
    """In 32 lanes, which are then added half to half."""
    lanes = np.zeros(32, F)
    for begin in range(0, len(x), 32):
        part = x[begin : begin + 32]
        held = lanes[: len(part)]
        lanes[: len(part)] = fma(part, part, held) if square else held + part
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def exp(x: np.ndarray) -> np.ndarray:
    x = np.maximum(x, F(-87))
    n = np.floor(fma(x, F(1.4426950408889634), F(0.5)))
    r = fma(n, F(-1.42860682030941723e-6), fma(n, F(-0.693145751953125), x))
    p = F(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, F(c))
    return np.ldexp(fma(p, r * r, r) + F(1), n.astype(np.int32))


def softmax(x: np.ndarray, factor: Any) -> np.ndarray:
    away = (x - x.max()) * factor
    shares = np.where(away < -87, F(0), exp(away))
    return shares * (F(1) / added(shares))


def norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    factor = F(1) / np.sqrt(added(x, square=True) / F(len(x)) + F(epsilon))
    return x * factor * weight


def linear(x: np.ndarray, weights: kernels.Weights) -> np.ndarray:
    values, scales = weights.values[0], weights.scales[0]
    largest, most = max(np.abs(x).max(), F(1e-12)), F(min(8191, (2**31 - 1) // (127 * len(x))))
    rounded = np.floor(fma(x, most / largest, F(0.5))).astype(np.int64)
    return (values[:, : len(x)].astype(np.int64) @ rounded).astype(F) * (scales * (largest / most))


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = len(x) // 2
    first = fma(x[:half], cos[:half], -(x[half:] * sin[:half]))
    return np.concatenate([first, fma(x[half:], cos[half:], x[:half] * sin[half:])])


def attended(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scaling: Any) -> np.ndarray:
    scores = np.zeros((len(keys), 8), F)
    for i in range(0, len(q), 8):
        scores = fma(q[i : i + 8], keys[:, i : i + 8], scores)
    while scores.shape[1] > 1:
        scores = scores[:, ::2] + scores[:, 1::2]
    out = np.zeros_like(q)
    for weight, value in zip(softmax(scores[:, 0], scaling), values, strict=True):
        out = fma(weight, value, out)
    return out


def silu(gate: np.ndarray, up: np.ndarray, gelu: bool = False) -> np.ndarray:
    inner = F(1.5957691216) * fma(F(0.044715) * gate * gate, gate, gate) if gelu else gate
    return gate / (F(1) + exp(-np.maximum(inner, F(-80)))) * up


def numbers(weight: torch.Tensor) -> np.ndarray:
    held: np.ndarray = weight.detach().numpy()
    return held


def llama(model: PreTrainedModel, tokens: torch.Tensor) -> np.ndarray:
    """Logits `[n, V]` of a float32 Llama as `cpu.quantize` would have it."""
    config, base = model.config, model.model
    heads, group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    epsilon = config.rms_norm_eps
    size = config.hidden_size // heads
    scaling = F(base.layers[0].self_attn.scaling)
    cos, sin = kernels.rope_table(numbers(base.rotary_emb.inv_freq), len(tokens))
    xs = list(numbers(base.embed_tokens.weight)[tokens.numpy()])
    for layer in base.layers:
        own = {name: numbers(weight) for name, weight in layer.named_parameters()}
        held = {name: kernels.Weights([weight]) for name, weight in own.items() if weight.ndim == 2}
        keys: list[list[np.ndarray]] = [[] for _ in range(config.num_key_value_heads)]
        values: list[list[np.ndarray]] = [[] for _ in keys]
        for at, x in enumerate(xs):
            normed = norm(x, own["input_layernorm.weight"], epsilon)
            q, k, v = (linear(normed, held[f"self_attn.{name}_proj.weight"]).reshape(-1, size) for name in "qkv")
            for i in range(len(keys)):
                keys[i].append(rotated(k[i], cos[at], sin[at]))
                values[i].append(v[i])
            mixed = [
                attended(
                    rotated(q[i], cos[at], sin[at]), np.array(keys[i // group]), np.array(values[i // group]), scaling
                )
                for i in range(heads)
            ]
            x = x + linear(np.concatenate(mixed), held["self_attn.o_proj.weight"])
            normed = norm(x, own["post_attention_layernorm.weight"], epsilon)
            gate, up = (linear(normed, held[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            xs[at] = x + linear(silu(gate, up), held["mlp.down_proj.weight"])
    head = kernels.Weights([numbers(model.lm_head.weight)])
    return np.stack([linear(norm(x, numbers(base.norm.weight), epsilon), head) for x in xs])


def wide_llama() -> PreTrainedModel:
    """Few layers, as wide as the embedded target's."""
    return tiny.model("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2)


def text(n: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, tiny.VOCABULARY, n))


def results() -> dict[str, np.ndarray]:
    """What the kernels make of a text: a prefill and passes after it, softmax and noise, and a draft."""
    target, tokens = Target(cpu.quantize(wide_llama())), text(LENGTH)
    cache = target.new_cache(LENGTH)
    cuts = (0, LENGTH - 15, LENGTH - 14, LENGTH - 9, LENGTH)
    passes = [target.verify(tokens[begin:end], cache).logits for begin, end in pairwise(cuts)]
    logits = torch.cat(passes).numpy()
    keys = np.arange(6, dtype=np.uint32).reshape(3, 2)
    shares = kernels.softmax(np.tile(logits, (1, 11)), 0.7)
    found = {"logits": logits, "shares": shares, "noise": kernels.exponential(keys, np.arange(5000, dtype=np.uint32))}
    for temperature in (0.0, 0.7):
        found |= {f"{name} at {temperature}": value for name, value in draft(temperature).items()}
    return found


def draft(temperature: float) -> dict[str, np.ndarray]:
    """A draft of a tiny assistant over keys and values from a random generator."""
    target, model = tiny.gemma4("dense", ordered=True)
    assistant = FusedAssistant(model, target.get_input_embeddings(), target.get_input_embeddings().weight)
    rng = np.random.default_rng(0)
    cache = RollbackCache(target.config, LENGTH)
    cache.length = LENGTH
    for layer, head_size in zip(cache.layers[2:], (8, 16), strict=True):
        none = torch.zeros(1, 2, 0, head_size)
        layer.lazy_initialization(none, none)
        for states in (layer.keys, layer.values):
            states[:] = torch.from_numpy(rng.standard_normal(states.shape, F))
    assistant.begin(cache, {"sliding_attention": 2, "full_attention": 3}, tiny.WINDOW)
    hidden = torch.from_numpy(rng.standard_normal((1, 32), F))
    keys = np.arange(10, dtype=np.uint32).reshape(5, 2)
    made = assistant.draft(7, hidden, 5, None, temperature, keys)
    return {"ids": made.ids, "confidence": made.confidence, "top ids": made.top_ids, "top p": made.top_p}


def digests() -> str:
    found = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in results().items()}
    return "; ".join(f"{name}: {digest[:16]}" for name, digest in found.items())


def test_fma_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's instruction, without one, and in the reference: against fractions. Among the numbers are sums
    that float64 cannot hold and that lie next to the middle between two float32."""
    rng = np.random.default_rng(0)
    n = 3000
    a, b = (rng.standard_normal(n).astype(F) * F(2.0) ** rng.integers(-12, 12, n).astype(F) for _ in range(2))
    c = rng.standard_normal(n).astype(F) * F(2.0) ** rng.integers(-40, 40, n).astype(F)
    middles = np.arange(1, n // 3, dtype=F)
    a[: len(middles)], b[: len(middles)] = 1 + middles * F(2.0**-23), F(1 + 2.0**-23)
    c[: len(middles)] = np.where(middles % 2 == 1, F(2.0**-24), F(-(2.0**-24))) * rng.integers(1, 9, len(middles))
    a[-3:], b[-3:], c[-3:] = F(1 + 2.0**-12), F(1 + 2.0**-12), [F(2.0**-60), F(-(2.0**-60)), F(2.0**-80)]

    def exact(x: Any, y: Any, z: Any) -> Any:
        true = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = F(float(true))
        around = [near, np.nextafter(near, F(np.inf)), np.nextafter(near, F(-np.inf))]
        return min(around, key=lambda w: (abs(Fraction(float(w)) - true), int(w.view(np.uint32)) & 1))

    expected = np.array([exact(*xyz) for xyz in zip(a, b, c, strict=True)], F)
    assert (expected != (a.astype(np.float64) * b + c).astype(F)).any(), "rounding twice would do"
    assert np.array_equal(fma(a, b, c), expected)
    for instruction in (floats.has_fma(), False):
        monkeypatch.setattr(floats, "has_fma", lambda held=instruction: held)

        @njit
        def call(a: Any, b: Any, c: Any, out: Any) -> None:
            for i in range(a.shape[0]):
                out[i] = floats.fma(a[i], b[i], c[i])

        out = np.empty(n, F)
        call(a, b, c, out)
        assert np.array_equal(out.view(np.int32), expected.view(np.int32))
        special = np.array([np.inf, -np.inf, np.nan, 3e38, -0.0], F)
        call(special, np.ones(5, F), np.zeros(5, F), out[:5])
        assert np.array_equal(out[:5], [np.inf, -np.inf, np.nan, F(3e38), 0], equal_nan=True)


def test_a_pass_is_what_numpy_adds_up_in_that_order() -> None:
    found = results()
    assert np.array_equal(found["logits"], llama(wide_llama(), text(LENGTH)))
    repeated = np.tile(found["logits"], (1, 11))
    expected = np.stack([softmax(row, F(1) / F(0.7)) for row in repeated])
    assert np.array_equal(found["shares"], expected)


def test_the_gate_of_a_drafter_is_what_numpy_computes() -> None:
    @njit
    def call(gate: Any, up: Any, out: Any) -> None:
        rows.gate(gate, up, True, out)

    gate, up = (np.random.default_rng(seed).standard_normal(333).astype(F) * 5 for seed in (0, 1))
    out = np.empty_like(gate)
    call(gate, up, out)
    assert np.array_equal(out, silu(gate, up, gelu=True))


def test_rope_tables_are_rounded_once() -> None:
    """cos and sin of the float32 angle to the nearest float32, up to where the longest texts end."""
    frequencies = (1 / 100_000 ** (np.arange(16) / 16)).astype(F)
    for scaling in (1.0, 1.3):
        tables = kernels.rope_table(frequencies, 4096, scaling)
        angles = (np.arange(4096, dtype=F)[:, None] * frequencies).astype(np.float64)
        for table, function in zip(tables, (np.cos, np.sin), strict=True):
            expected = function(angles).astype(F) * F(scaling)
            assert table.dtype == F and np.array_equal(table[:, :16], table[:, 16:])
            assert (table[:, :16] != expected).mean() < 1e-4  # another library's float64 may round the other way
            np.testing.assert_allclose(table[:, :16], expected, rtol=2e-7, atol=1e-30)


def child(cache: Path, cores: int | None = None, **environment: str) -> subprocess.Popen[str]:
    """A process that prints `digests` and keeps what it compiles in `cache`."""
    pin = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}]); " if cores else ""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.Popen(
        [sys.executable, "-c", f"{pin}import test_kernel_bits as bits; print(bits.digests())"],
        env=os.environ | {"PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
def test_every_process_computes_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that compiles the kernels and the next, which loads them; one whose code is for any x86-64 (or what Numba
    calls generic elsewhere), without AVX and fused multiply-adds; one on a single core; and this one."""
    began = [child(tmp_path / "host"), child(tmp_path / "generic", NUMBA_CPU_NAME="generic")]
    said = [process.communicate(timeout=500)[0] for process in began]
    kept = {path.name for path in tmp_path.rglob("*.nb*")}
    assert kept, "nothing was kept, so nothing can be loaded"
    again = child(tmp_path / "host", 1 if hasattr(os, "sched_setaffinity") else None)
    said.append(again.communicate(timeout=500)[0])
    assert {path.name for path in tmp_path.rglob("*.nb*")} == kept, "the second process compiled anew"
    monkeypatch.setattr(team, "threads", 2)
    assert said == [digests() + "\n"] * 3
