// What is said of a trace that the server has not seen: its caption, what may be claimed of its texts, its figures.
// In: a trace that was checked (reading.js), and the tables of spec_decode/share/saved.py. Out: what
// session/caption.py, session/tally.py and session/curves.py make of it on the server. Touches no page.
SpecDecode.plain = (x) => (typeof x === "string" ? x : JSON.stringify(x)); // of a field that may hold anything
SpecDecode.about = (trace, tables) => {
  const { settings } = trace.request, { temperature, lenience } = settings, promises = trace.promises;
  const synthetic = settings.synthetic_acceptance !== null, g = (x) => String(Number(x.toPrecision(6)));
  const named = tables.rules[settings.rule];
  const deciding = synthetic ? "synthetic" : temperature === 0 && named.exact ? "greedy" : settings.rule;
  const rule = tables.rules[deciding], says = tables.sentences;
  const exact = rule.exact && promises.exact, same = rule.same_text && promises.same_text;
  const why = synthetic ? says.SYNTHETIC.replace("{:g}", g(settings.synthetic_acceptance))
    : !rule.exact ? says.LOSSY.replace("{}", settings.rule) : !promises.exact ? says.NOT_EXACT
    : !rule.same_text ? says.INDEPENDENT.replace("{}", settings.rule) : promises.same_text ? "" : says.NOT_SAME;
  const cut = (text, length) => {
    const all = Array.from(text);
    return all.length <= length ? text : all.slice(0, length).join("").trimEnd() + "… (" + all.length.toLocaleString("en") + " characters)";
  };
  const join = (by, ...names) => names.map((name) => trace.pair[name]).filter(Boolean).map(SpecDecode.plain).join(by);
  const said = [join(" + ", "target", "drafter") + " on " + join(", ", "device", "dtype"), "draft length " + settings.draft_length];
  said.push(synthetic ? "synthetic acceptance " + g(settings.synthetic_acceptance)
    : "rule " + settings.rule + (rule.exact ? "" : " (lossy, lenience " + g(lenience) + ")"), "temperature " + g(temperature));
  if (temperature) {
    if (settings.top_p !== 1) said.push("top-p " + g(settings.top_p));
    if (settings.top_k) said.push("top-k " + settings.top_k);
    said.push("seed " + settings.seed);
  }
  said.push("at most " + settings.max_new_tokens.toLocaleString("en") + " new tokens");
  if (trace.request.thinking) said.push("thinking first");
  const prefix = trace.request.prefix ?? null, draft = trace.request.draft || [];
  if (prefix && prefix.length) said.push("from a given text");
  if (draft.length) said.push("a person drafts");
  const system = (trace.request.system || "").trim();
  if (system) said.push("system prompt: " + cut(system, 120));
  return {
    ran: { prompt: cut(trace.request.prompt.trim(), tables.shown), settings: said }, rule: settings.rule, deciding, temperature, lenience,
    recorded: "", given: Boolean(prefix && prefix.length) || draft.length > 0,
    undrawn: tables.undrawn, exact, same_text: same, synthetic, why, rejected: promises.rejected, limit: settings.max_new_tokens,
  };
};

SpecDecode.machine = (trace) => SpecDecode.plain(trace.machine.gpu || trace.machine.processor || "");
SpecDecode.recorded = (trace) => "recorded on " + (SpecDecode.machine(trace) || "another machine")
  + (trace.date ? ", " + trace.date.slice(0, 10) + " " + trace.date.slice(11, 16) + " UTC" : ", date unknown");

// The last score board, as far as it follows from the rounds; the interval needs a bootstrap, and comes with a saved
// replay (`extras`).
SpecDecode.stats = (trace, extras = {}) => {
  const race = new SpecDecode.Race();
  for (const round of trace.rounds) race.add(round);
  const stats = race.stats(), { baseline, speculative } = race.counts;
  for (const lane of SpecDecode.LANES) stats[lane].finish = trace.finish[lane] || "running";
  const cut = Object.values(trace.finish).some((why) => why === "cancelled" || why === "time");
  stats.identical = stats.identical && (cut || baseline.ids.length === speculative.ids.length);
  return { interval: null, end_to_end: null, end_to_end_interval: null, verdict: null, looping: false, parting: null, ...extras, ...stats };
};

// The series of the figures, by the definitions of session/curves.py. The predicted speedup is worked out by the server
// alone: `model` is null.
SpecDecode.series = (trace) => {
  const POINTS = 160, round = (x, digits) => Math.round(x * 10 ** digits) / 10 ** digits;
  const rate = Object.fromEntries(SpecDecode.LANES.map((lane) => {
    const points = [];
    for (const r of trace.rounds) if (r.lane === lane) points.push([r.clock, (points.length ? points[points.length - 1][1] : 0) + r.tokens.filter(SpecDecode.emits).length]);
    const xs = [], ys = [];
    if (points.length < 2) return [lane, [xs, ys]];
    const window = Math.max(1, (points[points.length - 1][0] - points[0][0]) / 20), count = points.length - 1;
    const step = count / POINTS;
    const chosen = count <= POINTS ? points.map((_, i) => i).slice(1) : Array.from({ length: POINTS }, (_, i) => Math.floor((i + 1) * step));
    let start = 0;
    for (const i of chosen) {
      const [clock, tokens] = points[i];
      while (start + 1 < i && points[start + 1][0] < clock - window) start += 1;
      const seconds = clock - points[start][0];
      if (seconds > 0) { xs.push(round(clock, 3)); ys.push(round((tokens - points[start][1]) / seconds, 2)); }
    }
    return [lane, [xs, ys]];
  }));
  const drafted = (t) => t.role === "accepted" || t.role === "rejected";
  const judged = trace.rounds.filter((r) => r.lane === "speculative" && r.tokens.some(drafted))
    .map((r) => [r.index, r.tokens.filter((t) => t.role === "accepted").length, r.tokens.filter(drafted).length]);
  const size = Math.ceil(judged.length / POINTS) || 1, acceptance = [[], [], []];
  let kept = 0, all = 0;
  for (let at = 0; at < judged.length; at += size) {
    const bucket = judged.slice(at, at + size), sum = (i) => bucket.reduce((total, row) => total + row[i], 0);
    kept += sum(1);
    all += sum(2);
    acceptance[0].push(bucket[bucket.length - 1][0]);
    acceptance[1].push(round(sum(1) / sum(2), 4));
    acceptance[2].push(round(kept / all, 4));
  }
  const counts = {};
  for (const r of trace.rounds) if (r.lane === "speculative" && r.index > 0) {
    const count = r.tokens.filter(SpecDecode.emits).length;
    counts[count] = (counts[count] || 0) + 1;
  }
  const passes = Object.keys(counts).map(Number).sort((a, b) => a - b);
  return { rate, acceptance, final: { passes: [passes, passes.map((n) => counts[n])], model: null } };
};
