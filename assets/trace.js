// A race as data in the browser: rounds as a trace has them (docs/trace.schema.json), and the figures that follow.
// In: rounds as they come over the wire (spec_decode/session/feed.py), or a trace. Out: `SpecDecode.Race`. Touches no page.
const SpecDecode = {};
SpecDecode.LANES = ["baseline", "speculative"];
SpecDecode.ROLES = { t: "target", a: "accepted", r: "rejected", c: "correction", b: "bonus", p: "prompt" };

// The round of a trace that `encode_round` made this array of, and the texts that came with it.
SpecDecode.unpack = ([lane, index, draft_length, refused, kl, tokens, times, drafter, residual, pieces]) => ({
  lane: SpecDecode.LANES[lane], index, draft_length, refused, kl, drafter, residual, pieces,
  draft_seconds: times[0], verify_seconds: times[1], seconds: times[2], clock: times[3],
  tokens: tokens.map(([text, role, p, q, draft_position, id, target_top, drafter_top, compared]) => (
    { text, role: SpecDecode.ROLES[role], p, q, draft_position, id, target_top, drafter_top, compared })),
});

// The JSON in bytes that were compressed by gzip, given in base64 or as they are.
SpecDecode.unzipped = async (packed) => {
  const bytes = typeof packed === "string" ? Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)) : packed;
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
};

// A number with so many significant digits, as text, never in more digits than it has.
SpecDecode.digits = (x, count = 4) => (x === null || x === undefined ? "–" : String(Number(x.toPrecision(count))));
SpecDecode.ms = (seconds) => (1000 * seconds).toFixed(seconds < 0.1 ? 2 : 1) + " ms";

SpecDecode.emits = (token) => token.role !== "rejected" && token.role !== "prompt";

// A race as far as it is known: its rounds by lane, the texts of alternatives, and the figures of the score board, by
// the definitions of spec_decode/metrics.py.
SpecDecode.Race = class {
  constructor(about = null, costs = null) {
    this.about = about;
    this.costs = costs;
    this.head = null; // of a finished race: its request, pair, machine, versions and date
    this.rounds = { baseline: [], speculative: [] };
    this.order = []; // of both lanes, as they came
    this.whole = null; // the trace that is played, or what of a race's own trace is no round (session/stream.py)
    this.final = null; // {stats, figures} of a race that is over
    this.pieces = {};
    this.counts = Object.fromEntries(SpecDecode.LANES.map((lane) => [lane,
      { ids: [], passes: 0, accepted: 0, drafted: 0, refused: 0, kl: 0, lossy: 0, firstTokens: 0, first: null, began: null, clock: 0 }]));
    this.same = 0;
    this.differ = false;
  }

  add(round) {
    const c = this.counts[round.lane], { baseline, speculative } = this.counts, emitted = round.tokens.filter(SpecDecode.emits);
    Object.assign(this.pieces, round.pieces);
    this.rounds[round.lane].push(round);
    this.order.push(round);
    if (c.began === null) [c.began, c.firstTokens] = [round.clock, emitted.length];
    if (c.first === null && emitted.length) c.first = round.clock;
    c.clock = round.clock;
    c.passes += round.index > 0;
    c.ids.push(...emitted.map((t) => t.id));
    c.drafted += round.tokens.filter((t) => t.role === "accepted" || t.role === "rejected").length;
    c.accepted += round.tokens.filter((t) => t.role === "accepted").length;
    if (round.kl !== null && round.kl !== undefined) {
      c.refused += round.refused || 0;
      c.kl += round.kl;
      c.lossy += 1;
    }
    while (!this.differ && this.same < Math.min(baseline.ids.length, speculative.ids.length)) {
      if (baseline.ids[this.same] === speculative.ids[this.same]) this.same += 1;
      else this.differ = true;
    }
  }

  // The race as a trace, null before it is over.
  get trace() {
    if (!this.whole || this.whole.rounds) return this.whole;
    return { ...this.whole, pieces: { ...this.pieces }, rounds: this.order.map(({ pieces, ...round }) => round) };
  }

  piece(id) {
    return this.pieces[id];
  }

  // Seconds of a plain step: the median of the baseline's passes so far, with their number; null before there is one.
  get step() {
    const all = this.rounds.baseline.filter((r) => r.index > 0).map((r) => r.seconds).sort((a, b) => a - b);
    const middle = all.length >> 1;
    return all.length ? { seconds: all.length % 2 ? all[middle] : (all[middle - 1] + all[middle]) / 2, count: all.length } : null;
  }

  // The score board of a race that goes on; the interval, the verdict and the end need the whole (session/tally.py).
  stats() {
    const ratio = (of, to) => (of === null || !to ? null : of / to);
    const rate = (c) => (c.passes ? ratio(c.ids.length - c.firstTokens, c.clock - c.began) : null);
    const { baseline, speculative } = this.counts;
    const lane = (c) => ({ tokens: c.ids.length, rate: rate(c), first: c.first, clock: c.clock });
    return {
      baseline: lane(baseline), speculative: lane(speculative), speedup: ratio(rate(speculative), rate(baseline)),
      acceptance: ratio(speculative.accepted, speculative.drafted),
      per_pass: speculative.passes ? 1 + speculative.accepted / speculative.passes : null,
      refused: speculative.lossy ? speculative.refused / Math.max(1, speculative.ids.length - speculative.firstTokens) : null,
      kl: speculative.lossy ? speculative.kl / speculative.lossy : null,
      same: this.same, identical: !this.differ,
    };
  }
};
