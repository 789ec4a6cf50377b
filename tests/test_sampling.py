"""Distributions and noise: against slow references, against transformers, and for the properties the rules lean on."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from spec_decode.noise import ACCEPT, DRAFT, RESIDUAL, STREAMS, TARGET, RoundNoise, exponential, uniform
from spec_decode.sampling import degenerate, distribution, draw, exponential_argmax
from spec_decode.settings import MAX_SEED, Settings

VOCABULARY = 49152  # SmolLM2's: long enough for torch to split a row over threads
examples = hypothesis_settings(max_examples=100, deadline=None, derandomize=True, database=None)

NASTY = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 3.4e38, -3.4e38, 1e-45, 88.0, -104.0]
logit_rows = st.lists(st.one_of(st.sampled_from(NASTY), st.floats(-40, 40, width=32)), min_size=1, max_size=24)
sane_rows = st.lists(st.one_of(st.just(-math.inf), st.floats(-30, 30, width=32)), min_size=1, max_size=24).filter(
    lambda row: max(row) > -math.inf
)
# Eighths: many exact ties and no almost-ties, on which float32 and float64 may rightly disagree.
tied_rows = st.lists(
    st.one_of(st.integers(-8, 8), st.integers(-80, 80)).map(lambda x: x / 8), min_size=1, max_size=24
).flatmap(lambda row: st.lists(st.sampled_from([*row, -math.inf]), max_size=4).map(lambda more: row + more))
samplings = st.builds(
    Settings,
    temperature=st.one_of(st.just(0.0), st.sampled_from([1e-300, 1e-40, 1e-6]), st.floats(0.05, 5)),
    top_p=st.one_of(st.just(1.0), st.sampled_from([1e-300, 1 - 1e-9]), st.floats(0.01, 1)),
    top_k=st.integers(0, 30),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as it takes for torch to split long rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def reference(logits: list[float], settings: Settings) -> np.ndarray:
    """Temperature, top-k, top-p one token at a time in float64; tokens tied with the last one kept stay."""
    x = np.asarray(logits, np.float32).astype(np.float64)
    p = np.exp((x - x.max()) / settings.temperature)
    p /= p.sum()
    if settings.top_k:
        ranked = sorted(p, reverse=True)
        edge = ranked[min(settings.top_k, len(p)) - 1]
        p = np.array([value if value >= edge else 0.0 for value in p])
        p /= p.sum()
    if settings.top_p < 1:
        mass = edge = 0.0
        for value in sorted(p, reverse=True):
            if mass >= settings.top_p:
                break
            mass, edge = mass + value, value
        p = np.array([value if value >= edge else 0.0 for value in p])
        p /= p.sum()
    return p


@examples
@given(logit_rows, samplings)
def test_a_row_is_a_distribution_or_nan_throughout(row: list[float], settings: Settings) -> None:
    logits = torch.tensor(row)
    p = distribution(logits, settings)
    refused = any(math.isnan(x) or x == math.inf for x in row) or all(x == -math.inf for x in row)
    assert p.dtype == torch.float32 and p.shape == logits.shape
    assert bool(degenerate(logits)) == refused
    if refused:
        assert p.isnan().all()
    else:
        assert (p >= 0).all()
        assert float(p.sum()) == pytest.approx(1, abs=1e-5)
        assert not p[logits == -math.inf].any()
        assert p[logits.argmax()] == p.max() > 0


@examples
@given(st.lists(logit_rows.map(lambda row: (row * 24)[:24]), min_size=2, max_size=5), samplings)
def test_a_bad_row_leaves_its_neighbours_alone(rows: list[list[float]], settings: Settings) -> None:
    logits = torch.tensor(rows)
    alone = torch.stack([distribution(row, settings) for row in logits])
    assert torch.equal(distribution(logits, settings).nan_to_num(-1), alone.nan_to_num(-1))


@examples
@given(tied_rows, st.floats(0.3, 5), st.one_of(st.just(1.0), st.floats(0.02, 1)), st.integers(0, 30))
def test_agrees_with_the_slow_reference(row: list[float], temperature: float, top_p: float, top_k: int) -> None:
    before = np.sort(reference(row, Settings(temperature=temperature, top_k=top_k)))[::-1]
    assume((np.abs(np.cumsum(before) - top_p) > 1e-5).all() or top_p == 1)  # no rounding decides who stays
    settings = Settings(temperature=temperature, top_p=top_p, top_k=top_k)
    got, expected = distribution(torch.tensor(row), settings).numpy(), reference(row, settings)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-35)
    assert ((got > 0) == (expected > 1e-35)).all()


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ([2.0, 1.0, 1.0, 1.0, 0.0], {"top_k": 2}, [0, 1, 2, 3]),
        ([1.0, 1.0, 1.0, 1.0], {"top_k": 1}, [0, 1, 2, 3]),
        ([1.0, 1.0, 1.0, 1.0], {"top_p": 0.01}, [0, 1, 2, 3]),
        ([math.log(0.5), math.log(0.25), math.log(0.25)], {"top_p": 0.6}, [0, 1, 2]),
        ([math.log(0.5), math.log(0.3), math.log(0.2)], {"top_p": 0.4}, [0]),
        ([math.log(0.5), math.log(0.3), math.log(0.2)], {"top_p": 0.6}, [0, 1]),
        # top-p counts the mass that top-k left: 0.5 / 0.8 reaches 0.6 at once.
        ([math.log(0.5), math.log(0.3), math.log(0.2)], {"top_p": 0.6, "top_k": 2}, [0]),
        ([0.0, 5.0, 4.0], {"top_k": 1_000_000}, [0, 1, 2]),
        ([0.0, -math.inf, 0.0], {}, [0, 2]),
    ],
)
def test_who_stays(row: list[float], settings: dict[str, float], expected: list[int]) -> None:
    p = distribution(torch.tensor(row), Settings(temperature=1.0, **settings))
    assert torch.nonzero(p)[:, 0].tolist() == expected


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 300])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.05])
def test_agrees_with_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(8, 2000, generator=torch.Generator().manual_seed(5)) * 2
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    p = distribution(logits, Settings(temperature=temperature, top_k=top_k, top_p=top_p))
    assert torch.equal(p > 0, warped > -math.inf)
    torch.testing.assert_close(p, warped.softmax(-1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("spread", [0.0, 0.001, 1.0])
def test_a_nucleus_wider_than_the_shortlist(spread: float) -> None:
    """Flat distributions keep thousands of tokens; top-p must not stop at what is looked at first."""
    logits = torch.randn(3, 4000, generator=torch.Generator().manual_seed(1)) * spread
    for settings in (Settings(temperature=1.0, top_p=0.9), Settings(temperature=1.0, top_p=0.9, top_k=3000)):
        p = distribution(logits, settings)
        for row, got in zip(logits.tolist(), p, strict=True):
            expected = reference(row, settings)
            assert abs(int((got > 0).sum()) - int((expected > 0).sum())) <= (0 if spread == 0 else 1)
            np.testing.assert_allclose(got.sum(), 1, rtol=1e-5)


def test_a_nucleus_ends_where_the_mass_reaches_top_p_exactly() -> None:
    """Halves, quarters and eighths add up without rounding, so the edge can be met to the bit."""
    shares = [0.5, 0.25, 0.125, 0.125]
    logits = torch.tensor([[math.log(share) for share in shares]])
    for i in range(1, 4):  # the logits beside the logarithms whose softmax has no rounding in it
        for _ in range(8):
            if float(distribution(logits, Settings(temperature=1.0))[0, i]) == shares[i]:
                break
            logits[0, i] = torch.nextafter(logits[0, i], torch.tensor(0.0))
    assert distribution(logits, Settings(temperature=1.0)).tolist() == [shares]
    for top_p, kept in ((0.5, 1), (0.75, 2), (0.75 + 2**-20, 4), (0.5 + 2**-20, 2), (0.5 - 2**-20, 1)):
        p = distribution(logits, Settings(temperature=1.0, top_p=top_p))
        assert int((p > 0).sum()) == kept, top_p


def test_a_wide_row_beside_a_narrow_one_keeps_its_nucleus() -> None:
    """Of several rows one may need more tokens than are looked at first, and the others not."""
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1)) * 0.1
    logits[0, 7] = logits[2, 9] = 50
    settings = Settings(temperature=1.0, top_p=0.9)
    p = distribution(logits, settings)
    assert (p > 0).sum(-1).tolist()[::2] == [1, 1]
    assert 1700 < int((p[1] > 0).sum()) < 1850
    assert torch.equal(p[1], distribution(logits[1], settings))


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.randn(50, 333, generator=torch.Generator().manual_seed(2))
    p = distribution(logits, Settings(temperature=0.0, top_k=5, top_p=0.1))
    assert torch.equal(p.argmax(-1), logits.argmax(-1))
    assert torch.equal(p.sum(-1), torch.ones(50)) and torch.equal(p.amax(-1), torch.ones(50))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_goes_in_float32_comes_out(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(3)).to(dtype)
    settings = Settings(temperature=0.8, top_p=0.9)
    assert torch.equal(distribution(logits, settings), distribution(logits.float(), settings))


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-20])
def test_a_tiny_temperature_shares_the_mass_among_the_best(temperature: float) -> None:
    p = distribution(torch.tensor([1.0, 3.0, 2.0, 3.0]), Settings(temperature=temperature))
    assert p.tolist() == [0, 0.5, 0, 0.5]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.999},
        {"temperature": 1.0, "top_k": 40_000, "top_p": 0.95},
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_its_neighbours(settings: dict[str, float]) -> None:
    """Bitwise: the baseline looks at one row, a target pass at several, and both must draw the same token."""
    chosen = Settings(**settings)  # type: ignore[arg-type]
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    logits[3] /= 100  # a flat row sends its neighbours down the slow path of top-p as well
    positions = torch.arange(100, 105)
    together = distribution(logits, chosen)
    noise = exponential(9, positions, VOCABULARY)
    drawn = exponential_argmax(together, noise)
    for i in range(5):
        for alone in (distribution(logits[i : i + 1], chosen), distribution(logits[i], chosen)[None]):
            assert torch.equal(alone[0], together[i])
            own = exponential(9, positions[i : i + 1], VOCABULARY)
            assert torch.equal(own[0], noise[i])
            assert exponential_argmax(alone, own).tolist() == [drawn[i].item()]


def test_leading_dimensions_are_rows() -> None:
    logits = torch.randn(2, 3, 4, 50, generator=torch.Generator().manual_seed(4))
    settings = Settings(temperature=0.9, top_k=20, top_p=0.8)
    rows = distribution(logits.reshape(-1, 50), settings)
    assert torch.equal(distribution(logits, settings).reshape(-1, 50), rows)


# Noise -----------------------------------------------------------------------------------------------------------


@examples
@given(
    st.integers(0, MAX_SEED),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8),
    st.sampled_from([TARGET, DRAFT, ACCEPT, RESIDUAL]),
    st.integers(1, 50),
)
def test_noise_is_a_function_of_seed_position_token_and_stream(
    seed: int, positions: list[int], stream: int, vocabulary: int
) -> None:
    """The same whoever asks beside it, however many tokens are asked for, and in whatever integer type."""
    many = exponential(seed, torch.tensor(positions), vocabulary, stream)
    wider = exponential(seed, torch.tensor(positions, dtype=torch.int32), vocabulary + 13, stream)
    assert torch.equal(many, wider[:, :vocabulary])
    for row, position in zip(many, positions, strict=True):
        assert torch.equal(row, exponential(seed, torch.tensor([position]), vocabulary, stream)[0])
    u = uniform(seed, torch.tensor(positions), stream)
    assert ((u > 0) & (u < 1)).all()
    assert torch.equal(u, torch.stack([uniform(seed, torch.tensor([p]), stream)[0] for p in positions]))


def test_noise_is_pinned() -> None:
    """A stored trace is replayed by its seed: the noise may never change by accident."""
    row = exponential(42, torch.tensor([7]), 4, TARGET)[0]
    torch.testing.assert_close(
        row, torch.tensor([0.364046633, 1.74316442, 0.153765813, 0.207989484]), rtol=1e-6, atol=0
    )
    row = exponential(42, torch.tensor([7]), 4, RESIDUAL, torch.tensor([5]))[0]
    torch.testing.assert_close(row, torch.tensor([2.99287748, 4.26172733, 1.57931721, 0.539586663]), rtol=1e-6, atol=0)


def test_a_round_shares_noise_with_no_other_and_between_no_two_uses() -> None:
    """Two rounds that both reach position 7 have only the noise of the target's own sample there in common; drafts are
    drawn with noise that no verification uses."""
    seed, vocabulary = 3, 50
    early, late = (RoundNoise(seed, torch.tensor([start]), 4, vocabulary) for start in (5, 7))
    assert torch.equal(early.shared()[0, 2:], late.shared()[0, :2])
    at_7 = [early.shared()[0, 2, 0], early.residual()[0, 2, 0], late.residual()[0, 0, 0]]
    at_7 += [-early.uniform()[0, 2].log(), -late.uniform()[0, 0].log()]  # made of the noise of token 0
    for start in (5, 7):
        positions, begin = torch.arange(start, start + 40), torch.tensor([start])
        drafted = exponential(seed, positions, vocabulary, DRAFT, begin)
        at_7.append(drafted[7 - start, 0])
        for rule, expected in (("rejection", drafted), ("coupled", exponential(seed, positions, vocabulary, TARGET))):
            settings = Settings(temperature=1.0, rule=rule, seed=seed)
            made = draw(torch.zeros(40, vocabulary), positions, begin, settings)
            assert made.q is not None and torch.equal(made.ids, exponential_argmax(made.q, expected))
    ranked = torch.stack(at_7).sort().values
    assert len(ranked) == 7 and ranked.diff().min() > 1e-4


def blocks() -> Iterator[tuple[str, Tensor]]:
    yield "tokens of one position", exponential(0, torch.tensor([11]), 200_000)[0]
    yield "positions of one token", exponential(0, torch.arange(200_000), 1)[:, 0]
    yield "a few positions by many tokens", exponential(5, torch.arange(8), 40_000, RESIDUAL).flatten()
    yield "seeds", torch.cat([exponential(seed, torch.arange(2), 20)[:, :].flatten() for seed in range(2000)])
    yield "large seeds", torch.cat([exponential(s << 32, torch.arange(2), 20).flatten() for s in range(2000)])
    for stream in range(STREAMS):
        yield f"stream {stream}", exponential(1, torch.arange(400), 200, stream).flatten()
    starts = torch.arange(200_000)
    yield "starts of one position", exponential(0, torch.full((200_000,), 7), 1, DRAFT, starts)[:, 0]
    yield "rounds of one draft length", exponential(0, starts + 3, 1, ACCEPT, starts)[:, 0]


def test_noise_is_exponential() -> None:
    """Kolmogorov–Smirnov; a false alarm has probability 1e-6 per block (the blocks are fixed)."""
    for name, block in blocks():
        assert (block > 0).all() and block.isfinite().all(), name
        assert scipy.stats.kstest(block.double().numpy(), "expon").pvalue > 1e-6, name


def test_uniform_is_uniform_and_never_an_endpoint() -> None:
    for stream in range(STREAMS):
        u = uniform(3, torch.arange(200_000), stream)
        assert ((u > 0) & (u < 1)).all()
        assert scipy.stats.kstest(u.double().numpy(), "uniform").pvalue > 1e-6
    # These positions hash to the smallest noise, which float32 would round to a uniform of exactly 1.
    assert (uniform(0, torch.tensor([8437587, 14743781, 15337761])) < 1).all()


def test_noise_spans_small_values() -> None:
    """The winners of a race lie near 0: the smallest of 2^22 draws must be as small as it should be."""
    block = exponential(17, torch.arange(64), 65_536).flatten()
    smallest = block.sort().values[:1000].double()
    assert scipy.stats.kstest(smallest.numpy() / float(block.sort().values[1000]), "uniform").pvalue > 1e-6
    assert smallest.unique().numel() > 990


def noise_pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
    n, width = 250, 400
    here = torch.arange(n)
    base = exponential(0, here, width)
    for shift in (1, 2, 3, 4, 5, 16, 64, 256, 4096, 65_536, 2**20):
        yield f"position + {shift}", base, exponential(0, here + shift, width)
    for shift in (1, 2, 3, 64, 128):
        wide = exponential(0, here, width + shift)
        yield f"token + {shift}", wide[:, :-shift], wide[:, shift:]
    for seed in (1, 2, 3, 2**16, 2**31, 2**32, 2**32 + 1, 2**52):
        yield f"seed {seed}", base, exponential(seed, here, width)
    for a in range(STREAMS):
        for b in range(a):
            yield f"streams {a} {b}", exponential(0, here, width, a), exponential(0, here, width, b)
    for shift in (0, 1, 2, 16, 2**20):
        yield f"start {shift}", base, exponential(0, here, width, TARGET, (here - shift).abs())
    started = exponential(0, here + 5, width, DRAFT, here)
    for shift in (1, 2, 3, 4, 5):
        yield f"start + {shift}", started, exponential(0, here + 5, width, DRAFT, here + shift)
        yield f"start and position + {shift}", started, exponential(0, here + 5 + shift, width, DRAFT, here + shift)
    yield "start and position exchanged", started, exponential(0, here, width, DRAFT, here + 5)
    square = exponential(0, torch.arange(300), 300)
    yield "position and token exchanged", square[~torch.eye(300).bool()], square.T[~torch.eye(300).bool()]
    yield (
        "seed and position exchanged",
        *(
            torch.cat([exponential(s, torch.tensor([k]), width) for s, k in pairs])
            for pairs in (
                [(s, k) for s in range(20) for k in range(20) if s != k],
                [(k, s) for s in range(20) for k in range(20) if s != k],
            )
        ),
    )


def test_noise_is_uncorrelated() -> None:
    """Over positions, tokens, seeds and streams: z-scores of the correlation, of values and of their logarithms.

    Logarithms weigh the small values, which decide races. 6 standard deviations are 2e-9 a comparison.
    """
    for name, a, b in noise_pairs():
        for x, y in ((a, b), (a.log(), b.log())):
            x, y = x.flatten().double().numpy(), y.flatten().double().numpy()
            z = np.corrcoef(x, y)[0, 1] * math.sqrt(len(x))
            assert abs(z) < 6, name


def test_races_of_different_noise_are_independent() -> None:
    """Which token wins at a position says nothing of who wins next to it, on another stream, or under another seed."""
    p = torch.full((8,), 1 / 8)
    places = torch.arange(40_000)

    def winners(seed: int = 0, shift: int = 0, stream: int = TARGET) -> Tensor:
        return exponential_argmax(p.expand(40_000, 8), exponential(seed, places + shift, 8, stream))

    first = winners()
    others = [winners(shift=1), winners(shift=8), winners(seed=1), winners(seed=2**32), winners(stream=DRAFT)]
    for second in [*others, winners(stream=RESIDUAL)]:
        table = torch.bincount(first * 8 + second, minlength=64).reshape(8, 8).numpy()
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-6
    u = uniform(0, places, ACCEPT)
    for stream in (DRAFT, RESIDUAL):
        table = torch.bincount(winners(stream=stream) * 8 + (u * 8).long(), minlength=64).reshape(8, 8).numpy()
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-6


# The race --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_race_draws_from_p(seed: int) -> None:
    p = distribution(
        torch.randn(20, generator=torch.Generator().manual_seed(seed)) * 2, Settings(temperature=1.0, top_k=15)
    )
    n = 100_000
    counts = torch.bincount(
        exponential_argmax(p.expand(n, 20), exponential(seed, torch.arange(n), 20)), minlength=20
    ).double()
    alive = p > 0
    assert not counts[~alive].any()
    expected = p[alive].double() / p[alive].double().sum() * n
    assert scipy.stats.chisquare(counts[alive].numpy(), expected.numpy()).pvalue > 1e-6


@examples
@given(sane_rows, samplings, st.integers(0, MAX_SEED))
def test_a_race_never_draws_what_has_no_probability(row: list[float], settings: Settings, seed: int) -> None:
    p = distribution(torch.tensor(row), settings).expand(64, -1)
    drawn = exponential_argmax(p, exponential(seed, torch.arange(64), len(row)))
    assert (p[0][drawn] > 0).all()
    if settings.temperature == 0:
        assert (drawn == torch.tensor(row).argmax()).all()


def test_a_race_survives_the_extremes_of_its_noise() -> None:
    """Noise at both ends of its range: a lone token wins against the smallest noise of all the others."""
    p = torch.zeros(3, 1000)
    p[0, 17] = 1
    p[1, 3], p[1, 4] = 1 - 1e-7, 1e-7
    p[2] = 1e-3
    low, high = 2.0**-33, 17.0
    noise = torch.full((3, 1000), low)
    noise[0, 17] = noise[1, 3] = high
    noise[2, 500:] = high
    drawn = exponential_argmax(p, noise).tolist()
    assert drawn[0] == 17 and drawn[1] == 4 and drawn[2] < 500


def test_nothing_is_left_to_compile_for_the_first_race() -> None:
    """It would count as the baseline's time to its first token. In a process of its own, since tests compile too."""
    code = """
from spec_decode import sampling
from spec_decode.cpu.kernels import vocabulary
from spec_decode.cpu.kernels.compiled import _KernelCache
sampling.get_ready()
kernels = {n: made for n, made in vars(vocabulary).items() if isinstance(getattr(made, "_cache", None), _KernelCache)}
print(len(kernels), *(name for name, made in kernels.items() if not made.nopython_signatures))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, *left = done.stdout.split()
    assert left == [] and int(count) == 5
