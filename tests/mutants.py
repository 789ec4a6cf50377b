"""Mutation testing: deliberate bugs, each of which a named test must find.

    python -m tests.mutants            # all of them
    python -m tests.mutants NAME…      # those whose names contain one of these words

Every mutant replaces one piece of text of one file, in a temporary copy of the tree, and runs the tests that should
fail. The text must occur exactly once: a table that no longer fits the code is an error, not a pass, and
`tests/test_mutants.py` finds it before. The named tests run first without a mutant, since a test that fails anyway
kills nothing. Exit code 0: all were killed; 1: one survived; 2: the table is out of date, or a test fails without a
mutant. pytest does not collect this file.

Not in the table, since no test can see it: `<` for `<=` between a uniform number and a ratio of probabilities. They are
equal with probability 0.
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
ROWS = "test_rounds.py::test_every_row_is_decoded_as_it_is_alone[rejection-llama-model]"
COUPLED = "test_exactness.py::test_coupled_lanes_are_identical[llama-0.7-0.9-0-itself]"


MUTANTS = [
    # Independence of noise
    Mutant(
        "correction drawn with draft noise",
        "noise.py",
        "RESIDUAL, positions[:, :1])",
        "DRAFT, positions[:, :1])",
        f"{SPEAKS}[correction]",
    ),
    Mutant(
        "acceptance decided with draft noise",
        "noise.py",
        "ACCEPT, positions[:, :1])",
        "DRAFT, positions[:, :1])",
        f"{SPEAKS}[acceptance]",
    ),
    Mutant(
        "correction drawn with the noise of acceptance",
        "noise.py",
        "RESIDUAL, positions[:, :1])",
        "ACCEPT, positions[:, :1])",
        f"{SPEAKS}[both]",
    ),
    Mutant(
        "one uniform number for a whole round",
        "noise.py",
        "positions[:, :-1], ACCEPT",
        "positions[:, :1].repeat(1, self.count - 1), ACCEPT",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "one draft noise for a whole round",
        "drafters/model.py",
        "draw(logits, start + i, start",
        "draw(logits, start, start",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "draft noise is correction noise",
        "sampling.py",
        "noise.DRAFT, start)",
        "noise.RESIDUAL, start)",
        f"{SPEAKS}[correction]",
    ),
    Mutant(
        "draft noise is that of acceptance",
        "sampling.py",
        "noise.DRAFT, start)",
        "noise.ACCEPT, start)",
        f"{SPEAKS}[acceptance]",
    ),
    Mutant(
        "coupled drafts have noise of their own",
        "sampling.py",
        "logits.shape[-1], noise.TARGET)",
        "logits.shape[-1], noise.DRAFT)",
        COUPLED,
    ),
    Mutant(
        "the same noise at every position",
        "noise.py",
        "self.starts[:, None] + torch.arange(self.count, device=self.starts.device)",
        "torch.full((len(self.starts), self.count), 7, device=self.starts.device)",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "the noise of acceptance does not depend on the round",
        "noise.py",
        "ACCEPT, positions[:, :1])",
        "ACCEPT)",
        "test_sampling.py::test_a_round_shares_noise_with_no_other_and_between_no_two_uses",
    ),
    Mutant(
        "the noise of corrections does not depend on the round",
        "noise.py",
        "RESIDUAL, positions[:, :1])",
        "RESIDUAL)",
        "test_sampling.py::test_a_round_shares_noise_with_no_other_and_between_no_two_uses",
    ),
    Mutant(
        "the noise of drafts does not depend on the round",
        "sampling.py",
        "noise.DRAFT, start)",
        "noise.DRAFT)",
        "test_sampling.py::test_a_round_shares_noise_with_no_other_and_between_no_two_uses",
    ),
    Mutant(
        "the noise of the target's own sample depends on the round",
        "noise.py",
        "self._positions, self.vocabulary, TARGET)",
        "self._positions, self.vocabulary, TARGET, self._positions[:, :1])",
        "test_sampling.py::test_a_round_shares_noise_with_no_other_and_between_no_two_uses",
    ),
    Mutant(
        "drafts of a rule that draws independently are drawn with the target's stream",
        "sampling.py",
        "noise.DRAFT, start)",
        "noise.TARGET, start)",
        "test_sampling.py::test_a_round_shares_noise_with_no_other_and_between_no_two_uses",
    ),
    Mutant(
        "every drafted token begins a round of its own",
        "drafters/model.py",
        "draw(logits, start + i, start,",
        "draw(logits, start + i, start + i,",
        "test_decode.py::test_a_draft_model_tells_what_it_drew_from[rejection]",
    ),
    # What is drafted
    Mutant(
        "the token that ends a draft early is left out",
        "drafters/model.py",
        "if not go_on(drawn, stop):\n                break\n",
        "if not go_on(drawn, stop):\n                drawn = drawn[:-1] or drawn\n                break\n",
        f"{SPEAKS}[unsure]",
    ),
    Mutant(
        "the early stop does not reach the drafter",
        "decode.py",
        "draft_on_host(state, length, lane.lengths.early_stop)",
        "draft_on_host(state, length, None)",
        CONTROLLER,
    ),
    Mutant(
        "a refused draft stays in the drafter's cache",
        "drafters/model.py",
        "min(self.cache.length, self.length - 1)",
        "min(self.cache.length, self.length)",
        "test_exactness.py::test_greedy_equals_generate[llama-stranger]",
    ),
    Mutant(
        "the drafter reads again what it has read",
        "drafters/model.py",
        "min(self.cache.length, self.length - 1)",
        "self.length - len(tokens) - 1",
        "test_exactness.py::test_the_draft_model_computes_nothing_twice",
    ),
    Mutant(
        "drafts are drawn at the position before",
        "drafters/model.py",
        "draw(logits, start + i, start",
        "draw(logits, start + i - 1, start",
        COUPLED,
    ),
    Mutant(
        "a drafter on an accelerator is not fed the end of an accepted draft",
        "drafters/model.py",
        "state.lengths.to(self.model.device) - unread)",
        "state.lengths.to(self.model.device) - unread + 1)",
        ROWS,
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
        "a whole draft is told as ended early",
        "drafters/__init__.py",
        "stopped_early=count < most",
        "stopped_early=count <= most",
        "test_mtp.py::test_a_draft_ends_after_the_token_that_the_early_stop_names",
    ),
    Mutant(
        "the other drafter is always credited",
        "drafters/either.py",
        "        if self.asked:\n",
        "        if True:\n",
        "test_either.py::test_each_is_judged_by_its_own_drafts",
    ),
    Mutant(
        "a match is credited for the other drafter's draft",
        "drafters/either.py",
        'self._observe("other", len(tokens) > 1)',
        "self._observe(size or 4, len(tokens) > 1)",
        "test_either.py::test_each_is_judged_by_its_own_drafts",
    ),
    Mutant(
        "the other drafter is credited for a match",
        "drafters/either.py",
        "self._observe(size, held[0])",
        'self._observe("other", held[0])',
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
        "test_either.py::test_how_long_a_match_holds_is_estimated_from_where_it_first_fails",
    ),
    Mutant(
        "a match is followed to the end",
        "drafters/either.py",
        "len(continuation) and (stop is None or stop.go_on(confidences)):",
        "len(continuation):",
        "test_either.py::test_a_match_is_followed_as_far_as_the_controller_says",
    ),
    Mutant(
        "the trie does not count",
        "drafters/suffix.py",
        "child.count += 1",
        "child.count = 1",
        "test_suffix.py::test_drafts_follow_what_was_most_frequent",
    ),
    Mutant(
        "the trie outlives its text",
        "drafters/suffix.py",
        "def close(self) -> None:\n        self._clear()",
        "def close(self) -> None:\n        pass",
        "test_suffix.py::test_nothing_is_kept_of_an_earlier_text",
    ),
    Mutant(
        "the next text begins with the trie of the one before",
        "drafters/suffix.py",
        "        self._clear()\n        self.extend(prompt[",
        "        self.extend(prompt[",
        "test_suffix.py::test_nothing_is_kept_of_an_earlier_text",
    ),
    Mutant(
        "the whole of a prompt is remembered",
        "drafters/suffix.py",
        "self.extend(prompt[-self.remembered :])",
        "self.extend(prompt)",
        "test_suffix.py::test_of_a_prompt_only_the_end_is_remembered",
    ),
    Mutant(
        "the least frequent continuation is followed",
        "drafters/suffix.py",
        "max(reversed(self.children.items())",
        "min(reversed(self.children.items())",
        "test_suffix.py::test_drafts_follow_what_was_most_frequent",
    ),
    Mutant(
        "of equally frequent continuations the earliest",
        "drafters/suffix.py",
        "max(reversed(self.children.items())",
        "max(iter(self.children.items())",
        "test_suffix.py::test_drafts_follow_what_was_most_frequent",
    ),
    Mutant(
        "a short match is followed as far as a long one",
        "drafters/suffix.py",
        "min(length, self.factor * size)",
        "length",
        "test_suffix.py::test_drafts_follow_what_was_most_frequent",
    ),
    Mutant(
        "the suffix drafter leaves out the token that ends a draft early",
        "drafters/suffix.py",
        "kept = next((n for n in",
        "kept = next((n - 1 or 1 for n in",
        "test_suffix.py::test_a_draft_ends_where_the_early_stop_says",
    ),
    Mutant(
        "MTP continues from the last row of the pass",
        "state.py",
        "predicted = hidden.gather(1, at)[:, 0]",
        "predicted = hidden[:, -1]",
        "test_mtp.py::test_greedy_drafts_are_those_of_transformers[dense-False-8-3]",
    ),
    Mutant(
        "MTP draws with the noise of the position before",
        "drafters/mtp.py",
        "self._draw(out, places + i, places + 1, state.seed))\n            if",
        "self._draw(out, places + i - 1, places + 1, state.seed))\n            if",
        "test_mtp.py::test_coupled_drafts_are_drawn_with_the_targets_noise_of_their_positions[False-False]",
    ),
    Mutant(
        "MTP in 8 bits draws with the noise of the position before",
        "drafters/mtp.py",
        "self._draw(out, places + i, places + 1, state.seed))\n                else:",
        "self._draw(out, places + i - 1, places + 1, state.seed))\n                else:",
        "test_mtp.py::test_coupled_drafts_are_drawn_with_the_targets_noise_of_their_positions[True-False]",
    ),
    Mutant(
        "MTP draws a whole draft with the noise of the position before",
        "drafters/mtp.py",
        "state.length + np.arange(length), TARGET",
        "state.length - 1 + np.arange(length), TARGET",
        "test_mtp.py::test_the_int8_step_is_the_assistants_own_forward[coupled-silu-centroids]",
    ),
    Mutant(
        "every token drafted by MTP begins a round of its own",
        "drafters/mtp.py",
        "self._draw(out, places + i, places + 1, state.seed))\n            if",
        "self._draw(out, places + i, places + i, state.seed))\n            if",
        "test_mtp.py::test_drafts_of_independent_rules_are_drawn_with_noise_of_their_round[False-False]",
    ),
    Mutant(
        "every token drafted by MTP in 8 bits begins a round of its own",
        "drafters/mtp.py",
        "self._draw(out, places + i, places + 1, state.seed))\n                else:",
        "self._draw(out, places + i, places + i, state.seed))\n                else:",
        "test_mtp.py::test_drafts_of_independent_rules_are_drawn_with_noise_of_their_round[True-False]",
    ),
    Mutant(
        "every token drafted from centroids begins a round of its own",
        "drafters/mtp.py",
        "[None], places + i, places + 1, state.seed)",
        "[None], places + i, places + i, state.seed)",
        "test_mtp.py::test_drafts_of_independent_rules_are_drawn_with_noise_of_their_round[True-True]",
    ),
    Mutant(
        "MTP leaves out the token that ends a draft early",
        "drafters/mtp.py",
        "if not go_on(drawn, stop):\n                break\n",
        "if not go_on(drawn, stop):\n                drawn = drawn[:-1] or drawn\n                break\n",
        "test_mtp.py::test_a_draft_ends_after_the_token_that_the_early_stop_names",
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
        "back = lengths[:, None] - 1 - torch.arange",
        "back = lengths[:, None] - torch.arange",
        "test_mtp.py::test_greedy_drafts_are_those_of_transformers",
    ),
    # The loop
    Mutant(
        "one token too many is drafted at the end",
        "decode.py",
        "within(lane.lengths.choose(), left - 1, recorded)",
        "within(lane.lengths.choose(), left, recorded)",
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
        "state.py",
        "self.cache.keep(last)",
        "self.cache.keep(torch.minimum(last + 1, self.cache.lengths))",
        "test_exactness.py::test_greedy_equals_generate[llama-scripted]",
    ),
    Mutant(
        "rows of a batch share the noise of the first",
        "noise.py",
        "for row, *part in zip(rows, parts,",
        "for row, *part in zip(rows[:1] * len(rows), parts,",
        "test_batch.py::test_two_rows_with_the_same_prompt_are_independent",
    ),
    Mutant(
        "on a GPU the rows of a batch share the noise of the first",
        "noise.py",
        "(word.view(-1, *[1] * (position.dim() - 1)) for word in words)",
        "(word.flatten()[0] for word in words)",
        "test_batch.py::test_the_noise_of_a_row_is_that_of_its_seed[False]",
    ),
    Mutant(
        "the keys and values of other rows stay in the batch",
        "state.py",
        "self.cache.select(index, length - 1)",
        "self.cache.select(torch.arange(len(rows), device=index.device), length - 1)",
        "test_batch.py::test_selected_rows_are_what_they_were",
    ),
    Mutant(
        "a row's text goes on after its end",
        "batch.py",
        "taken = tokens[: min(end, self.left)]",
        "taken = tokens[: self.left]",
        "test_batch.py::test_rows_end_where_their_texts_do",
    ),
    Mutant(
        "a match is judged by what another drafter drew from",
        "drafters/rows.py",
        "q = torch.where(own[..., None], one_hot(ours.clamp_min(0), made.q.shape[-1]), made.q)",
        "q = made.q",
        "test_batch.py::test_every_row_follows_the_target[rejection-mtp+lookup]",
    ),
    Mutant(
        "8-bit attention reads the first text of a batch",
        "cpu/kernels/passes.py",
        "k, v = keys[sequences[r], head // group], values[sequences[r], head // group]",
        "k, v = keys[0, head // group], values[0, head // group]",
        "test_batch.py::test_rows_of_several_texts_have_the_same_bits_as_alone",
    ),
    Mutant(
        "no rollback",
        "state.py",
        "        self.cache.keep(last)  # the last token has not been read yet\n",
        "",
        "test_exactness.py::test_greedy_equals_generate[llama-scripted]",
    ),
    Mutant(
        "the target's own token is written a position late",
        "state.py",
        "scatter_(1, last[:, None]",
        "scatter_(1, last[:, None] + 1",
        TELLS,
    ),
    Mutant(
        "the target's own token overwrites the last one accepted",
        "state.py",
        "scatter_(1, last[:, None]",
        "scatter_(1, last[:, None] - 1",
        TELLS,
    ),
    Mutant(
        "the host does not learn how long the text is",
        "state.py",
        "        self.cache.settle(length - 1)\n",
        "",
        "test_exactness.py::test_the_embedded_pair_as_it_ships_is_exact_and_worth_it[0.0]",
    ),
    Mutant(
        "all rows keep as much as the one that keeps the most",
        "state.py",
        "self.lengths.copy_(last + 1)",
        "self.lengths += accepted.amax() + 1",
        ROWS,
    ),
    Mutant(
        "both lanes write to one cache",
        "decode.py",
        "        twin.cache = twin.passed.cache\n",
        "        twin.passed = self.passed\n",
        "test_engine.py::test_a_lane_begins_with_the_bits_it_would_have_computed[llama]",
    ),
    Mutant(
        "temperature used twice on the target",
        "decode.py",
        "else distribution(logits, settings)",
        "else distribution(logits / settings.temperature, settings)",
        f"{SPEAKS}[sampling] {TELLS}[coupled]",
    ),
    Mutant(
        "no top-p on the target",
        "decode.py",
        "else distribution(logits, settings)",
        "else softmax(logits, settings.temperature)",
        f"{SPEAKS}[sampling] {TELLS}[coupled]",
    ),
    Mutant(
        "only the first row is checked for NaN",
        "narrate.py",
        'host["target values"][::TOP])',
        'host["target values"][:1])',
        NAN,
    ),
    Mutant(
        "only the last row is checked for NaN",
        "narrate.py",
        'host["target values"][::TOP])',
        'host["target values"][-TOP::TOP])',
        NAN,
    ),
    Mutant(
        "p of the target's own token from the first row",
        "narrate.py",
        "verdict.accepted * p.shape[-1] + verdict.token",
        "verdict.token",
        TELLS,
    ),
    Mutant(
        "p of a draft from the row after it",
        "narrate.py",
        "p[:, :n].gather",
        "p[:, -n:].gather",
        TELLS,
    ),
    Mutant(
        "bonus and correction exchanged",
        "narrate.py",
        '"bonus" if accepted == len(ids) else "correction"',
        '"correction" if accepted == len(ids) else "bonus"',
        TELLS,
    ),
    Mutant(
        "alternatives of a draft from the first row",
        "narrate.py",
        "host.target_top[i], drafter_top",
        "host.target_top[0], drafter_top",
        "test_rules.py::test_alternatives_are_the_likeliest_of_target_and_drafter[rejection-0.8]",
    ),
    Mutant(
        "alternatives of the target's own token from the last row",
        "narrate.py",
        "host.target_top[accepted]",
        "host.target_top[-1]",
        "test_rules.py::test_alternatives_are_the_likeliest_of_target_and_drafter[rejection-0.8]",
    ),
    Mutant(
        "the drafter's alternatives from the first row",
        "narrate.py",
        "host.drafter_top[i] if",
        "host.drafter_top[0] if",
        "test_rules.py::test_alternatives_are_the_likeliest_of_target_and_drafter[rejection-0.8]",
    ),
    Mutant(
        "a comparison is told of tokens that were not reached",
        "verification/__init__.py",
        "return compared.masked_fill((positions > accepted[..., None])[..., None], torch.nan)",
        "return compared",
        "test_rules.py::test_what_was_compared_decides[rejection-0.8]",
    ),
    Mutant(
        "the comparison of the refused token is not told",
        "verification/__init__.py",
        "positions > accepted[..., None]",
        "positions >= accepted[..., None]",
        "test_rules.py::test_what_was_compared_decides[rejection-0.8]",
    ),
    Mutant(
        "a bonus is told as drawn from a residual",
        "narrate.py",
        '"mass" in host and accepted < n',
        '"mass" in host',
        "test_rules.py::test_the_numbers_are_those_of_the_noise_and_the_residual_what_was_drawn_from[rejection]",
    ),
    Mutant(
        "a round without a draft names a drafter",
        "decode.py",
        'outcome.draft.drafter if host.ids else ""',
        "outcome.draft.drafter",
        "test_rules.py::test_a_round_names_the_drafter_of_its_draft",
    ),
    Mutant(
        "the drift is told as the number of refused tokens",
        "narrate.py",
        'int(host["refused"][0])',
        'int(host["kl"][0])',
        LOSSY,
    ),
    Mutant(
        "lenience is ignored at temperature 0",
        "verification/threshold.py",
        "threshold_argmax(case.draft, case.p, case.lenience)",
        "threshold_argmax(case.draft, case.p, 1.0)",
        LOSSY,
    ),
    Mutant(
        "draft positions count from 0",
        "narrate.py",
        "host.p[i], q, i + 1,",
        "host.p[i], q, i,",
        TELLS,
    ),
    Mutant(
        "the tail of a text is kept back at the limit",
        "decode.py",
        "last=ended or left == 0",
        "last=ended",
        TEXT,
    ),
    Mutant(
        "the tail of a text is kept back at its end",
        "decode.py",
        "last=ended or left == 0",
        "last=left == 0",
        TEXT,
    ),
    Mutant(
        "refused drafts get into the text stream",
        "narrate.py",
        "aside = text.fork()",
        "aside = text",
        TEXT,
    ),
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
        "reading the prompt is on no clock",
        "decode.py",
        "laps[1] + prefill.seconds]",
        "laps[1]]",
        SECONDS,
    ),
    Mutant(
        "the controller learns from the prefill",
        "decode.py",
        "            if index > 0:\n                lane.lengths.observe(",
        "            if True:\n                lane.lengths.observe(",
        CONTROLLER,
    ),
    Mutant(
        "the controller learns nothing",
        "decode.py",
        "lane.lengths.observe(done, this.outcome.draft.stopped_early)",
        "pass",
        CONTROLLER,
    ),
    Mutant(
        "the controller is not told that a draft ended early",
        "decode.py",
        "observe(done, this.outcome.draft.stopped_early)",
        "observe(done, None)",
        CONTROLLER,
    ),
    # The rules
    Mutant(
        "the last draft is never accepted",
        "verification/__init__.py",
        "accepted = leading_run(draft == own[..., :-1])",
        "accepted = leading_run(draft == own[..., :-1]).clamp_max(max(draft.shape[-1] - 1, 0))",
        GREEDY,
    ),
    Mutant(
        "the last draft is never kept by rejection",
        "verification/rejection.py",
        "accepted = leading_run(uniform * qx < px)",
        "accepted = leading_run(uniform * qx < px).clamp_max(max(draft.shape[-1] - 1, 0))",
        "test_verification.py::test_a_perfect_drafter_is_always_accepted",
    ),
    Mutant(
        "accepted drafts are counted, not run through",
        "verification/__init__.py",
        "return ok.long().cumprod(-1).sum(-1)",
        "return ok.long().sum(-1)",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "the bonus loses what was drafted before it",
        "verification/__init__.py",
        "torch.where(accepted[..., None] == length, 0.0, own_q)",
        "own_q",
        f"{SPEAKS}[acceptance]",
    ),
    Mutant(
        "the correction is drawn from p",
        "verification/__init__.py",
        "exponential_argmax(normalized(rest, own_p), own_noise)",
        "exponential_argmax(own_p, own_noise)",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "the correction is drawn from q",
        "verification/__init__.py",
        "exponential_argmax(normalized(rest, own_p), own_noise)",
        "exponential_argmax(torch.where(own_q.sum(-1, keepdim=True) > 0, own_q, own_p), own_noise)",
        f"{SPEAKS}[several]",
    ),
    Mutant(
        "the first draft's q at every correction",
        "verification/__init__.py",
        "accepted.clamp_max(length - 1)",
        "accepted.clamp_max(0)",
        "test_verification.py::test_rejection_and_threshold_agree_with_the_loop",
    ),
    Mutant(
        "a draft that was not drawn is always accepted",
        "verification/rejection.py",
        "torch.ones_like(px) if q is None",
        "torch.zeros_like(px) if q is None",
        f"{SPEAKS}[argmax] test_verification.py::test_rejection_by_hand",
    ),
    Mutant(
        "lenience leaves the redraw alone",
        "verification/threshold.py",
        "own_token(draft, p, q, accepted, noise, lenience)",
        "own_token(draft, p, q, accepted, noise, 1.0)",
        "test_statistics.py::test_threshold_emits_what_its_divergence_is_of",
    ),
    Mutant(
        "drift is averaged over drafts",
        "verification/threshold.py",
        "/ (verdict.accepted + 1)",
        "/ verdict.accepted.clamp_min(1)",
        f"{LOSSY} test_verification.py::test_threshold_tells_its_drift",
    ),
    Mutant(
        "the refused token counts as let through",
        "verification/threshold.py",
        "refused = (kept & ~exact)",
        "refused = (visited & ~exact)",
        LOSSY,
    ),
    Mutant(
        "a lossy rule is greedy at temperature 0",
        "rules.py",
        "if temperature == 0 and rule.exact else rule",
        "if temperature == 0 else rule",
        f"{LOSSY} test_rules.py::test_at_temperature_zero_an_exact_rule_is_the_greedy_one",
    ),
    Mutant(
        "block: h without what was refused",
        "verification/block.py",
        "mass / (mass + refused)).nan_to_num(0.0)",
        "mass / mass).nan_to_num(0.0)",
        "test_verification.py::test_block_is_the_papers_algorithm",
    ),
    Mutant(
        "block: r grows beyond 1",
        "verification/block.py",
        "(gain - _running_max(gain)).exp()",
        "gain.exp()",
        "test_verification.py::test_block_is_the_papers_algorithm",
    ),
    Mutant(
        "block stops at the first refusal",
        "verification/block.py",
        "torch.where(uniform < bound, places, 0).amax(-1)",
        "(uniform < bound).long().cumprod(-1).sum(-1)",
        "test_verification.py::test_block_is_the_papers_algorithm",
    ),
    Mutant(
        "block: the bonus is drawn from a residual",
        "verification/block.py",
        "torch.where(whole, own_p, (kept * own_p - own_q).clamp_min(0))",
        "(kept * own_p - own_q).clamp_min(0)",
        "test_verification.py::test_block_is_the_papers_algorithm",
    ),
    Mutant(
        "block: the residual forgets r",
        "verification/block.py",
        "(kept * own_p - own_q)",
        "(own_p - own_q)",
        "test_verification.py::test_block_is_the_papers_algorithm",
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
        "-torch.inf)\n        p = softmax(logits, temperature)\n    if settings.top_p < 1:",
        "-torch.inf)\n    if settings.top_p < 1:",
        "test_sampling.py::test_who_stays",
    ),
    Mutant(
        "top-p forgets the temperature",
        "sampling.py",
        "_nucleus_edge(p, settings), -torch.inf)\n        p = softmax(logits, temperature)",
        "_nucleus_edge(p, settings), -torch.inf)\n        p = softmax(logits)",
        "test_sampling.py::test_agrees_with_the_slow_reference",
    ),
    Mutant(
        "seeds are cut to 32 bits",
        "noise_hash.py",
        "wrap((seed >> 32) ^ low ^",
        "wrap(low ^",
        "test_sampling.py::test_noise_is_uncorrelated",
    ),
    Mutant(
        "confidence of an argmax is that of a one-hot",
        "sampling.py",
        "p.gather(-1, ids[:, None])[:, 0], likeliest(p, TOP))",
        "torch.ones(ids.shape), likeliest(p, TOP))",
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
        "return bool(reach > self.least[",
        "return bool(reach >= self.least[",
        "test_either.py::test_a_match_is_followed_as_far_as_the_controller_says",
    ),
    Mutant(
        "a rejection is no evidence",
        "draft_length.py",
        "for i in range(min(accepted + 1, drafted, self.longest)):",
        "for i in range(min(accepted, drafted, self.longest)):",
        "test_draft_length.py::test_adaptive_comes_near_the_best_fixed_length",
    ),
    Mutant(
        "confidences of drafts after a rejection are evidence",
        "draft_length.py",
        "                if i <= accepted:\n",
        "                if True:\n",
        "test_draft_length.py::test_drafts_after_a_rejection_are_no_evidence",
    ),
    Mutant(
        "positions after a rejection are evidence",
        "draft_length.py",
        "for i in range(min(accepted + 1, drafted, self.longest)):",
        "for i in range(min(drafted, self.longest)):",
        "test_draft_length.py::test_drafts_after_a_rejection_are_no_evidence",
    ),
    Mutant(
        "probes come as often for ever",
        "draft_length.py",
        "min(self.patience * 2, last)",
        "self.patience",
        "test_draft_length.py::test_adaptive_stops_drafting_if_no_draft_is_accepted",
    ),
    Mutant(
        "no probes",
        "draft_length.py",
        "self.probe = best == 0 and",
        "self.probe = False and",
        "test_draft_length.py::test_drafting_resumes_when_confidence_rises",
    ),
    Mutant(
        "measured seconds are ignored",
        "draft_length.py",
        "error = min(max(round.seconds / self.modelled[drafted], 0.1), 10.0)",
        "error = 1.0",
        "test_draft_length.py::test_adaptive_avoids_lengths_that_take_longer_than_modelled",
    ),
    Mutant(
        "0.9 is above 0.9",
        "draft_length.py",
        "6 if rate > 0.9 else 4",
        "6 if rate >= 0.9 else 4",
        "test_draft_length.py::test_rate_steps_at_its_two_rates",
    ),
    # Cache
    Mutant(
        "the cache is read to its exact length",
        "cache.py",
        "width = self.width(max(end - self.length, 0))",
        "width = max(end, self.length)",
        "test_engine.py::test_what_a_drafter_reads_of_the_cache_keeps_its_shape_from_round_to_round",
    ),
    Mutant(
        "all rows are written where the first one ends",
        "cache.py",
        "positions[:, None, :, None].expand_as(states)",
        "positions[:1, None, :, None].expand_as(states)",
        ROWS,
    ),
    Mutant(
        "the steps of a draft read different buckets",
        "cache.py",
        "bucket(max(self.length + count, self._through))",
        "bucket(self.length + count)",
        "test_rounds.py::test_a_round_reads_one_bucket_from_its_first_step_to_its_last[model]",
    ),
    Mutant(
        "MTP reads another bucket than the target",
        "drafters/mtp.py",
        "state.cache.read(layer, state.length + length)",
        "state.cache.read(layer)",
        "test_rounds.py::test_a_round_reads_one_bucket_from_its_first_step_to_its_last[mtp]",
    ),
    Mutant(
        "a sliding layer sees one position beyond its window",
        "masks.py",
        "seen &= keys > queries - window",
        "seen &= keys >= queries - window",
        "test_rounds.py::test_masks_are_those_of_transformers[gemma3-sdpa]",
    ),
    Mutant(
        "a token sees the one after it",
        "masks.py",
        "seen = keys <= queries",
        "seen = keys <= queries + 1",
        "test_rounds.py::test_masks_are_those_of_transformers[llama-sdpa]",
    ),
    Mutant(
        "the masks of a model that takes none are kept",
        "loading/rollback.py",
        "        target.masks = None\n",
        "",
        "test_rounds.py::test_a_model_that_fails_with_our_masks_keeps_those_of_transformers",
    ),
    Mutant(
        "a prompt is read as a batch of experts",
        "target.py",
        '"batched_mm" if tokens <= (PADDED_ROUND if self._pads else LONGEST_ROUND) else self._experts',
        '"batched_mm"',
        "test_rounds.py::test_a_batch_of_experts_computes_what_single_experts_do",
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
    Mutant(
        "drafts do not say which drafter made them",
        "costs.py",
        "drafts.setdefault(r.drafter, [])",
        'drafts.setdefault("", [])',
        "test_costs.py::test_with_two_drafters_a_draft_costs_what_the_named_one_takes",
    ),
    Mutant(
        "the cost of a draft is mixed over the drafters",
        "costs.py",
        "_drafting(prior, evidence.drafts.get(drafter, []))",
        "_drafting(prior, sum(evidence.drafts.values(), []))",
        "test_costs.py::test_with_two_drafters_a_draft_costs_what_the_named_one_takes",
    ),
    Mutant(
        "every race moves the costs as if it were the first",
        "costs.py",
        "if prior.errors:",
        "if False:",
        "test_costs.py::test_the_more_races_there_were_the_less_one_moves_the_costs",
    ),
    Mutant(
        "the probabilities of the target are not read",
        "prediction.py",
        "0.0 if token.p is None else",
        "0.0 if True else",
        "test_prediction.py::test_the_targets_probabilities_tell_what_an_adaptive_race_left_undrafted",
    ),
    # Recorded rounds
    Mutant(
        "a recorded round draws with the seed of the race before",
        "graphs.py",
        "kept.seed.copy_(seed_words(lane.settings.seed))",
        "kept.seed.copy_(kept.seed)",
        "test_graphs.py::test_recorded_rounds_are_the_eager_ones[llama-mtp-rules0]",
    ),
    Mutant(
        "a recorded round is not compared with the eager one",
        "graphs.py",
        "if not _agree(expected, result):",
        "if False:",
        "test_graphs.py::test_without_a_graph_rounds_stay_eager_and_say_so",
    ),
    Mutant(
        "what was recorded of one drafter serves the next",
        "graphs.py",
        " or models != self._models:",
        ":",
        "test_graphs.py::test_another_drafter_gets_recordings_of_its_own",
    ),
    Mutant(
        "a recording serves every bucket",
        "graphs.py",
        "key = (*key, state.cache.width(count))",
        "key = (*key, 0)",
        "test_graphs.py::test_a_bucket_is_part_of_what_was_recorded",
    ),
    # Figures and the race
    Mutant(
        "the first token counts in the rate",
        "metrics.py",
        "return rate(self.tokens - self.first_tokens,",
        "return rate(self.tokens,",
        "test_metrics.py::test_rates_by_hand",
    ),
    Mutant(
        "prefill counts as a pass",
        "metrics.py",
        "self.passes += r.index > 0",
        "self.passes += 1",
        "test_metrics.py::test_rates_by_hand",
    ),
    Mutant(
        "drafts after a refusal count as tried",
        "metrics.py",
        "if i > r.accepted + 1:",
        "if i > r.drafted:",
        "test_metrics.py::test_rates_by_hand",
    ),
    Mutant(
        "the lane that is ahead goes next",
        "sources/local.py",
        "lane = min(clocks,",
        "lane = max(clocks,",
        "test_engine.py::test_the_lane_that_is_behind_goes_next",
    ),
    Mutant(
        "every lane ends by its limit",
        "sources/local.py",
        'if emitted >= self.settings.max_new_tokens else "stop"',
        'if True else "stop"',
        "test_engine.py::test_a_lane_says_why_it_ended",
    ),
    Mutant(
        "a prompt leaves no room for new tokens",
        "sources/local.py",
        "limit = pair.context - new - beside",
        "limit = pair.context - beside",
        "test_engine.py::test_prompts_that_do_not_fit",
    ),
    Mutant(
        "chunks of a prompt are as large at its end as at its start",
        "target.py",
        "for size, furthest in self.chunks if position <= furthest)",
        "for size, furthest in self.chunks)",
        "test_engine.py::test_a_prompt_is_read_in_the_chunks_of_its_positions",
    ),
    Mutant(
        "a forced prefix takes no room",
        "sources/local.py",
        "limit = pair.context - new - beside",
        "limit = pair.context - new",
        "test_engine.py::test_a_forced_prefix_must_be_known_and_fit",
    ),
    Mutant(
        "a forced prefix is shown with every round",
        "sources/local.py",
        "if done.index == 0 and self._given:",
        "if self._given:",
        "test_engine.py::test_a_forced_prefix_is_read_and_shown_and_the_text_goes_on_from_it",
    ),
    Mutant(
        "a person's draft begins after the target's first token",
        "drafters/person.py",
        "    drafts_first = True\n",
        "    drafts_first = False\n",
        "test_branch.py::test_a_persons_draft_changes_what_is_accepted_and_not_the_text",
    ),
    Mutant(
        "a person's draft loses its place after a rejection",
        "drafters/person.py",
        "self.at += len(tokens)",
        "self.at += len(tokens) - 1",
        "test_branch.py::test_a_persons_draft_changes_what_is_accepted_and_not_the_text",
    ),
    Mutant(
        "a person drafts against noise that was seen",
        "session/branch.py",
        'if settings.deciding.noise == "round" else settings',
        'if settings.deciding.noise == "none" else settings',
        "test_branch.py::test_a_branch_keeps_the_seed_only_where_the_text_is_the_seeds",
    ),
    Mutant(
        "a person's round keeps the device",
        "session/branch.py",
        "        engine.close(visitor, race)",
        "        pass",
        "test_branch.py::test_one_round_of_a_person_is_verified_and_leaves_nothing_behind",
    ),
    Mutant(
        "a request names any drafter",
        "sources/__init__.py",
        "if name not in drafters:",
        "if not name:",
        "test_engine.py::test_a_source_loads_the_drafter_that_a_request_names_and_no_other",
    ),
    Mutant(
        "a blank prompt is a prompt",
        "request.py",
        "if not self.prompt.strip():",
        "if not self.prompt:",
        "test_request.py::test_what_cannot_be_asked_for_is_refused_in_a_short_sentence",
    ),
    Mutant(
        "true is a token id",
        "request.py",
        "type(value) is int and",
        "isinstance(value, int) and",
        "test_request.py::test_what_cannot_be_asked_for_is_refused_in_a_short_sentence",
    ),
    Mutant(
        "a person drafts any number of tokens",
        "request.py",
        "if len(drafted) > MAX_NEW_TOKENS:",
        "if False:",
        "test_request.py::test_what_cannot_be_asked_for_is_refused_in_a_short_sentence",
    ),
    Mutant(
        "half of a surrogate pair is text",
        "request.py",
        "        value.encode()\n",
        '        value.encode(errors="surrogatepass")\n',
        "test_request.py::test_what_cannot_be_asked_for_is_refused_in_a_short_sentence",
    ),
    Mutant(
        "unknown settings are dropped",
        "request.py",
        "if unknown := settings.keys() - set(Settings.names()):",
        "if unknown := ():",
        "test_request.py::test_what_is_no_request_as_json_is_refused",
    ),
    # Traces and replays
    Mutant(
        "an export holds the system prompt",
        "events.py",
        'request["system"] = None',
        "pass",
        "test_events.py::test_an_export_leaves_out_the_system_prompt_unless_it_is_chosen",
    ),
    Mutant(
        "an export names relative directories",
        "trace_format.py",
        "(_PATH.match(value) or _exists(value))",
        "_PATH.match(value)",
        "test_events.py::test_an_export_names_no_directory_of_this_machine",
    ),
    Mutant(
        "an export keeps the directory of the target",
        "events.py",
        "pair, machine = trace_format.portable(self.pair),",
        "pair, machine = self.pair,",
        "test_events.py::test_an_export_names_no_directory_of_this_machine",
    ),
    Mutant(
        "an export keeps the directory of the requested drafter",
        "events.py",
        'trace_format.portable(self.request.get("drafter"))',
        'self.request.get("drafter")',
        "test_events.py::test_an_export_names_no_directory_of_this_machine",
    ),
    Mutant(
        "an old policy keeps its name",
        "trace_format.py",
        '{**settings, "draft_length": "rate"}',
        "settings",
        "test_events.py::test_a_trace_of_version_1_is_read",
    ),
    Mutant(
        "the second lane of a replay waits for the prompt again",
        "sources/replay.py",
        "clocks.get(r.lane, prefill)",
        "clocks.get(r.lane, 0.0)",
        "test_replay.py::test_a_round_comes_after_as_long_as_it_took",
    ),
    Mutant(
        "a replay plays at once",
        "sources/replay.py",
        "seconds / self._speed",
        "0.0",
        "test_replay.py::test_a_round_comes_after_as_long_as_it_took",
    ),
    Mutant(
        "a replay that is stopped ended as recorded",
        "sources/replay.py",
        "self._why if lane in left else why",
        "why",
        "test_replay.py::test_stop_ends_a_wait_at_once_and_says_why",
    ),
    Mutant(
        "the page promises the same text whatever the source says",
        "session/caption.py",
        "settings.same_text and promises.same_text",
        "settings.same_text",
        "test_replay.py::test_the_page_claims_no_more_than_rule_and_source_promise",
    ),
    # Kernels
    Mutant(
        "no barrier between phases",
        "cpu/kernels/sharing.py",
        "    while _look(tickets, place + TICKETS // 2) < chunks:\n        pass\n",
        "",
        "test_kernels.py::test_nobody_leaves_a_phase_before_its_last_chunk_is_done",
    ),
    Mutant(
        "tickets order no memory",
        "cpu/kernels/sharing.py",
        'builder.load_atomic(at, "seq_cst", 8, typ=_I64)',
        'builder.load_atomic(at, "monotonic", 8, typ=_I64)',
        "test_kernels.py::test_what_a_chunk_wrote_is_seen_after_its_phase",
    ),
    Mutant(
        "a phase without tickets takes those of others",
        "cpu/kernels/sharing.py",
        "    if place >= tickets.shape[0]:\n        return -1\n",
        "",
        "test_kernels.py::test_a_phase_without_tickets_has_no_chunks",
    ),
    Mutant(
        "of equal numbers the last is the largest",
        "cpu/kernels/rows.py",
        "        elif rank <= ranks[count - 1]:\n",
        "        elif rank < ranks[count - 1]:\n",
        "test_kernels.py::test_argmax_and_top_are_the_first_of_the_largest",
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
