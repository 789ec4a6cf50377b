"""CPU kernels: what they compute, and that neither other rows nor the number of threads change a bit of it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from spec_decode import noise, noise_hash
from spec_decode.cpu import kernels
from spec_decode.cpu import llama as cpu
from spec_decode.cpu.kernels import floats, passes, processor, products, rows, sharing
from spec_decode.cpu.kernels.noise import noise_keys
from spec_decode.cpu.kernels.sharing import team
from spec_decode.loading import placement
from spec_decode.noise import exponential
from spec_decode.target import Target


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(rows=st.integers(1, 15), inputs=st.integers(1, 200), outputs=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_linear_is_a_product_and_rows_are_their_own(rows: int, inputs: int, outputs: int, seed: int) -> None:
    x, w = array(rows, inputs, seed=seed), array(outputs, inputs, seed=seed + 1)
    weights = kernels.Weights([w])
    y = kernels.linear(x, weights, threads=2)
    held = weights.values[0, :, :inputs] * weights.scales[0][:, None].astype(np.float64)
    # Half a step for each product of a row, at most.
    bound = np.abs(held).sum(1) * np.abs(x).max(1)[:, None] / (2 * kernels.levels(inputs)) + 1e-5
    assert (np.abs(y - x.astype(np.float64) @ held.T) <= 1.01 * bound).all()
    for i in range(rows):
        assert np.array_equal(kernels.linear(x[i : i + 1], weights, threads=1)[0], y[i])


def test_weights_lose_half_a_step_at_most() -> None:
    w = array(30, 50)
    weights = kernels.Weights([w, 3 * w])
    for i, scale in enumerate((1, 3)):
        error = np.abs(weights.values[i, :, :50] * weights.scales[i][:, None] - scale * w)
        assert (error <= 0.501 * weights.scales[i][:, None]).all()
    assert not weights.values[:, :, 50:].any()


@pytest.mark.parametrize("width", [64, 1536, 2048, 8192, 32768])
def test_the_largest_sums_fit(width: int) -> None:
    """Every product as large as it can be: exact, where 32 bits would overflow with one level more."""
    weights = kernels.Weights([np.stack([np.ones(width, np.float32), -np.ones(width, np.float32)])])
    y = kernels.linear(np.full((1, width), 5, np.float32), weights, threads=1)
    np.testing.assert_allclose(y[0], [5 * width, -5 * width], rtol=1e-5)
    assert 127 * width * kernels.levels(width) < 2**31


def test_a_row_of_zeros_gives_zeros() -> None:
    x = np.stack([np.zeros(64, np.float32), np.ones(64, np.float32)])
    assert not kernels.linear(x, kernels.Weights([array(8, 64)]), threads=1)[0].any()


@pytest.mark.parametrize("rows", range(1, products.MAX_ROWS + 1))
@pytest.mark.parametrize("fast", [True, False])
def test_dots_are_exact_with_and_without_avx2(rows: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_avx2", lambda: fast and processor.has_avx2())
    dots = products._dots(rows)

    @njit
    def call(w: Any, row: Any, x: Any, first: Any, sums: Any, slot: Any) -> None:
        dots(w, row, x, first, sums, slot)

    generator = np.random.default_rng(rows)
    w = generator.integers(-127, 128, (3, 192)).astype(np.int8)
    x = generator.integers(-8191, 8192, (rows + 2, 192)).astype(np.int16)
    sums = np.zeros((products.LANES, products.MAX_ROWS, products.LANES), np.int32)
    call(w, 1, x, 2, sums, 5)
    assert sums[5, :rows].sum(-1).tolist() == (x[2:].astype(np.int64) @ w[1].astype(np.int64)).tolist()
    assert not sums[5, rows:].any() and not sums[np.arange(products.LANES) != 5].any()


def test_exp_is_near() -> None:
    @njit
    def call(x: Any, out: Any) -> None:
        for i in range(len(x)):
            out[i] = floats.exp(x[i])

    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    out = np.empty_like(x)
    call(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=1e-6)


def test_softmax_is_near_whatever_the_rows_hold() -> None:
    x = array(7, 1003, seed=2) * 9
    x[1, ::3] = -np.inf
    x[2] = 88
    x[3, 500:] -= 1e30
    for temperature in (0.3, 1.0, 4.0):
        y = kernels.softmax(x, temperature)
        expected = torch.softmax(torch.from_numpy(x).double() / temperature, -1).numpy()
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-30)
        assert (y[1, ::3] == 0).all()
        for i in range(len(x)):
            assert np.array_equal(kernels.softmax(x[i : i + 1], temperature)[0], y[i])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_softmax_of_what_is_no_distribution_is_nan_throughout(bad: float) -> None:
    x = array(3, 301)
    x[1, 77] = bad
    y = kernels.softmax(x, 1.0)
    assert np.isnan(y[1]).all() and not np.isnan(y[[0, 2]]).any()
    assert np.isnan(kernels.softmax(np.full((1, 9), -np.inf, np.float32), 1.0)).all()


@given(width=st.integers(1, 600), few=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_argmax_and_top_are_the_first_of_the_largest(width: int, few: int, seed: int) -> None:
    """With many ties, zeros of both signs and −inf."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-few, few + 1, (5, width)).astype(np.float32) / 3
    x[3, : width // 2] = -np.inf
    x[4] = np.where(rng.random(width) < 0.5, np.float32(-0.0), np.float32(0.0))
    assert kernels.argmax(x).tolist() == x.argmax(1).tolist()
    for count in (1, 5, 70):
        ids, values = kernels.top(x, count)
        order, held = np.argsort(-x, axis=1, kind="stable")[:, :count], min(count, width)
        assert ids.dtype == np.int64 and values.dtype == np.float32 and ids.shape == values.shape == (5, count)
        assert np.array_equal(ids[:, :held], order)
        assert np.array_equal(values[:, :held], np.take_along_axis(x, order, 1))
        assert (ids[:, held:] == -1).all() and (values[:, held:] == -np.inf).all()


@pytest.mark.parametrize("kind", ["ascending", "descending", "constant", "-inf", "random"])
def test_top_of_a_vocabulary(kind: str) -> None:
    n = 49_152
    x = {
        "ascending": np.arange(n, dtype=np.float32),
        "descending": -np.arange(n, dtype=np.float32),
        "constant": np.ones(n, np.float32),
        "-inf": np.full(n, -np.inf, np.float32),
        "random": array(n),
    }[kind]
    ids, values = kernels.top(x[None], 5)
    assert ids[0].tolist() == np.argsort(-x, kind="stable")[:5].tolist()
    assert np.array_equal(values[0], x[ids[0]])


def test_top_and_argmax_of_nan_stay_inside_the_row() -> None:
    x = array(4, 300)
    x[0] = np.nan
    x[1, ::7] = -np.nan
    x[2, 5] = np.inf
    x[3] = np.array([0xFFFFFFFF], np.uint32).view(np.float32)  # of all bits the lowest in order
    for ids in (kernels.top(x, 5)[0], kernels.argmax(x)):
        assert (ids >= 0).all() and (ids < 300).all()
    assert all(len(set(row)) == 5 for row in kernels.top(x, 5)[0].tolist())
    with pytest.raises(ValueError, match="at least 1"):
        kernels.top(x, 0)


@given(width=st.integers(1, 300), few=st.integers(1, 50), share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_lists_that_are_chosen_are_the_largest(width: int, few: int, share: float, seed: int) -> None:
    """In ascending order; of equal scores the first."""
    x = np.random.default_rng(seed).integers(-few, few + 1, width).astype(np.float32) / 3
    n = round(share * width)
    places = np.full(n, -1)
    largest(x, places)
    assert places.tolist() == sorted(np.argsort(-x, kind="stable")[:n].tolist())


@njit
def largest(x: Any, places: Any) -> None:
    rows.largest(x, places)


@pytest.mark.parametrize("start", [None, [0], [70_000], [0, 2, 69_999]], ids=str)
def test_noise_is_what_torch_computes_elsewhere(start: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's noise is the same bits alone and among others, and near that of an accelerator's code."""
    places = torch.tensor([0, 3, 70_000])
    few = torch.tensor([0, 17, 49_999, 3], dtype=torch.int32)
    starts = None if start is None else torch.tensor(start)
    ours = exponential(2**40 + 5, places, 50_000, 1, starts)
    assert torch.equal(noise._exponential_at(2**40 + 5, places, few, 1, starts), ours[:, few.long()])
    monkeypatch.setattr(noise, "_compiled", lambda x: False)
    torch.testing.assert_close(exponential(2**40 + 5, places, 50_000, 1, starts), ours, rtol=1e-6, atol=0)


def test_the_hash_is_the_same_in_python_numpy_and_numba() -> None:
    low, high = noise_hash.words(2**63 + 12345, 2)
    assert noise_hash.words(2**63 + 12345, 1) != (low, high) != noise_hash.words(12345, 2)

    @njit
    def compiled(low: Any, high: Any, position: Any, start: Any) -> Any:
        return noise_keys(low, high, position, start)

    for start in (-1, 0, 7, 2**20):
        for position in (0, 1, 5, 2**20 + 3):
            words = (low, high) if start < 0 else noise_hash.start_words(low, high, start)
            keys = noise_hash.position_keys(*words, position)
            assert all(0 <= key < 2**32 for key in (*words, *keys))
            assert compiled(np.uint32(low), np.uint32(high), position, start) == keys
            arrays = noise_hash.position_keys(*words, np.array([position], np.uint32))
            assert all(a.dtype == np.uint32 for a in arrays) and tuple(int(a[0]) for a in arrays) == keys


def test_the_hash_has_not_changed() -> None:
    """The text of a seed stays what it was in earlier versions."""
    assert [noise_hash.mix(x) for x in (0, 1, 2, 0xFFFFFFFF)] == [0, 1753845952, 3507691905, 1734902346]
    words = [noise_hash.words(seed, stream) for seed, stream in ((0, 0), (7, 3), (2**40 + 5, 1))]
    assert words == [(0, 33350994), (2492178918, 1437072752), (1548080446, 2107808028)]
    keys = kernels.keys(*words[2], np.array([0, 9, 70_000]), np.array([4]))
    assert keys.tolist() == [[3244393361, 1925710025], [3530607653, 501370138], [1201271705, 3938600505]]


@pytest.mark.parametrize("counted", [-1, 1])
def test_a_wrong_number_of_phases_is_noticed(counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one too few, work would be left undone; with one too many, the function is as wrong."""
    monkeypatch.setattr(team, "threads", 1)
    monkeypatch.setattr(passes, "LINEAR_PHASES", passes.LINEAR_PHASES + counted)
    with pytest.raises(AssertionError, match="_linear has 2 phases, not"):
        kernels.linear(array(2, 64), kernels.Weights([array(8, 64)]))
    phases = passes.llama_phases
    monkeypatch.setattr(passes, "llama_phases", lambda layers: phases(layers) + counted)
    target = Target(cpu.quantize(tiny.model("llama")))
    with pytest.raises(AssertionError, match=f"_llama has {phases(4)} phases, not"):
        target.verify(torch.arange(3), target.new_cache(64))


def test_a_phase_without_tickets_has_no_chunks() -> None:
    tickets = np.zeros(2 * sharing.TICKETS, np.int64)[: sharing.TICKETS]
    assert sharing.next_chunk(tickets, 1, 3) == -1
    assert not tickets.base[sharing.TICKETS :].any()


def test_one_compiled_version_serves_every_pass() -> None:
    """Of every length, with and without logits: another type of any argument would compile the kernel once more, in the
    middle of a race."""
    target = Target(cpu.quantize(tiny.model("llama")))
    cache = target.new_cache(64)
    target.verify(torch.arange(3), cache)
    before = len(passes._llama.overloads)
    for n in (1, 2, 7):
        target.verify(torch.arange(n), cache, hidden=True)
    target.model.model(input_ids=torch.arange(4)[None])
    assert len(passes._llama.overloads) == before


@pytest.mark.parametrize("inside", [0, 1, 6])
def test_a_helper_that_comes_late_finds_the_work_done(inside: int) -> None:
    """However many threads begin, and though one begins when all is over, the result is the same."""
    x, w = array(5, 96), array(77, 96)
    weights = kernels.Weights([w])
    expected = kernels.linear(x, weights, threads=1)
    tickets = np.zeros(passes.LINEAR_PHASES * sharing.TICKETS, np.int64)
    out, quantized = np.empty((5, 77), np.float32), kernels.quantized(5, 128)
    arguments = (tickets, x, weights.single, quantized, out)
    helpers = [threading.Thread(target=passes._linear, args=arguments) for _ in range(inside)]
    for helper in helpers:
        helper.start()
    passes._linear(*arguments)
    assert np.array_equal(out, expected)
    quantized.values[:] = 0  # no thread reads it any more
    passes._linear(*arguments)
    for helper in helpers:
        helper.join()
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("start", [1, 2, 3, 29])
def test_the_llama_kernel_is_transformers_llama(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hidden states, a prompt and the passes after it, and the same bits however it is cut and shared."""
    torch.manual_seed(3)
    config = {"hidden_size": 96, "head_dim": 24, "num_attention_heads": 6, "num_key_value_heads": 2}
    plain = tiny.model("llama", **config)
    for module in plain.modules():  # weights that 8 bits hold exactly
        if isinstance(module, torch.nn.Linear):
            weights = kernels.Weights([module.weight.detach().numpy()])
            held = weights.values[0, :, : module.in_features] * weights.scales[0][:, None]
            module.weight.data.copy_(torch.from_numpy(held))
    tokens = torch.randint(0, 60, (start + 9,))
    with torch.inference_mode():
        expected = plain.model(tokens[None]).last_hidden_state[0]
    target = Target(cpu.quantize(plain))
    assert isinstance(target.model.model, cpu.Int8Llama)
    seen = []
    for threads in (1, 2, 4):
        for cuts in ((start, start + 9), (start, *range(start + 1, start + 10)), (start, start + 2, start + 9)):
            monkeypatch.setattr(team, "threads", threads)
            cache, hidden, begin = target.new_cache(64), [], 0
            for end in cuts:
                passed = target.verify(tokens[begin:end], cache, hidden=True)
                hidden.append(passed.hidden)
                begin = end
            seen.append(torch.cat(hidden))
    assert all(torch.equal(one, seen[0]) for one in seen)
    assert (seen[0] - expected).norm() < 5e-3 * expected.norm()


def test_a_pass_beyond_the_cache_is_refused() -> None:
    target = Target(cpu.quantize(tiny.model("llama")))
    cache = target.new_cache(64)
    with pytest.raises(ValueError, match=f"room for {cache.capacity} positions"):
        target.prefill(torch.zeros(cache.capacity + 1, dtype=torch.long), cache)


@pytest.mark.parametrize(("int8", "best"), [(True, 1), (True, 4), (True, 12), (False, 1), (False, 12)])
def test_as_many_threads_as_make_a_step_fastest(int8: bool, best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = [12]
    monkeypatch.setattr(team, "most", 12)
    monkeypatch.setattr(team, "threads", 12)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: used.append(n))
    clock = [0.0]
    monkeypatch.setattr(placement.time, "perf_counter", lambda: clock[0])

    class Clocked(Target):
        def verify(self, tokens: torch.Tensor, cache: Any, hidden: bool = False) -> Any:
            threads = team.threads if int8 else used[-1]
            clock[0] += 1 + abs(threads - best)

    assert placement.choose_threads(Clocked(tiny.model("llama")), int8) == best
    assert (team.threads if int8 else used[-1]) == best
    if int8:
        assert used[-1] == 1


@njit(nogil=True)
def taken(tickets: Any, chunks: Any) -> Any:
    return sharing.next_chunk(tickets, 0, chunks)


@njit(nogil=True)
def passed_on(tickets: Any, chunks: Any) -> Any:
    return sharing.finish_chunk(tickets, 0, chunks)


def test_nobody_leaves_a_phase_before_its_last_chunk_is_done() -> None:
    """Each chunk is handed out once; with none left the call returns only when those handed out are done."""
    tickets = np.zeros(sharing.TICKETS, np.int64)
    assert [taken(tickets, 3), taken(tickets, 3), passed_on(tickets, 3)] == [0, 1, 2]
    left: list[int] = []
    waiting = threading.Thread(target=lambda: left.append(taken(tickets, 3)), daemon=True)
    waiting.start()
    try:
        waiting.join(0.3)
        assert not left, "two chunks are still in hand"
        last = threading.Thread(target=lambda: left.append(passed_on(tickets, 3)), daemon=True)
        last.start()
        last.join(0.3)
        assert not left, "one chunk is still in hand"
    finally:
        tickets[sharing.TICKETS // 2] = 3
    waiting.join(30)
    last.join(30)
    assert left == [-1, -1]


def test_what_a_chunk_wrote_is_seen_after_its_phase() -> None:
    """Tickets order memory. On x86 every atomic operation does, so no result could tell; the code that is compiled
    does: a weaker order would let another processor read what a chunk has not written yet."""
    taken(np.zeros(sharing.TICKETS, np.int64), 1)
    (code,) = taken.inspect_llvm().values()
    ours = [
        part for part in code.split("\ndefine ")[1:] if "NRT_" not in part.splitlines()[0]
    ]  # Numba counts references
    added = [line for part in ours for line in part.splitlines() if "atomicrmw add" in line]
    looked = [line for part in ours for line in part.splitlines() if "load atomic" in line]
    assert added and all("seq_cst" in line or "acq_rel" in line for line in added)
    assert looked and all("seq_cst" in line or "acquire" in line for line in looked)
