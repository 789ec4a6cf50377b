"""The rules, case by case: against rules written out one token at a time, and for what must never happen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from spec_decode.noise import ACCEPT, DRAFT, RESIDUAL, TARGET, exponential, uniform
from spec_decode.sampling import distribution, exponential_argmax
from spec_decode.settings import MAX_SEED, Settings
from spec_decode.verification import Verdict, residual
from spec_decode.verification.block import block
from spec_decode.verification.coupled import coupled
from spec_decode.verification.greedy import greedy
from spec_decode.verification.rejection import rejection
from spec_decode.verification.threshold import threshold, threshold_argmax

examples = hypothesis_settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """A batch of drafts with all that the rules take. `q` is what the sampled draft `drawn` was drawn from."""

    seed: int
    logits: Tensor  # [B, γ + 1, V]
    p: Tensor
    q: Tensor  # [B, γ, V]
    drawn: Tensor  # [B, γ]
    guess: Tensor  # [B, γ], not drawn from anything
    uniform: Tensor
    noise: Tensor
    shared: Tensor  # the noise of the coupled rule


def make(
    seed: int, length: int, vocabulary: int, settings: Settings, likeness: float, barred: float, batch: int = 8
) -> Case:
    """`likeness` 1 makes q = p; `barred` is the share of tokens with a logit of −inf, in p and q apart."""
    g = torch.Generator().manual_seed(seed % 2**32)
    logits = torch.randn(batch, length + 1, vocabulary, generator=g) * 2
    own = torch.randn(batch, length, vocabulary, generator=g) * 2
    other = likeness * logits[:, :length] + (1 - likeness) * own
    for x in (logits, other) if likeness < 1 else (logits,):
        bar = torch.rand(x.shape, generator=g) < barred
        bar.scatter_(-1, torch.randint(vocabulary, (*x.shape[:-1], 1), generator=g), False)
        x[bar] = -torch.inf
    if likeness == 1:
        other = logits[:, :length].clone()
    p, q = distribution(logits, settings), distribution(other, settings)
    places = torch.arange(batch * (length + 1)).reshape(batch, length + 1)

    def noise(stream: int) -> Tensor:
        return exponential(seed, places.flatten(), vocabulary, stream).reshape(p.shape)

    return Case(
        seed,
        logits,
        p,
        q,
        exponential_argmax(q, noise(DRAFT)[:, :length]),
        torch.randint(vocabulary, (batch, length), generator=g),
        uniform(seed, places[:, :length].flatten(), ACCEPT).reshape(batch, length),
        noise(RESIDUAL),
        noise(TARGET),
    )


cases = st.builds(
    make,
    seed=st.integers(0, MAX_SEED),
    length=st.integers(0, 6),
    vocabulary=st.integers(1, 12),
    settings=st.builds(
        Settings,
        temperature=st.floats(0.1, 4),
        top_p=st.one_of(st.just(1.0), st.floats(0.05, 1)),
        top_k=st.integers(0, 12),
        rule=st.just("rejection"),
    ),
    likeness=st.sampled_from([0.0, 0.5, 0.999999, 1.0]),
    barred=st.sampled_from([0.0, 0.5, 0.9]),
)
# Many rows of what decoding meets, beside the odd ones that Hypothesis makes; drafts are accepted now and then.
USUAL = make(1, 4, 8, Settings(temperature=1.0, rule="rejection"), likeness=0.5, barred=0.0, batch=600)
lenience = st.sampled_from([1e-6, 0.1, 0.3, 0.7, 0.999, 1.0])


def emitted(draft: Tensor, verdict: Verdict) -> list[list[int]]:
    """The tokens that every row of a batch adds to the text."""
    rows = zip(draft.tolist(), verdict.accepted.tolist(), verdict.token.tolist(), strict=True)
    return [[*row[:accepted], token] for row, accepted, token in rows]


def same(a: Verdict, b: Verdict) -> None:
    assert torch.equal(a.accepted, b.accepted) and torch.equal(a.token, b.token)


def rules(case: Case, ease: float) -> list[tuple[str, Tensor, Verdict]]:
    """Every rule on the case: its name, the draft it was given, its verdict."""
    p, q, u, e = case.p, case.q, case.uniform, case.noise
    return [
        ("greedy", case.guess, greedy(case.guess, case.logits)),
        ("coupled", case.guess, coupled(case.guess, p, case.shared)),
        ("rejection", case.drawn, rejection(case.drawn, p, q, u, e)),
        ("rejection, one-hot", case.guess, rejection(case.guess, p, None, u, e)),
        ("block", case.drawn, block(case.drawn, p, q, u, e)),
        ("block, one-hot", case.guess, block(case.guess, p, None, u, e)),
        ("threshold", case.drawn, threshold(case.drawn, p, q, u, e, ease)),
        ("threshold, one-hot", case.guess, threshold(case.guess, p, None, u, e, ease)),
        ("threshold, argmax", case.guess, threshold_argmax(case.guess, p, ease)),
    ]


@examples
@given(cases, lenience)
def test_no_rule_emits_what_the_target_bars(case: Case, ease: float) -> None:
    length = case.guess.shape[-1]
    for name, draft, verdict in rules(case, ease):
        assert ((verdict.accepted >= 0) & (verdict.accepted <= length)).all(), name
        for row, tokens in enumerate(emitted(draft, verdict)):
            for i, token in enumerate(tokens):
                assert case.p[row, i, token] > 0, (name, row, i)


@hypothesis_settings(examples, max_examples=20)
@given(cases, lenience)
def test_leading_dimensions_are_rows(case: Case, ease: float) -> None:
    """[8, …], [2, 2, 2, …] and one row at a time give the same verdicts."""

    def pick(index: Callable[[Tensor], Tensor]) -> Case:
        tensors = {k: index(v) for k, v in vars(case).items() if k != "seed"}
        return Case(case.seed, **tensors)

    whole = rules(case, ease)
    folded = rules(pick(lambda x: x.reshape(2, 2, 2, *x.shape[1:])), ease)
    single = [rules(pick(lambda x, i=i: x[i]), ease) for i in range(8)]
    for k, (name, _, verdict) in enumerate(whole):
        for field in ("accepted", "token", "refused", "kl"):
            value = getattr(verdict, field)
            if value is None:
                assert getattr(folded[k][2], field) is None and "threshold" not in name
                continue
            assert value.shape == (8,), name
            rows = torch.stack([getattr(s[k][2], field) for s in single])
            if field == "kl":
                torch.testing.assert_close(getattr(folded[k][2], field).flatten(), value, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(rows, value, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(getattr(folded[k][2], field).flatten(), value), (name, field)
                assert torch.equal(rows, value), (name, field)


# Greedy and coupled ----------------------------------------------------------------------------------------------


def prefix(draft: list[int], own: list[int]) -> list[int]:
    """What matching one token at a time emits."""
    out = []
    for i, token in enumerate(own):
        out.append(token)
        if i == len(draft) or draft[i] != token:
            break
    return out


@examples
@given(cases)
def test_greedy_emits_the_argmax(case: Case) -> None:
    best = case.logits.argmax(-1)
    half_right = torch.where(case.uniform < 0.8, best[:, :-1], case.guess)
    for draft in (case.guess, half_right, best[:, :-1]):
        expected = [prefix(d, own) for d, own in zip(draft.tolist(), best.tolist(), strict=True)]
        assert emitted(draft, greedy(draft, case.logits)) == expected
    assert (greedy(best[:, :-1], case.logits).accepted == case.guess.shape[-1]).all()


@examples
@given(cases)
def test_greedy_is_the_exact_rules_at_temperature_zero(case: Case) -> None:
    p = distribution(case.logits, Settings(temperature=0.0))
    draft = torch.where(case.uniform < 0.7, case.logits.argmax(-1)[:, :-1], case.guess)
    expected = greedy(draft, case.logits)
    same(coupled(draft, p, case.shared), expected)
    same(rejection(draft, p, None, case.uniform, case.noise), expected)


@examples
@given(cases)
def test_coupled_emits_the_targets_own_sample_whatever_was_drafted(case: Case) -> None:
    own = exponential_argmax(case.p, case.shared)
    half_right = torch.where(case.uniform < 0.8, own[:, :-1], case.guess)
    for draft in (case.guess, case.drawn, half_right, own[:, :-1], (own[:, :-1] + 1) % case.p.shape[-1]):
        for tokens, truth in zip(emitted(draft, coupled(draft, case.p, case.shared)), own.tolist(), strict=True):
            assert tokens == truth[: len(tokens)]
    assert (coupled(own[:, :-1], case.p, case.shared).accepted == case.guess.shape[-1]).all()


def test_coupled_accepts_as_often_as_promised() -> None:
    """At least (1 − TV) / (1 + TV) of drafts drawn with the same noise, within 5 standard deviations."""
    n, vocabulary = 40_000, 10
    g = torch.Generator().manual_seed(8)
    for scale in (0.2, 1.0, 3.0):
        a = torch.randn(vocabulary, generator=g)
        p, q = a.softmax(-1), (a + scale * torch.randn(vocabulary, generator=g)).softmax(-1)
        noise = exponential(1, torch.arange(2 * n), vocabulary).reshape(n, 2, vocabulary)
        draft = exponential_argmax(q.expand(n, 1, vocabulary), noise[:, :1])
        rate = coupled(draft, p.expand(n, 2, vocabulary), noise).accepted.double().mean().item()
        distance = 0.5 * (p - q).abs().sum().item()
        assert rate > (1 - distance) / (1 + distance) - 5 * 0.5 / math.sqrt(n)
        assert rate < 1 - distance + 5 * 0.5 / math.sqrt(n)  # no coupling can do better


# Rejection -------------------------------------------------------------------------------------------------------


def one_by_one(
    draft: np.ndarray, p: np.ndarray, q: np.ndarray | None, u: np.ndarray, noise: np.ndarray, ease: float = 1.0
) -> tuple[list[int], bool]:
    """Speculative sampling of one row, written out; also says whether rounding could have decided otherwise."""
    out: list[int] = []
    close = False
    for i, x in enumerate(draft):
        qi = np.eye(p.shape[-1])[x] if q is None else q[i]
        close |= bool(abs(u[i] * ease * qi[x] - p[i, x]) < 1e-6 * p[i, x])
        if u[i] * ease * qi[x] < p[i, x]:
            out.append(int(x))
            continue
        rest = np.maximum(p[i] - ease * qi, 0)
        close |= rest.sum() < 1e-4
        scores = np.sort((rest if rest.sum() > 0 else p[i]) / noise[i])
        close |= bool(len(scores) > 1 and scores[-2] > scores[-1] * (1 - 1e-4))
        return [*out, int(np.argmax((rest if rest.sum() > 0 else p[i]) / noise[i]))], close
    return [*out, int(np.argmax(p[-1] / noise[-1]))], close


@examples
@example(USUAL, 0.3, False)
@example(USUAL, 0.3, True)
@given(cases, lenience, st.booleans())
def test_rejection_and_threshold_agree_with_the_loop(case: Case, ease: float, one_hot: bool) -> None:
    draft, q = (case.guess, None) if one_hot else (case.drawn, case.q)
    exact = emitted(draft, rejection(draft, case.p, q, case.uniform, case.noise))
    lossy = emitted(draft, threshold(draft, case.p, q, case.uniform, case.noise, ease))
    p, u, noise = (x.double().numpy() for x in (case.p, case.uniform, case.noise))
    for row in range(len(draft)):
        qr = None if q is None else q[row].double().numpy()
        for got, used in ((exact[row], 1.0), (lossy[row], ease)):
            expected, close = one_by_one(draft[row].numpy(), p[row], qr, u[row], noise[row], used)
            assert got == expected or close


@examples
@given(cases, st.booleans())
def test_threshold_of_lenience_one_is_rejection(case: Case, one_hot: bool) -> None:
    draft, q = (case.guess, None) if one_hot else (case.drawn, case.q)
    exact = rejection(draft, case.p, q, case.uniform, case.noise)
    lossy = threshold(draft, case.p, q, case.uniform, case.noise, 1.0)
    same(exact, lossy)
    assert exact.refused is None and exact.kl is None
    assert lossy.refused is not None and not lossy.refused.any()
    assert lossy.kl is not None and lossy.kl.abs().max() < 1e-5


@examples
@given(cases)
def test_a_perfect_drafter_is_always_accepted(case: Case) -> None:
    length = case.guess.shape[-1]
    draft = exponential_argmax(case.p, case.noise)[:, :length]
    verdict = rejection(draft, case.p, case.p[:, :length], case.uniform, case.noise)
    assert (verdict.accepted == length).all()


@examples
@given(cases, lenience)
def test_residuals_sum_to_one(case: Case, ease: float) -> None:
    length = case.guess.shape[-1]
    p = case.p[:, :length]
    one_hot = torch.zeros_like(p).scatter_(-1, case.guess[..., None], 1.0)
    for q in (case.q, one_hot, torch.zeros_like(p), p):
        rest = residual(p, ease * q)
        assert (rest >= 0).all()
        torch.testing.assert_close(rest.sum(-1), torch.ones(p.shape[:-1]), rtol=0, atol=1e-5)
        assert not rest[p == 0].any()


def test_a_residual_of_nothing_is_p() -> None:
    p = torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    assert torch.equal(residual(p, p), p)
    assert torch.equal(residual(p, torch.ones_like(p)), p)


@pytest.mark.parametrize("tiny", [1e-44, 1e-38, 1e-30, 1e-10])
def test_a_tiny_residual_still_sums_to_one(tiny: float) -> None:
    """What q has too little of may be next to nothing; it is all that may be drawn then."""
    p, q = torch.tensor([1.0, tiny, 0.0, tiny]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert residual(p, q).tolist() == [0, 0.5, 0, 0.5]


def test_rejection_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    q = torch.tensor([[0.25, 0.25, 0.5]])
    even = torch.ones(2, 3)
    bonus, correction = 1, 0

    def verdict(token: int, u: float, q: Tensor | None) -> tuple[int, int]:
        v = rejection(torch.tensor([token]), p, q, torch.tensor([u]), even)
        return int(v.accepted), int(v.token)

    assert verdict(0, 0.999, q) == (1, bonus)  # p > q: always
    assert verdict(2, 0.39, q) == (1, bonus)  # p / q = 0.4
    assert verdict(2, 0.41, q) == (0, correction)  # residual (0.25, 0.05, 0)
    assert verdict(0, 0.49, None) == (1, bonus)  # one-hot: p(x) = 0.5
    assert verdict(0, 0.51, None) == (0, 1)  # p without x: (0, 0.3, 0.2)


# Block -----------------------------------------------------------------------------------------------------------


def block_one_by_one(
    draft: np.ndarray, p: np.ndarray, q: np.ndarray, u: np.ndarray, noise: np.ndarray
) -> tuple[list[int], bool]:
    """Algorithm 2 of the paper for one row, and whether a decision was as close as rounding."""
    ratio, accepted, kept, close = 1.0, 0, 1.0, False
    for i, token in enumerate(draft):
        ratio = min(1.0, ratio * p[i, token] / q[i, token])
        if i + 1 < len(draft):
            mass = np.maximum(ratio * p[i + 1] - q[i + 1], 0).sum()
            bound = mass / (mass + 1 - ratio) if mass + 1 - ratio > 0 else 1.0
            close |= mass < 1e-5 and 1 - ratio < 1e-5  # 0 / 0 but for rounding
        else:
            bound = ratio
        close |= abs(u[i] - bound) < 1e-4
        if u[i] < bound:
            accepted, kept = i + 1, ratio
    rest = p[accepted] if accepted == len(draft) else np.maximum(kept * p[accepted] - q[accepted], 0)
    rest = rest / rest.sum() if rest.sum() > 1e-6 else p[accepted]
    close |= rest.sum() < 1e-4
    scores = rest / noise[accepted]
    best, second = np.sort(scores)[-1], np.sort(scores)[-2] if len(scores) > 1 else 0.0
    return [*draft[:accepted].tolist(), int(scores.argmax())], close or second > best * (1 - 1e-3)


@examples
@example(USUAL, False)
@example(USUAL, True)
@given(cases, st.booleans())
def test_block_is_the_papers_algorithm(case: Case, one_hot: bool) -> None:
    draft, q = (case.guess, None) if one_hot else (case.drawn, case.q)
    got = emitted(draft, block(draft, case.p, q, case.uniform, case.noise))
    p, u, noise = (x.double().numpy() for x in (case.p, case.uniform, case.noise))
    for row in range(len(draft)):
        drawn = np.eye(p.shape[-1])[draft[row].numpy()] if q is None else q[row].double().numpy()
        expected, close = block_one_by_one(draft[row].numpy(), p[row], drawn, u[row], noise[row])
        assert got[row] == expected or close


def test_block_refuses_a_draft_from_no_distribution() -> None:
    """A drafter with broken weights has q = NaN: nothing is accepted, and the numbers stay finite."""
    case = make(5, 3, 7, Settings(temperature=1.0), 0.0, 0.0)
    verdict = block(case.drawn, case.p, torch.full_like(case.q, torch.nan), case.uniform, case.noise)
    assert not verdict.accepted.any() and verdict.compared.isfinite().all()
    assert ((verdict.token >= 0) & (verdict.token < 7)).all()


def accepted_lengths(p: Tensor, q: Tensor) -> tuple[float, float]:
    """Expected accepted tokens of block and of rejection, over all drafts of two tokens; p `[3, V, V]` is given the
    token before, q `[2, V, V]` likewise, the first row of either the one at the start."""
    vocabulary = p.shape[-1]
    a, b = (x.flatten() for x in torch.meshgrid(torch.arange(vocabulary), torch.arange(vocabulary), indexing="ij"))
    draft = torch.stack([a, b], -1)
    pp = torch.stack([p[0, 0].expand(len(a), -1), p[1][a], p[2][b]], 1)
    qq = torch.stack([q[0, 0].expand(len(a), -1), q[1][a]], 1)
    even = torch.ones_like(pp)
    small = torch.full(draft.shape, 1e-9)  # all is accepted, so that every bound is given
    chance = (q[0, 0][a] * q[1][a, b]).double()
    h = block(draft, pp, qq, small, even).compared[..., 1].double()
    ours = h[:, 1] * 2 + (1 - h[:, 1]) * h[:, 0]  # up to the last that passes
    r = rejection(draft, pp, qq, small, even).compared[..., 1].double()
    theirs = r[:, 0] * (1 + r[:, 1])  # up to the first that does not
    return float((chance * ours).sum()), float((chance * theirs).sum())


def test_block_accepts_at_least_as_many_tokens_as_rejection() -> None:
    """Over 1,000 pairs of random distributions, enumerated; and more than a tenth of them more."""
    generator = torch.Generator().manual_seed(8)
    more = 0
    for _ in range(1000):
        p, q = (
            (3 * torch.rand((), generator=generator) * torch.randn(n, 4, 4, generator=generator)).softmax(-1)
            for n in (3, 2)
        )
        ours, theirs = accepted_lengths(p, q)
        assert ours >= theirs - 1e-5
        more += ours > theirs + 1e-3
    assert more > 100


# Threshold -------------------------------------------------------------------------------------------------------


def emitted_by_enumeration(p: np.ndarray, q: np.ndarray, ease: float) -> np.ndarray:
    """The distribution of one lenient step: every draft, accepted or not, and every redraw."""
    rest = np.maximum(p - ease * q, 0)
    rest = rest / rest.sum() if rest.sum() > 0 else p
    out = np.zeros_like(p)
    for x, chance in enumerate(q):
        if chance == 0:
            continue
        take = min(1.0, p[x] / (ease * chance))
        out[x] += chance * take
        for y, share in enumerate(rest):
            out[y] += chance * (1 - take) * share
    return out


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0))


@examples
@given(cases, lenience, st.booleans())
def test_threshold_tells_its_drift(case: Case, ease: float, one_hot: bool) -> None:
    """`kl` against enumeration, averaged over the visited positions; `refused` against the exact test, counted."""
    draft, q = (case.guess, None) if one_hot else (case.drawn, case.q)
    verdict = threshold(draft, case.p, q, case.uniform, case.noise, ease)
    assert verdict.kl is not None and verdict.refused is not None
    length, vocabulary = draft.shape[-1], case.p.shape[-1]
    for row in range(8):
        accepted = int(verdict.accepted[row])
        drift, refused = 0.0, 0
        for i in range(min(accepted + 1, length)):
            x = int(draft[row, i])
            p = case.p[row, i].double().numpy()
            qi = np.eye(vocabulary)[x] if q is None else q[row, i].double().numpy()
            drift += divergence(emitted_by_enumeration(p, qi, ease), p)
            exact_keeps = case.uniform[row, i] * qi[x] < p[x]
            refused += i < accepted and not exact_keeps
        assert float(verdict.kl[row]) == pytest.approx(drift / (accepted + 1), rel=1e-3, abs=2e-5)
        assert int(verdict.refused[row]) == refused


@examples
@given(cases, lenience)
def test_threshold_at_temperature_zero(case: Case, ease: float) -> None:
    best = case.p.amax(-1)
    draft = torch.where(case.uniform < 0.5, case.p.argmax(-1)[:, :-1], case.guess)
    verdict = threshold_argmax(draft, case.p, ease)
    assert verdict.kl is not None and verdict.refused is not None
    for row, tokens in enumerate(emitted(draft, verdict)):
        accepted, drift, refused = int(verdict.accepted[row]), 0.0, 0
        for i, token in enumerate(tokens):
            px, top = float(case.p[row, i, token]), float(best[row, i])
            if i < accepted:
                assert px >= ease * top * (1 - 1e-6)
                refused += px < top
            else:
                assert px == top  # the target's own choice
                if i < draft.shape[-1]:
                    assert float(case.p[row, i, draft[row, i]]) < ease * top * (1 + 1e-6)
            if i < draft.shape[-1]:
                drift -= math.log(px)
        assert int(verdict.refused[row]) == refused
        assert float(verdict.kl[row]) == pytest.approx(drift / len(tokens), rel=1e-4, abs=1e-6)


@examples
@given(cases)
def test_more_lenience_never_accepts_less(case: Case) -> None:
    counts = [
        threshold(case.drawn, case.p, case.q, case.uniform, case.noise, ease).accepted
        for ease in (1.0, 0.9, 0.5, 0.1, 1e-6)
    ]
    for stricter, looser in itertools.pairwise(counts):
        assert (looser >= stricter).all()


# Edges -----------------------------------------------------------------------------------------------------------


def test_an_empty_draft_is_a_plain_step() -> None:
    case = make(3, 0, 7, Settings(temperature=1.0), 0.0, 0.0)
    for name, _, verdict in rules(case, 0.5):
        assert not verdict.accepted.any(), name
        if verdict.kl is not None:
            assert not verdict.kl.any() and verdict.refused is not None and not verdict.refused.any()
    plain = exponential_argmax(case.p, case.noise)[:, 0]
    for name, _, verdict in rules(case, 1.0):
        if name in ("rejection", "block"):
            same(verdict, Verdict(torch.zeros(8, dtype=torch.long), plain, torch.empty(8, 0, 2)))


def test_unbatched_tensors_give_scalars() -> None:
    case = make(4, 3, 7, Settings(temperature=1.0), 0.0, 0.0, batch=1)
    verdict = rejection(case.drawn[0], case.p[0], case.q[0], case.uniform[0], case.noise[0])
    assert verdict.accepted.shape == verdict.token.shape == ()
    assert verdict.accepted.dtype == verdict.token.dtype == torch.int64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refused_logits_do_not_break_a_rule(bad: float) -> None:
    """A row that is no distribution is NaN and found after the copy to the host; until then all stays in range."""
    case = make(5, 2, 7, Settings(temperature=1.0), 0.0, 0.0)
    logits = case.logits.clone()
    logits[::2, 1] = bad
    broken = make(5, 2, 7, Settings(temperature=1.0), 0.0, 0.0)
    broken.logits, broken.p = logits, distribution(logits, Settings(temperature=1.0))
    assert broken.p[::2, 1].isnan().all()
    for (name, _, verdict), (_, _, sound) in zip(rules(broken, 0.5), rules(case, 0.5), strict=True):
        assert ((verdict.accepted >= 0) & (verdict.accepted <= 2)).all(), name
        assert ((verdict.token >= 0) & (verdict.token < 7)).all(), name
        assert torch.equal(verdict.token[1::2], sound.token[1::2]), name
        assert torch.equal(verdict.accepted[1::2], sound.accepted[1::2]), name
        if name.startswith("block"):
            continue  # it looks a position ahead
        reached = sound.accepted[::2] == 0  # rows that ended before the bad position do not notice
        assert torch.equal(verdict.token[::2][reached], sound.token[::2][reached]), name


def test_ties_go_to_the_first_token_alone_and_in_company() -> None:
    logits = torch.zeros(1, 3, 49152)
    logits[0, 1, 40_000:] = 1
    together = greedy(torch.tensor([[0, 40_000]]), logits)
    assert together.accepted.tolist() == [2] and together.token.tolist() == [0]
    for i, first in enumerate((0, 40_000, 0)):
        alone = greedy(torch.zeros(1, 0, dtype=torch.long), logits[:, i : i + 1])
        assert alone.token.tolist() == [first]
