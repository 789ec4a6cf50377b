// A recorded race against the same race run again here: what is the same, and what differs.
// In: two traces. Out: rows {name, recorded, here, same}, those of spec_decode/share/compare.py; `same` is null for what
// is measured.
SpecDecode.compare = (recorded, here) => {
  const races = [recorded, here].map((trace) => {
    const race = new SpecDecode.Race();
    for (const round of trace.rounds) race.add(round);
    return { trace, ids: { baseline: race.counts.baseline.ids, speculative: race.counts.speculative.ids }, stats: race.stats() };
  });
  const number = (x, digits, unit = "") => (x === null ? "–" : x.toFixed(digits) + unit);
  const unknown = "not known";
  const join = (by, ...names) => ({ trace: { pair } }) => names.map((name) => pair[name]).filter(Boolean).map(SpecDecode.plain).join(by) || unknown;
  const revision = (model) => ({ trace: { pair } }) => {
    const entry = pair.revisions && pair.revisions[model];
    if (!entry || typeof entry !== "object") return unknown;
    if (typeof entry.revision === "string") return entry.revision;
    const sum = entry.sha256 && typeof entry.sha256 === "object" ? Object.values(entry.sha256)[0] : null;
    return typeof sum === "string" ? "sha256 " + sum.slice(0, 12) : unknown;
  };
  const sorted = (x) => (Array.isArray(x) ? x.map(sorted) : x && typeof x === "object" ? Object.fromEntries(Object.keys(x).sort().map((k) => [k, sorted(x[k])])) : x);
  const asked = ({ trace }) => JSON.stringify(sorted(Object.fromEntries(Object.entries(trace.request).filter(([name, value]) =>
    name !== "drafter" && !recorded.omitted.includes(name) && !here.omitted.includes(name) && value !== null && value !== "" && !(Array.isArray(value) && !value.length)))));
  const rows = [];
  for (const lane of SpecDecode.LANES) {
    const [a, b] = races.map(({ ids }) => ids[lane]), both = Math.min(a.length, b.length);
    let first = 0;
    while (first < both && a[first] === b[first]) first += 1;
    const same = a.length === b.length && first === both;
    rows.push({ name: lane + " text", recorded: a.length + " tokens", here: b.length + " tokens, " + (same ? "the same" : "differs from token " + (first + 1)), same });
  }
  const both = (name, show, same) => {
    const [a, b] = races.map(show);
    rows.push({ name, recorded: a, here: b, same: same(a, b) });
  };
  const equal = (a, b) => a === b, measured = () => null, known = (a, b) => (a === unknown || b === unknown ? null : a === b);
  both("acceptance rate", ({ stats }) => (stats.acceptance === null ? "–" : (100 * stats.acceptance).toFixed(1) + " %"), equal);
  both("tokens per target pass", ({ stats }) => number(stats.per_pass, 2), equal);
  both("baseline tokens/s", ({ stats }) => number(stats.baseline.rate, 1), measured);
  both("speculative tokens/s", ({ stats }) => number(stats.speculative.rate, 1), measured);
  both("speedup", ({ stats }) => number(stats.speedup, 2, "×"), measured);
  const same = asked(races[0]) === asked(races[1]);
  rows.push({ name: "prompt and settings", recorded: "as recorded", here: same ? "the same" : "differ", same });
  both("pair", join(" + ", "target", "drafter"), known);
  both("device", join(", ", "device", "dtype"), known);
  both("target revision", revision("target"), known);
  both("drafter revision", revision("drafter"), known);
  both("Spec Decode", ({ trace }) => trace.versions.spec_decode || unknown, known);
  both("machine", ({ trace }) => SpecDecode.machine(trace) || unknown, known);
  return rows;
};

SpecDecode.compared = (rows) => {
  const { make } = SpecDecode, MARK = { true: "=", false: "≠", null: "" }, SAID = { true: "the same", false: "different", null: "not compared" };
  const head = (text, scope) => {
    const cell = make("th", "", text);
    cell.scope = scope;
    return cell;
  };
  const body = rows.map(({ name, recorded, here, same }) => {
    const line = make("tr", "", head(name, "row"), make("td", "", make("span", "sd-c-mark", MARK[same]), make("span", "sd-sr", SAID[same])), make("td", "", recorded), make("td", "", here));
    line.dataset.same = String(same);
    return line;
  });
  const table = make("table", "sd-compared", make("caption", "", "The recording, and the same race run here"),
    make("thead", "", make("tr", "", head("", "col"), head("", "col"), head("recorded", "col"), head("here", "col"))), make("tbody", "", ...body));
  return make("div", "sd-c-scroll", table);
};
