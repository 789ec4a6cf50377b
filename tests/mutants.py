"""Mutation testing: deliberate bugs, each of which a named test must find.

    python -m tests.mutants            # all of them
    python -m tests.mutants NAME…      # those whose names contain one of these words

Every mutant replaces one piece of text of one file, in a temporary copy of the tree, and runs the tests that should
fail. The text must occur exactly once: a table that no longer fits the code is an error, not a pass. The named tests
run first without a mutant, since a test that fails anyway kills nothing. Exit code 0: all were killed; 1: one survived;
2: the table is out of date, or a test fails without a mutant. pytest does not collect this file.

Changes that no test can see, and are therefore not in the table:

- Noise of ACCEPT or RESIDUAL taken at position + 1 throughout: a key is still used once, the numbering alone differs.
- `<` for `<=` between a uniform number and a ratio of probabilities: both sides are equal with probability 0.
- A drafter that draws with the stream TARGET under a rule that draws independently: nothing else there reads it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds for the tests of one mutant, compiling kernels included
PASSED, FAILED = 0, 1  # pytest's exit codes; all others mean that it could not run what it was told


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in spec_decode/`file`; `tests` are pytest node ids below tests/, separated by spaces."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def nodes(self) -> list[str]:
        return [f"tests/{node}" for node in self.tests.split()]


SPEAKS = "test_statistics.py::test_decode_speaks_as_the_target_does"
TELLS = "test_decode.py::test_every_token_tells_its_own_probabilities"
SECONDS = "test_decode.py::test_seconds_are_of_the_work_they_are_named_after"
TEXT = "test_decode.py::test_the_text_is_that_of_the_ids_wherever_it_ends"
CONTROLLER = "test_decode.py::test_the_controller_is_told_every_round_but_the_prefill"
LOSSY = "test_decode.py::test_the_lossy_rule_tells_what_it_let_through"
NAN = "test_decode.py::test_a_verified_row_that_is_not_finite_is_refused"
GREEDY = "test_exactness.py::test_greedy_equals_generate[llama-itself]"
COUPLED = "test_exactness.py::test_coupled_lanes_are_identical[llama-0.7-0.9-0-itself]"


MUTANTS = [
    # Independence of noise
    Mutant(
        "correction drawn with draft noise",
        "decode.py",
        "places, vocabulary, RESIDUAL)",
        "places, vocabulary, 1)",
        f"{SPEAKS}[correction]",
    ),
    Mutant(
        "acceptance decided with draft noise",
        "decode.py",
        "uniform(seed, places[:-1], ACCEPT)",
        "uniform(seed, places[:-1], 1)",
        f"{SPEAKS}[acceptance]",
    ),
    Mutant(
        "correction drawn with the noise of acceptance",
        "decode.py",
        "places, vocabulary, RESIDUAL)",
        "places, vocabulary, ACCEPT)",
        f"{SPEAKS}[both]",
    ),
    Mutant(
        "one uniform number for a whole round",
        "decode.py",
        "uniform(seed, places[:-1], ACCEPT)",
        "uniform(seed, places[:1].expand(len(places) - 1), ACCEPT)",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "one draft noise for a whole round",
        "drafters/model.py",
        "len(self.tokens) + i, device",
        "len(self.tokens), device",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "draft noise is correction noise",
        "sampling.py",
        'if settings.rule == "coupled" else DRAFT',
        'if settings.rule == "coupled" else RESIDUAL',
        f"{SPEAKS}[correction]",
    ),
    Mutant(
        "draft noise is that of acceptance",
        "sampling.py",
        'if settings.rule == "coupled" else DRAFT',
        'if settings.rule == "coupled" else ACCEPT',
        f"{SPEAKS}[acceptance]",
    ),
    Mutant(
        "coupled drafts have noise of their own",
        "sampling.py",
        'stream = TARGET if settings.rule == "coupled" else DRAFT',
        "stream = DRAFT",
        COUPLED,
    ),
    Mutant(
        "the same noise at every position",
        "decode.py",
        "places = torch.arange(position, position + logits.shape[0], device=logits.device)",
        "places = torch.full((logits.shape[0],), 7, device=logits.device)",
        f"{SPEAKS}[several]",
    ),
    # What is drafted
    Mutant(
        "an unsure draft is left out",
        "drafters/model.py",
        "worth_more(drawn, go_on):\n                break\n",
        "worth_more(drawn, go_on):\n                drawn = drawn[:-1] or drawn\n                break\n",
        f"{SPEAKS}[unsure]",
    ),
    Mutant(
        "go_on is not asked",
        "decode.py",
        "drafter.draft(length, lengths.go_on)",
        "drafter.draft(length, None)",
        CONTROLLER,
    ),
    Mutant(
        "a refused draft stays in the drafter's cache",
        "drafters/model.py",
        "len(self.tokens) + len(tokens) - 1))",
        "len(self.tokens) + len(tokens)))",
        "test_exactness.py::test_greedy_equals_generate[llama-stranger]",
    ),
    Mutant(
        "the drafter reads again what it has read",
        "drafters/model.py",
        "len(self.tokens) + len(tokens) - 1))",
        "len(self.tokens) - 1))",
        "test_exactness.py::test_the_draft_model_computes_nothing_twice",
    ),
    Mutant(
        "drafts are drawn at the position before",
        "drafters/model.py",
        "len(self.tokens) + i, device",
        "len(self.tokens) + i - 1, device",
        COUPLED,
    ),
    Mutant(
        "tokens that the drafter does not know get a chance",
        "drafters/model.py",
        "value=-torch.inf)",
        "value=0.0)",
        "test_decode.py::test_a_draft_model_tells_what_it_drew_from",
    ),
    Mutant(
        "the oldest match",
        "drafters/lookup.py",
        "self.index[tuple(self.tokens[end - n :])] = end",
        "self.index.setdefault(tuple(self.tokens[end - n :]), end)",
        "test_engine.py::test_lookup_prefers_the_longest_match_and_then_the_latest",
    ),
    Mutant(
        "the shortest match",
        "drafters/lookup.py",
        "range(longest, shortest - 1, -1)",
        "range(shortest, longest + 1)",
        "test_engine.py::test_lookup_prefers_the_longest_match_and_then_the_latest",
    ),
    Mutant(
        "a match that begins a token late",
        "drafters/lookup.py",
        "return n, [self.tokens[follows + i % period]",
        "return n, [self.tokens[follows + (i + 1) % period]",
        "test_engine.py::test_lookup_prefers_the_longest_match_and_then_the_latest",
    ),
    Mutant(
        "the other drafter is always credited",
        "drafters/either.py",
        "        if self.asked:\n",
        "        if True:\n",
        "test_either.py::test_each_is_judged_by_its_own_drafts",
    ),
    Mutant(
        "credit is kept for the next round",
        "drafters/either.py",
        "            self.asked = False\n        self.lookup",
        "        self.lookup",
        "test_either.py::test_each_is_judged_by_its_own_drafts",
    ),
    Mutant(
        "what follows a wrong token of a match counts",
        "drafters/either.py",
        "                if not before:\n                    break\n",
        "",
        "test_either.py::test_how_long_a_match_holds_is_learnt_from_where_it_first_fails",
    ),
    Mutant(
        "a match is followed to the end",
        "drafters/either.py",
        "len(sure) if go_on else length",
        "length",
        "test_either.py::test_a_match_is_followed_as_far_as_the_controller_says",
    ),
    Mutant(
        "MTP continues from the last row of the pass",
        "drafters/mtp.py",
        "target.hidden[len(tokens) - 1]",
        "target.hidden[-1]",
        "test_mtp.py::test_greedy_drafts_are_those_of_transformers[dense-False-8-3]",
    ),
    Mutant(
        "MTP draws with the noise of the position before",
        "drafters/mtp.py",
        "self._draw(out, places + i))\n            if",
        "self._draw(out, places + i - 1))\n            if",
        "test_mtp.py::test_coupled_drafts_are_drawn_with_the_targets_noise_of_their_positions",
    ),
    Mutant(
        "MTP in 8 bits draws with the noise of the position before",
        "drafters/mtp.py",
        "self._draw(out, places + i))\n                else:",
        "self._draw(out, places + i - 1))\n                else:",
        "test_mtp.py::test_coupled_drafts_are_drawn_with_the_targets_noise_of_their_positions",
    ),
    Mutant(
        "MTP draws a whole draft with the noise of the position before",
        "drafters/mtp.py",
        "position + 1 + np.arange(length), TARGET",
        "position + np.arange(length), TARGET",
        "test_mtp.py::test_the_int8_step_is_the_assistants_own_forward[coupled-silu-centroids]",
    ),
    Mutant(
        "MTP sees one position beyond the window",
        "drafters/mtp.py",
        "visible &= back <= self.config.sliding_window",
        "visible &= back <= self.config.sliding_window + 1",
        "test_mtp.py::test_greedy_drafts_are_those_of_transformers",
    ),
    Mutant(
        "MTP sees what the target has not read",
        "drafters/mtp.py",
        "back = length - 1 - torch.arange",
        "back = length - torch.arange",
        "test_mtp.py::test_greedy_drafts_are_those_of_transformers",
    ),
    # The loop
    Mutant(
        "one token too many is drafted at the end",
        "decode.py",
        "min(lengths.choose(), left - 1)",
        "min(lengths.choose(), left)",
        "test_exactness.py::test_output_never_overshoots",
    ),
    Mutant(
        "end of sequence only as the target's own token",
        "decode.py",
        "                if token in target.eos:",
        "                if token in target.eos and count == len(emitted):",
        "test_exactness.py::test_end_of_sequence_inside_an_accepted_draft_cuts_there",
    ),
    Mutant(
        "the end of sequence is not emitted",
        "decode.py",
        "emitted, ended = emitted[:count], True",
        "emitted, ended = emitted[: count - 1], True",
        f"{TEXT}[stop-right] test_exactness.py::test_end_of_sequence_inside_an_accepted_draft_cuts_there",
    ),
    Mutant(
        "the last token is taken as read",
        "decode.py",
        "cache.rollback(position - 1)",
        "cache.rollback(min(position, cache.length))",
        "test_exactness.py::test_greedy_equals_generate[llama-scripted]",
    ),
    Mutant(
        "no rollback",
        "decode.py",
        "            cache.rollback(position - 1)  # the last token has not been read yet\n",
        "",
        "test_exactness.py::test_greedy_equals_generate[llama-scripted]",
    ),
    Mutant(
        "temperature used twice on the target",
        "decode.py",
        "p = distribution(logits, settings)\n    if",
        "p = distribution(logits / settings.temperature, settings)\n    if",
        f"{SPEAKS}[sampling] {TELLS}[coupled]",
    ),
    Mutant(
        "no top-p on the target",
        "decode.py",
        "p = distribution(logits, settings)\n    if",
        "p = softmax(logits, settings.temperature)\n    if",
        f"{SPEAKS}[sampling] {TELLS}[coupled]",
    ),
    Mutant(
        "only the first row is checked for NaN", "decode.py", "degenerate(logits).any()", "degenerate(logits)[0]", NAN
    ),
    Mutant(
        "only the last row is checked for NaN", "decode.py", "degenerate(logits).any()", "degenerate(logits)[-1]", NAN
    ),
    Mutant(
        "p of the target's own token from the first row",
        "decode.py",
        "(verdict.accepted * p.shape[-1] + verdict.token)",
        "(verdict.token)",
        TELLS,
    ),
    Mutant(
        "p of a draft from the row behind it",
        "decode.py",
        "p[:n].gather(-1, draft.ids[:, None])",
        "p[-n:].gather(-1, draft.ids[:, None])",
        TELLS,
    ),
    Mutant(
        "bonus and correction exchanged",
        "decode.py",
        '"bonus" if accepted == len(ids) else "correction"',
        '"correction" if accepted == len(ids) else "bonus"',
        TELLS,
    ),
    Mutant(
        "refused and drift are not told",
        "decode.py",
        "int(rest[0]) if rest else None, rest[1] if rest else None",
        "int(rest[1]) if rest else None, rest[0] if rest else None",
        LOSSY,
    ),
    Mutant(
        "lenience is ignored at temperature 0",
        "decode.py",
        "u, noise, settings.lenience, argmax=True)",
        "u, noise, 1.0, argmax=True)",
        LOSSY,
    ),
    Mutant(
        "draft positions count from 0",
        "decode.py",
        '"accepted", p[i], q[i], i + 1)',
        '"accepted", p[i], q[i], i)',
        TELLS,
    ),
    Mutant(
        "the tail of a text is kept back at the limit", "decode.py", "flush=ended or left == 0", "flush=ended", TEXT
    ),
    Mutant(
        "the tail of a text is kept back at its end", "decode.py", "flush=ended or left == 0", "flush=left == 0", TEXT
    ),
    Mutant("refused drafts get into the text stream", "decode.py", "aside = text.fork()", "aside = text", TEXT),
    Mutant(
        "draft and verify seconds exchanged",
        "decode.py",
        "laps[0], laps[1], seconds",
        "laps[1], laps[0], seconds",
        SECONDS,
    ),
    Mutant(
        "the reader's time is the lane's",
        "decode.py",
        "            begun = time.perf_counter()  # what the reader of rounds does is not this lane's time\n",
        "",
        SECONDS,
    ),
    Mutant(
        "the clock forgets rounds before",
        "decode.py",
        "            clock += seconds\n",
        "            clock = seconds\n",
        SECONDS,
    ),
    Mutant(
        "the controller learns from the prefill",
        "decode.py",
        "if lengths is not None and index > 0:\n",
        "if lengths is not None:\n",
        CONTROLLER,
    ),
    Mutant(
        "the controller learns nothing",
        "decode.py",
        "                lengths.observe(done)\n",
        "                pass\n",
        CONTROLLER,
    ),
    # The rules
    Mutant(
        "the last draft is never accepted",
        "verification.py",
        "accepted = _run(draft == own[..., :-1])",
        "accepted = _run(draft == own[..., :-1]).clamp_max(max(draft.shape[-1] - 1, 0))",
        GREEDY,
    ),
    Mutant(
        "the last draft is never kept by rejection",
        "verification.py",
        "accepted = _run(uniform * qx < px)",
        "accepted = _run(uniform * qx < px).clamp_max(max(draft.shape[-1] - 1, 0))",
        "test_verification.py::test_a_perfect_drafter_is_always_accepted",
    ),
    Mutant(
        "accepted drafts are counted, not run through",
        "verification.py",
        "return ok.long().cumprod(-1).sum(-1)",
        "return ok.long().sum(-1)",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "the bonus loses what was drafted before it",
        "verification.py",
        "torch.where(accepted[..., None] == length, 0.0, own_q)",
        "own_q",
        f"{SPEAKS}[acceptance]",
    ),
    Mutant(
        "the correction is drawn from p",
        "verification.py",
        "race(residual(own_p, lenience * own_q), own_noise)",
        "race(own_p, own_noise)",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "the correction is drawn from q",
        "verification.py",
        "race(residual(own_p, lenience * own_q), own_noise)",
        "race(torch.where(own_q.sum(-1, keepdim=True) > 0, own_q, own_p), own_noise)",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "the first draft's q at every correction",
        "verification.py",
        "at = accepted.clamp_max(length - 1)[..., None]",
        "at = accepted.clamp_max(0)[..., None]",
        "test_statistics.py::test_decode_is_exact",
    ),
    Mutant(
        "a draft that was not drawn is always accepted",
        "verification.py",
        "1.0 if q is None else _at(q, draft)\n    accepted",
        "0.0 if q is None else _at(q, draft)\n    accepted",
        f"{SPEAKS}[argmax]",
    ),
    Mutant(
        "lenience leaves the redraw alone",
        "verification.py",
        "token = _own_token(draft, p, q, accepted, noise, lenience)",
        "token = _own_token(draft, p, q, accepted, noise, 1.0)",
        "test_statistics.py::test_threshold_emits_what_its_divergence_is_of",
    ),
    Mutant(
        "drift is averaged over drafts",
        "verification.py",
        ".sum(-1) / (accepted + 1)",
        ".sum(-1) / accepted.clamp_min(1)",
        f"{LOSSY} test_verification.py::test_threshold_tells_its_drift",
    ),
    # Distributions
    Mutant(
        "one token too many at the edge of top-p",
        "sampling.py",
        "last = ((mass - ranked) < settings.top_p)",
        "last = ((mass - ranked) <= settings.top_p)",
        "test_sampling.py::test_a_nucleus_ends_where_the_mass_reaches_top_p_exactly",
    ),
    Mutant(
        "top-p drops the token that crosses it",
        "sampling.py",
        "last = ((mass - ranked) < settings.top_p)",
        "last = (mass < settings.top_p)",
        "test_sampling.py::test_who_stays",
    ),
    Mutant(
        "one narrow row keeps the shortlist",
        "sampling.py",
        "(mass[..., -1] >= settings.top_p).all()",
        "(mass[..., -1] >= settings.top_p).any()",
        "test_sampling.py::test_a_wide_row_beside_a_narrow_one_keeps_its_nucleus",
    ),
    Mutant(
        "ties at the edge of top-k are dropped",
        "sampling.py",
        "p < p.topk(settings.top_k).values[..., -1:]",
        "p <= p.topk(settings.top_k + 1).values[..., -1:]",
        "test_sampling.py::test_who_stays",
    ),
    Mutant(
        "one token too many in top-k",
        "sampling.py",
        "p < p.topk(settings.top_k).values[..., -1:]",
        "p < p.topk(settings.top_k + 1).values[..., -1:]",
        "test_sampling.py::test_who_stays",
    ),
    Mutant(
        "top-p is of the mass before top-k",
        "sampling.py",
        "-torch.inf)\n        p = softmax(logits, heat)\n    if settings.top_p < 1:",
        "-torch.inf)\n    if settings.top_p < 1:",
        "test_sampling.py::test_who_stays",
    ),
    Mutant(
        "top-p forgets the temperature",
        "sampling.py",
        "_nucleus_edge(p, settings), -torch.inf)\n        p = softmax(logits, heat)",
        "_nucleus_edge(p, settings), -torch.inf)\n        p = softmax(logits)",
        "test_sampling.py::test_agrees_with_the_slow_reference",
    ),
    Mutant(
        "seeds are cut to 32 bits",
        "sampling.py",
        "_mix_int((seed >> 32) ^ low",
        "_mix_int(low",
        "test_sampling.py::test_noise_is_uncorrelated",
    ),
    Mutant(
        "confidence of an argmax is that of a one-hot",
        "sampling.py",
        "return ids, None, softmax(logits.float()).gather(-1, ids[:, None])[:, 0]",
        "return ids, None, torch.ones(ids.shape)",
        "test_decode.py::test_a_draft_model_tells_what_it_drew_from",
    ),
    Mutant(
        "temperature used twice on the drafter",
        "sampling.py",
        "    q = distribution(logits, settings)\n",
        "    q = distribution(logits / settings.temperature, settings)\n",
        "test_decode.py::test_a_draft_model_tells_what_it_drew_from",
    ),
    # Draft length
    Mutant(
        "a draft goes on where it is worth nothing",
        "draft_length.py",
        "return bool(chance > self.least[",
        "return bool(chance >= self.least[",
        "test_either.py::test_a_match_is_followed_as_far_as_the_controller_says",
    ),
    Mutant(
        "a refusal is not learnt from",
        "draft_length.py",
        "for i in range(min(accepted + 1, drafted, self.longest)):",
        "for i in range(min(accepted, drafted, self.longest)):",
        "test_draft_length.py::test_adaptive_comes_near_the_best_fixed_length",
    ),
    Mutant(
        "drafts behind a refusal are learnt from",
        "draft_length.py",
        "                if i <= accepted:\n",
        "                if True:\n",
        "test_draft_length.py::test_what_was_drafted_behind_a_refusal_teaches_nothing",
    ),
    Mutant(
        "positions behind a refusal are learnt from",
        "draft_length.py",
        "for i in range(min(accepted + 1, drafted, self.longest)):",
        "for i in range(min(drafted, self.longest)):",
        "test_draft_length.py::test_what_was_drafted_behind_a_refusal_teaches_nothing",
    ),
    Mutant(
        "probes come as often for ever",
        "draft_length.py",
        "min(self.patience * 2, last)",
        "self.patience",
        "test_draft_length.py::test_adaptive_gives_up_a_drafter_that_is_never_right",
    ),
    Mutant(
        "no probes",
        "draft_length.py",
        "self.probe = best == 0 and",
        "self.probe = False and",
        "test_draft_length.py::test_a_drafter_that_grows_sure_is_taken_up_again",
    ),
    Mutant(
        "measured seconds are ignored",
        "draft_length.py",
        "error = min(max(round.seconds / self.modelled[drafted], 0.1), 10.0)",
        "error = 1.0",
        "test_draft_length.py::test_adaptive_leaves_drafts_that_take_longer_than_modelled",
    ),
    Mutant(
        "0.9 is above 0.9",
        "draft_length.py",
        "6 if rate > 0.9 else 4",
        "6 if rate >= 0.9 else 4",
        "test_draft_length.py::test_threshold_steps_at_its_two_rates",
    ),
    # Cache
    Mutant(
        "the cache is read to its exact length",
        "cache.py",
        "        end = bucket(self.length)\n",
        "        end = self.length\n",
        "test_engine.py::test_what_a_drafter_reads_of_the_cache_keeps_its_shape_from_round_to_round",
    ),
    Mutant(
        "a full bucket is followed by an empty one",
        "cache.py",
        "return -(-length // BUCKET) * BUCKET",
        "return (length // BUCKET + 1) * BUCKET",
        "test_engine.py::test_buckets_are_the_smallest_that_hold_the_length",
    ),
    Mutant(
        "a buffer begins with garbage",
        "cache.py",
        "return states.new_zeros(",
        "return 7 + states.new_zeros(",
        "test_engine.py::test_what_a_drafter_reads_of_the_cache_keeps_its_shape_from_round_to_round",
    ),
    Mutant(
        "a rollback may go forward",
        "cache.py",
        "if not 0 <= length <= self.length:",
        "if not 0 <= length <= self.capacity:",
        "test_engine.py::test_rollback_moves_a_pointer_and_copies_nothing",
    ),
    Mutant(
        "every layer crops once more",
        "cache.py",
        "if self.cache.layers[0] is self:",
        "if True:",
        "test_engine.py::test_cropping_counts_from_the_end_and_once_for_all_layers",
    ),
    # Figures and the race
    Mutant(
        "the first token counts in the rate",
        "metrics.py",
        "(emitted_tokens(rounds) - first) / seconds",
        "emitted_tokens(rounds) / seconds",
        "test_metrics.py::test_rates_by_hand",
    ),
    Mutant(
        "prefill counts as a pass",
        "metrics.py",
        "passes = [r for r in rounds if r.index > 0]",
        "passes = list(rounds)",
        "test_metrics.py::test_rates_by_hand",
    ),
    Mutant(
        "drafts behind a refusal count as tried",
        "metrics.py",
        "if i > r.accepted + 1:",
        "if i > r.drafted:",
        "test_metrics.py::test_rates_by_hand",
    ),
    Mutant(
        "the lane that is ahead goes next",
        "race.py",
        "lane = min(clocks,",
        "lane = max(clocks,",
        "test_engine.py::test_the_lane_that_is_behind_goes_next",
    ),
    Mutant(
        "every lane ends by its limit",
        "race.py",
        'if self._emitted(lane) >= settings.max_new_tokens else "stop"',
        'if True else "stop"',
        "test_engine.py::test_a_lane_says_why_it_ended",
    ),
    Mutant(
        "a prompt leaves no room for new tokens",
        "race.py",
        "limit = pair.context - settings.max_new_tokens",
        "limit = pair.context",
        "test_engine.py::test_prompts_that_do_not_fit",
    ),
    # Kernels
    Mutant(
        "no barrier between phases",
        "kernels/sharing.py",
        "    while _look(tickets, phase * PLACES + PLACES // 2) < chunks:\n        pass\n",
        "",
        "test_kernels.py::test_nobody_leaves_a_phase_before_its_last_chunk_is_done",
    ),
    Mutant(
        "tickets order no memory",
        "kernels/sharing.py",
        'builder.load_atomic(at, "seq_cst", 8, typ=_I64)',
        'builder.load_atomic(at, "monotonic", 8, typ=_I64)',
        "test_kernels.py::test_what_a_chunk_wrote_is_seen_behind_its_phase",
    ),
]


class Stale(Exception):
    """The table does not fit the code or the tests."""


def mutate(text: str, mutant: Mutant) -> str:
    """`text` with the bug in it.

    Raises:
        Stale: the text to be replaced does not occur exactly once.
    """
    found = text.count(mutant.old)
    if found != 1:
        raise Stale(f"{mutant.name}: found {found} times in {mutant.file}, not once: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def copy_tree(to: Path) -> None:
    """What the tests need of the tree, with times kept, so that compiled kernels remain valid."""
    for name in ("spec_decode", "tests", "assets", "docs"):
        # Python's own compiled files are left out: they are told apart by time and size, which a mutant may share.
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.pyc", "*.tmp.*"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy2(path, to)


def run(tree: Path, nodes: list[str]) -> tuple[int | None, str]:
    """pytest's exit code, None after `TIMEOUT`, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "--durations=0", "-p", "no:cacheprovider", *nodes]
    # One thread: the models of these tests are small.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def check(tree: Path, mutant: Mutant) -> str | None:
    """The test that failed with the bug in place, None if none did.

    Raises:
        Stale: the bug cannot be put in place, or pytest cannot run the tests.
    """
    path = tree / "spec_decode" / mutant.file
    kept = path.with_suffix(".kept")
    shutil.copy2(path, kept)
    try:
        path.write_text(mutate(path.read_text(encoding="utf-8"), mutant), encoding="utf-8")
        code, output = run(tree, mutant.nodes)
    finally:
        shutil.move(kept, path)  # with its time
    if code is None:
        return "timeout"
    if code == FAILED:
        failed = [line.split()[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failed[0].removeprefix("tests/") if failed else "a test"
    if code == PASSED:
        return None
    raise Stale(f"{mutant.name}: pytest ended with {code}\n{output[-2000:]}")


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not chosen:
        print("No mutant has such a name.")
        return 2
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        try:
            for mutant in chosen:  # before anything takes time
                mutate((tree / "spec_decode" / mutant.file).read_text(encoding="utf-8"), mutant)
            code, output = run(tree, sorted({node for mutant in chosen for node in mutant.nodes}))
            if code != PASSED:
                raise Stale(f"The tests fail without a mutant:\n{output[-4000:]}")
            for mutant in chosen:
                begun = time.monotonic()
                killer = check(tree, mutant)
                print(
                    f"{'survived' if killer is None else 'killed  '}  {mutant.name}"
                    f"  ({killer or 'by nothing'}, {time.monotonic() - begun:.0f} s)",
                    flush=True,
                )
                if killer is None:
                    survived.append(mutant.name)
        except Stale as error:
            print(error)
            return 2
    print(f"{len(chosen) - len(survived)} of {len(chosen)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
