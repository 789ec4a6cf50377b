"""Is rejection sampling exact? The joint distribution of the first three tokens, against enumeration, by chi-square.

The "model" is a table: logits of the next token given the last two. Sampling, noise and rules are the engine's own,
driven as `decode` drives them: draft i at position n + i on stream DRAFT, its uniform on ACCEPT, the target's own
token on RESIDUAL, all keyed by the round's start n as well.

Trials are rows of one batch. Noise is a function of (seed, position, token, stream), and a trial reads only the few
positions from its start on, so trials started 64 positions apart share no noise: they are as independent as trials
with seeds of their own (which `test_decode_is_exact` uses), and thousands run at once.

False alarms: every chi-square here is tested at 1e-6 / 128, and there are fewer than 128, so that a sound engine would
fail this file with probability below 1e-6 for a fresh choice of seeds. The seeds are fixed: it fails always or never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from spec_decode import decode
from spec_decode.draft_length import EarlyStop, Fixed
from spec_decode.drafters import Draft
from spec_decode.drafters.model import ModelDrafter
from spec_decode.noise import ACCEPT, DRAFT, RESIDUAL, TARGET, exponential, uniform
from spec_decode.prove.chi_square import chi_square
from spec_decode.prove.table import SilentText, joint
from spec_decode.prove.table import TableTarget as TableModel
from spec_decode.sampling import distribution, exponential_argmax
from spec_decode.settings import Settings
from spec_decode.state import State
from spec_decode.verification import Verdict, residual
from spec_decode.verification.block import block
from spec_decode.verification.coupled import coupled
from spec_decode.verification.rejection import rejection
from spec_decode.verification.threshold import threshold

FALSE_ALARM = 1e-6 / 128
TRIALS = 25_000
STRIDE = 64
PROMPT = (1, 2)
TOKENS = 3

Rule = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Verdict]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Combination:
    """A drafter, a draft length, and how the target is sampled. `prefill`: the first token is drawn without a draft."""

    drafter: str
    length: int
    vocabulary: int = 6
    sampling: dict[str, float] = field(default_factory=dict)
    prefill: bool = False

    @property
    def settings(self) -> Settings:
        return Settings(**{"temperature": 1.0, "rule": "rejection", **self.sampling})  # type: ignore[arg-type]

    def __str__(self) -> str:
        how = ",".join(f"{k}={v}" for k, v in self.sampling.items())
        return f"{self.drafter}-{self.length}-V{self.vocabulary}-{how}{'-prefill' if self.prefill else ''}"


COMBINATIONS = [
    *(Combination("sampled", g) for g in (1, 2, 3, 4)),
    *(Combination("one-hot", g) for g in (1, 2, 3, 4)),
    *(Combination("bad", g) for g in (1, 2, 3, 4)),
    *(Combination("perfect", g) for g in (1, 3)),
    *(Combination("bad one-hot", g) for g in (1, 4)),
    *(Combination("perfect one-hot", g) for g in (2, 4)),
    *(Combination(d, 3, prefill=True) for d in ("sampled", "one-hot")),
    *(Combination(d, 2, sampling={"temperature": 0.4}) for d in ("sampled", "one-hot", "bad")),
    *(Combination(d, 3, sampling={"temperature": 2.0}) for d in ("sampled", "one-hot", "perfect")),
    *(Combination(d, 4, sampling={"top_p": 0.7}) for d in ("sampled", "one-hot", "bad")),
    *(Combination(d, 2, sampling={"top_k": 3}) for d in ("sampled", "one-hot", "bad one-hot")),
    *(Combination(d, 3, 32, {"temperature": 0.8, "top_k": 8, "top_p": 0.9}) for d in ("sampled", "one-hot", "bad")),
    Combination("sampled", 4, 32),
    Combination("one-hot", 4, 17, {"temperature": 1.3, "top_p": 0.95}, prefill=True),
    Combination("mixed", 4),
    Combination("mixed", 3, 12, {"temperature": 1.5, "top_k": 7}),
]


def table(vocabulary: int, seed: int) -> Tensor:
    """Logits `[V, V, V]` of the next token given the last two."""
    return torch.randn(vocabulary, vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * 1.5


def drafter_tables(kind: str, logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The drafter's q `[V, V, V]`, and which contexts `[V, V]` it draws in; in the others it drafts its argmax."""
    own = table(logits.shape[0], 99)
    contexts = torch.arange(logits.shape[0] ** 2).reshape(logits.shape[:2])
    always, never = contexts >= 0, contexts < 0
    base, drawn = {
        "sampled": (own + 0.5 * logits, always),
        "one-hot": (own + 0.5 * logits, never),
        "bad": (-2 * logits, always),
        "bad one-hot": (-logits, never),
        "perfect": (logits, always),
        "perfect one-hot": (logits, never),
        # A q that is one-hot in some contexts and spread in others: exact only if q is what was drawn from.
        "mixed": (own, contexts % 2 == 0),
    }[kind]
    q = distribution(base, settings)
    one_hot = torch.zeros_like(q).scatter_(-1, base.argmax(-1, keepdim=True), 1.0)
    return torch.where(drawn[..., None], q, one_hot), drawn


def sample(combination: Combination, rule: Rule, seed: int, trials: int = TRIALS) -> Tensor:
    """The first `TOKENS` tokens `[trials, TOKENS]` of as many independent runs."""
    settings, vocabulary = combination.settings, combination.vocabulary
    logits = table(vocabulary, 7)
    p_of = distribution(logits, settings)
    q_of, drawn = drafter_tables(combination.drafter, logits, settings)
    deterministic = not bool(drawn.any())
    shared = settings.rule == "coupled"

    capacity = len(PROMPT) + TOKENS + 2 * (combination.length + 1)
    text = torch.zeros(trials, capacity, dtype=torch.long)
    text[:, : len(PROMPT)] = torch.tensor(PROMPT)
    n = torch.full((trials,), len(PROMPT))  # of each row: the position of the next token
    offset = torch.arange(trials) * STRIDE
    row = torch.arange(trials)

    def noise(positions: Tensor, stream: int) -> Tensor:
        flat = (offset[:, None] + positions).flatten()
        start = None if stream == TARGET else (offset[:, None] + n_[:, None]).expand(positions.shape).flatten()
        return exponential(seed, flat, vocabulary, stream, start).reshape(*positions.shape, vocabulary)

    length = 0 if combination.prefill else combination.length
    while int(n.min()) < len(PROMPT) + TOKENS:
        n_ = n.clamp_max(len(PROMPT) + TOKENS)  # rows that are done go on over what nobody reads
        for i in range(length):
            q = q_of[text[row, n_ + i - 2], text[row, n_ + i - 1]]
            text[row, n_ + i] = exponential_argmax(q, noise(n_[:, None] + i, TARGET if shared else DRAFT)[:, 0])
        places = n_[:, None] + torch.arange(length + 1)
        before, last = text.gather(1, places - 2), text.gather(1, places - 1)
        p, q, draft = p_of[before, last], q_of[before, last][:, :length], text.gather(1, places[:, :length])
        starts = (offset + n_)[:, None].expand(trials, length).flatten()
        u = uniform(seed, (offset[:, None] + places[:, :length]).flatten(), ACCEPT, starts).reshape(trials, length)
        if shared:
            verdict = coupled(draft, p, noise(places, TARGET))
        else:
            verdict = rule(draft, p, None if deterministic else q, u, noise(places, RESIDUAL))
        text[row, n_ + verdict.accepted] = verdict.token
        n = n_ + verdict.accepted + 1
        length = combination.length
    return text[:, len(PROMPT) : len(PROMPT) + TOKENS]


def enumerate_joint(p_of: Tensor) -> np.ndarray:
    """P of every sequence of `TOKENS` tokens after the prompt, `[V, V, V]`."""
    return joint(p_of, PROMPT, TOKENS).numpy()


def p_value(tokens: Tensor, joint: np.ndarray) -> float:
    """Chi-square of observed sequences against their joint distribution."""
    vocabulary = joint.shape[0]
    cells = (tokens[:, 0] * vocabulary + tokens[:, 1]) * vocabulary + tokens[:, 2]
    observed = np.bincount(cells.numpy(), minlength=joint.size).astype(float)
    fit = chi_square(observed, joint.flatten() * len(tokens))
    assert fit.freedom > 0
    return fit.p_value


@pytest.mark.parametrize("rule", [rejection, block], ids=["rejection", "block"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_the_rule_is_exact(combination: Combination, rule: Rule) -> None:
    tokens = sample(combination, rule, seed=2024)
    joint = enumerate_joint(distribution(table(combination.vocabulary, 7), combination.settings))
    assert p_value(tokens, joint) > FALSE_ALARM


COUPLED = [
    Combination(drafter, 3, sampling={"rule": "coupled", **sampling})  # type: ignore[dict-item]
    for drafter, sampling in (
        ("sampled", {}),
        ("one-hot", {"temperature": 0.5}),
        ("bad", {"top_p": 0.8}),
        ("perfect", {"top_k": 3}),
        ("mixed", {"temperature": 1.5}),
    )
]


@pytest.mark.parametrize("combination", COUPLED, ids=str)
def test_coupled_is_exact_over_seeds(combination: Combination) -> None:
    """One seed gives one text whatever is drafted; over many, the texts follow the target."""
    tokens = sample(combination, rejection, seed=11)
    joint = enumerate_joint(distribution(table(combination.vocabulary, 7), combination.settings))
    assert p_value(tokens, joint) > FALSE_ALARM
    alone = Combination("one-hot", 0, combination.vocabulary, combination.sampling)
    assert torch.equal(tokens, sample(alone, rejection, seed=11))


# Tests of the test: rules that are almost right must fail it, with the same trials and at the same level ----------


def argmax_over_q(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor, noise: Tensor) -> Verdict:
    """Accepts the drafter's argmax with p / q of a q it was not drawn from."""
    settings = Settings(temperature=1.0)
    spread = distribution(table(6, 99) + 0.5 * table(6, 7), settings)
    argmax = spread.argmax(-1)
    # The contexts are gone; every row of q is found again by the argmax that was drafted and by p itself.
    p_of = distribution(table(6, 7), settings).reshape(36, 6)
    context = (p[:, : draft.shape[1], None, :] - p_of).abs().sum(-1).argmin(-1)
    assert torch.equal(argmax.flatten()[context], draft)
    return rejection(draft, p, spread.reshape(36, 6)[context], u, noise)


def correct_from_p(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor, noise: Tensor) -> Verdict:
    """Draws the correction from p instead of what q left of it."""
    right = rejection(draft, p, q, u, noise)
    at = right.accepted[:, None, None].expand(-1, 1, p.shape[-1])
    return replace(right, token=exponential_argmax(p.gather(1, at), noise.gather(1, at))[:, 0])


def bonus_from_residual(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor, noise: Tensor) -> Verdict:
    """Takes the last draft's q off the bonus as well."""
    assert q is not None
    right = rejection(draft, p, q, u, noise)
    wrong = exponential_argmax(residual(p[:, -1], q[:, -1]), noise[:, -1])
    return replace(right, token=torch.where(right.accepted == draft.shape[1], wrong, right.token))


def keeps_going(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor, noise: Tensor) -> Verdict:
    """Counts accepted tokens instead of the run of them."""
    assert q is not None
    at = draft[..., None]
    accepted = (u * q.gather(-1, at)[..., 0] < p[:, : draft.shape[1]].gather(-1, at)[..., 0]).sum(-1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    return Verdict(accepted, exponential_argmax(p.gather(1, row), noise.gather(1, row))[:, 0], torch.empty(0))


def shared_noise(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor, noise: Tensor) -> Verdict:
    """Decides acceptance and correction with the same noise."""
    dependent = (-noise[:, : draft.shape[1]].gather(-1, draft[..., None])[..., 0]).exp()
    wrong = (-noise[:, : draft.shape[1], 0]).exp()
    return rejection(draft, p, q, torch.where(draft == 0, dependent, wrong), noise)


def block_from_ratios(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor, noise: Tensor) -> Verdict:
    """Accepts up to the last i whose uniform number is below r_i, where block verification takes h_i."""
    right = block(draft, p, q, u, noise)
    assert q is not None
    at = draft[..., None]
    ratio = p[:, : draft.shape[1]].gather(-1, at)[..., 0] / q.gather(-1, at)[..., 0]
    running = torch.ones_like(ratio[:, 0])
    rows = []
    for i in range(draft.shape[1]):
        running = (running * ratio[:, i]).clamp_max(1.0)
        rows.append(running)
    places = torch.arange(1, draft.shape[1] + 1)
    accepted = torch.where(u < torch.stack(rows, 1), places, 0).amax(-1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    rest = torch.cat([torch.stack([torch.ones_like(running), *rows[:-1]], 1)[..., None] * p[:, :-1] - q, p[:, -1:]], 1)
    own = rest.clamp_min(0).gather(1, row)
    return replace(right, accepted=accepted, token=exponential_argmax(own, noise.gather(1, row))[:, 0])


def lenient(draft: Tensor, p: Tensor, q: Tensor | None, u: Tensor, noise: Tensor) -> Verdict:
    """The lossy rule, barely lossy."""
    return threshold(draft, p, q, u, noise, 0.85)


@pytest.mark.parametrize(
    ("wrong", "combination"),
    [
        (argmax_over_q, Combination("one-hot", 1)),
        (argmax_over_q, Combination("one-hot", 4)),
        (correct_from_p, Combination("sampled", 2)),
        (correct_from_p, Combination("one-hot", 2)),
        (bonus_from_residual, Combination("sampled", 1)),
        (keeps_going, Combination("sampled", 3)),
        (shared_noise, Combination("sampled", 2)),
        (block_from_ratios, Combination("sampled", 3)),
        (lenient, Combination("sampled", 2)),
        (lenient, Combination("one-hot", 4)),
    ],
    ids=lambda x: x.__name__ if callable(x) else str(x),
)
def test_a_wrong_rule_is_caught(wrong: Rule, combination: Combination) -> None:
    tokens = sample(combination, wrong, seed=2024)
    joint = enumerate_joint(distribution(table(combination.vocabulary, 7), combination.settings))
    assert p_value(tokens, joint) < FALSE_ALARM


@pytest.mark.parametrize("stream", [ACCEPT, RESIDUAL])
def test_noise_used_twice_is_caught(stream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that draws with the noise of the correction, or of the acceptance test, is not independent of it."""
    combination = Combination("sampled", 2)
    monkeypatch.setitem(globals(), "DRAFT", stream)
    tokens = sample(combination, rejection, seed=2024)
    joint = enumerate_joint(distribution(table(combination.vocabulary, 7), combination.settings))
    assert p_value(tokens, joint) < FALSE_ALARM


def test_the_chi_square_accepts_plain_sampling_and_no_less() -> None:
    """Its p-values are uniform when tokens are drawn from the joint distribution itself."""
    joint = enumerate_joint(distribution(table(6, 7), Settings(temperature=1.0)))
    rng = np.random.default_rng(0)
    values = []
    for _ in range(300):
        cells = torch.from_numpy(rng.choice(joint.size, 5000, p=joint.flatten()))
        values.append(p_value(torch.stack([cells // 36, cells // 6 % 6, cells % 6], -1), joint))
    assert scipy.stats.kstest(values, "uniform").pvalue > 1e-3


# What the lossy rule says of itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("lenience", [0.2, 0.6, 1.0])
def test_threshold_emits_what_its_divergence_is_of(lenience: float) -> None:
    """The token at the first drafted position follows the distribution whose divergence `kl` reports."""
    g = torch.Generator().manual_seed(3)
    p, q = (torch.randn(8, generator=g).softmax(-1) for _ in range(2))
    passed = torch.minimum(q, p / lenience)
    emitted = passed + (1 - passed.sum()) * residual(p, lenience * q)
    places = torch.arange(TRIALS)

    def noise(stream: int) -> Tensor:
        return exponential(6, torch.stack([places, places + TRIALS], 1).flatten(), 8, stream).reshape(TRIALS, 2, 8)

    draft = exponential_argmax(q.expand(TRIALS, 1, 8), noise(DRAFT)[:, :1])
    both = p.expand(TRIALS, 2, 8)
    verdict = threshold(draft, both, q.expand(TRIALS, 1, 8), uniform(6, places)[:, None], noise(RESIDUAL), lenience)
    first = torch.where(verdict.accepted > 0, draft[:, 0], verdict.token)
    counts = torch.bincount(first, minlength=8).double().numpy()

    def chance(says: Tensor) -> float:
        expected = says.double().numpy() / float(says.double().sum()) * TRIALS
        return float(scipy.stats.chisquare(counts, expected).pvalue)

    assert chance(emitted) > FALSE_ALARM
    assert (chance(p) > FALSE_ALARM) == (lenience == 1)
    drift = float((emitted * (emitted / p).log()).sum())
    assert verdict.kl is not None
    torch.testing.assert_close(verdict.kl * (verdict.accepted + 1), torch.full((TRIALS,), drift), rtol=1e-4, atol=1e-6)


# The whole loop ----------------------------------------------------------------------------------------------------


class Early(Fixed):
    """Ends a draft behind the first token the drafter is not sure of."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.early_stop = EarlyStop([0.0, 1.0], [0.5])


class Picky(ModelDrafter):
    """Leaves the first token it is not sure of out of the draft, which gives the drafted ones away as likely ones."""

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        made = super().draft_on_host(state, length, None)
        assert made is not None and made.confidence is not None and made.q is not None
        likely = int((made.confidence > 0.5).long().cumprod(-1).sum())
        return Draft(made.ids[:, :likely], made.q[:, :likely], made.confidence[:, :likely])


def decoded(lengths: Fixed, rule: str, trials: int, kind: type[ModelDrafter] = ModelDrafter) -> float:
    """p-value of what `decode` itself emits with a draft model, one seed a trial."""
    target, other = TableModel(table(4, 7)), TableModel(table(4, 99))
    tokens = []
    for seed in range(trials):
        settings = Settings(temperature=1.0, top_k=3, rule=rule, max_new_tokens=TOKENS + 1, seed=seed)
        drafter = kind(other, "table", 4)  # type: ignore[arg-type]
        rounds = decode.speculative(target, drafter, lengths, list(PROMPT), SilentText(), settings)  # type: ignore[arg-type]
        tokens.append([t.id for r in rounds for t in r.emitted][:TOKENS])
    return p_value(torch.tensor(tokens), enumerate_joint(distribution(table(4, 7), settings)))


@pytest.mark.parametrize("lengths", [Fixed(2), Early(3)], ids=["fixed", "ends early"])
@pytest.mark.parametrize("rule", ["rejection", "coupled", "block"])
def test_decode_is_exact(rule: str, lengths: Fixed) -> None:
    assert decoded(lengths, rule, 500) > FALSE_ALARM


def test_leaving_unlikely_drafts_out_is_caught() -> None:
    """A draft may end behind an unlikely token, not before it."""
    assert decoded(Fixed(2), "rejection", 1500, Picky) < FALSE_ALARM


# Long texts of decode's own, word by word ---------------------------------------------------------------------------

LONG = 3000


@dataclass(frozen=True)
class Spoken:
    """A target that draws every token from `p`, whatever the text, and a drafter that draws from `q`.

    `q` None is a drafter that names the last token again and draws nothing.
    """

    name: str
    p: tuple[float, ...]
    q: tuple[float, ...] | None
    lengths: Fixed
    sampling: dict[str, Any] = field(default_factory=dict)


SPOKEN = [
    # Token 0 is always refused, and says by having been drafted that token 1's draft noise is large: an engine that
    # corrects with draft noise says 1 with probability 0.61.
    Spoken("correction", (0.0, 0.7, 0.3), (0.6, 0.4, 0.0), Fixed(1)),
    # A token 0 that was drafted has little draft noise: an engine that accepts with it would say 0 half as often.
    Spoken("acceptance", (0.25, 0.75), (0.5, 0.5), Fixed(1)),
    # Token 1 is refused half the time. The uniform number is made of token 0's noise, so correction with the noise of
    # acceptance says 0 more often.
    Spoken("both", (0.2, 0.4, 0.4), (0.0, 0.8, 0.2), Fixed(1)),
    # A uniform number or a draft that serves twice in a round makes neighbours depend on each other.
    Spoken("several", (0.4, 0.6), (0.7, 0.3), Fixed(3)),
    # Only token 0 is drafted surely; a draft that left the others out would say it with probability 0.73.
    Spoken("unsure", (0.49, 0.51), (0.51, 0.49), Early(3)),
    Spoken("argmax", (0.5, 0.3, 0.2), None, Fixed(2)),
    # p becomes (0.735, 0.265, 0): a temperature used twice would make it (0.885, …), and without top-p there are three.
    Spoken("sampling", (0.5, 0.3, 0.2), (0.4, 0.3, 0.3), Fixed(2), {"temperature": 0.5, "top_p": 0.8}),
]


class Again(ModelDrafter):
    """Drafts the last token over and over, drawn from nothing."""

    def draft_on_host(self, state: State, length: int, stop: EarlyStop | None) -> Draft:
        return Draft(state.last.expand(1, length))


def share(says: tuple[float, ...]) -> Tensor:
    """The table of a model that says every token with its share, whatever the text."""
    return torch.tensor(says).log().expand(len(says), len(says), len(says))


@pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: spoken.name)
def test_decode_speaks_as_the_target_does(spoken: Spoken) -> None:
    """One text of 3,000 tokens under the rejection rule: all tokens, the first of every round, and neighbours, each by
    chi-square. The first of a round alone was drafted for certain, and bugs show there undiluted.

    Three tests of level 1e-6 / 128 for each of the cases above. A token whose probability is wrong by 0.074 is found
    with probability 0.99 (z = 5.8 + 2.3 at p = 0.5, less elsewhere); by 0.1, if it is the first of a round alone.
    """
    settings = Settings(
        **{"temperature": 1.0, "rule": "rejection", "max_new_tokens": LONG, "seed": 5, **spoken.sampling}
    )
    target = TableModel(share(spoken.p))
    drafter = (ModelDrafter if spoken.q else Again)(TableModel(share(spoken.q or spoken.p)), "table", len(spoken.p))  # type: ignore[arg-type]
    rounds = list(decode.speculative(target, drafter, spoken.lengths, [0, 1], SilentText(), settings))  # type: ignore[arg-type]
    tokens = torch.tensor([token.id for r in rounds for token in r.emitted])
    firsts = torch.tensor([r.emitted[0].id for r in rounds])
    p = distribution(torch.tensor(spoken.p).log(), settings).double()
    p = p / p.sum()
    pairs = tokens[::2] * len(p) + tokens[1::2]
    for cells, says in ((tokens, p), (firsts, p), (pairs, (p[:, None] * p).flatten())):
        counts = torch.bincount(cells, minlength=len(says))
        assert not counts[says == 0].any()
        alive = says > 0
        expected = says[alive].numpy() * len(cells)
        assert scipy.stats.chisquare(counts[alive].numpy(), expected).pvalue > FALSE_ALARM
