// Pinned results: rows that stay in this browser, compared two at a time, shown again, and exported.
// In: the finished race in the token view. Out: rows in localStorage, the traces of the last few in IndexedDB (in memory where
// there is none), which its player shows as recordings, files for download, and props.value, the request whose settings the
// form is to take. The system prompt is kept nowhere. Nothing is sent to the server but that request, on a press.
const root = element.querySelector(".sd-pins");
const find = (selector) => root.querySelector(selector);
const FIGURES = ["end_to_end", "baseline", "speculative", "acceptance", "per_pass", "draft_ms", "verify_ms"]; // of a row, numbers or null
const KEY = "spec-decode-pins", ROWS = 50, TRACES = 8, PROMPT = 4000, BYTES = 4e6;
const make = (tag, name, ...children) => {
  const node = Object.assign(document.createElement(tag), { className: name || "" });
  node.append(...children);
  return node;
};
const button = (name, text, label, act) => {
  const node = make("button", name, text);
  node.type = "button";
  if (label) node.setAttribute("aria-label", label);
  node.addEventListener("click", act);
  return node;
};
const say = (text) => { find(".sd-pins-said").textContent = text; };
const theView = () => document.querySelector(".sd-race")?.view;
let rows = load(), ticked = [];

// --- what is kept -----------------------------------------------------------------------------------------------------

// Whether a row is as `pin` makes it: what else is found in the storage is left out.
function whole(row) {
  const { id, request, figures, pair, machine } = row, { speedup, low, high } = figures, number = (x) => x === null || typeof x === "number";
  return [id, request.prompt, machine, pair.target, pair.drafter].every((x) => typeof x === "string") && typeof request.settings.rule === "string"
    && [speedup, low, high, ...FIGURES.map((name) => figures[name])].every(number) && (low === null) === (high === null);
}
function load() {
  try {
    return JSON.parse(localStorage.getItem(KEY) || "[]").filter((row) => { try { return whole(row); } catch (error) { return false; } }).slice(0, ROWS);
  } catch (error) {
    return [];
  }
}

function save() {
  for (rows = rows.slice(0, ROWS); ; rows.pop()) {
    try { return localStorage.setItem(KEY, JSON.stringify(rows)); } catch (error) { if (!rows.length) return; } // full, or not allowed
  }
}

// Traces, compressed, by the id of their row.
const memory = new Map();
const store = "indexedDB" in window ? new Promise((resolve) => {
  try {
    const asked = indexedDB.open(KEY, 1);
    asked.onupgradeneeded = () => asked.result.createObjectStore("traces");
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = asked.onblocked = () => resolve(null);
  } catch (error) { resolve(null); }
}) : Promise.resolve(null);
async function shelf(mode, act) {
  const db = await store;
  if (!db) return undefined;
  return new Promise((resolve) => {
    const asked = act(db.transaction("traces", mode).objectStore("traces"));
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(undefined);
  });
}
const through = async (data, stream) => new Response(new Blob([data]).stream().pipeThrough(stream));
async function keep(id, trace) {
  const bytes = await (await through(JSON.stringify(trace), new CompressionStream("gzip"))).arrayBuffer();
  if (bytes.byteLength > BYTES) return;
  memory.set(id, bytes);
  await shelf("readwrite", (traces) => traces.put(bytes, id));
  await tidy();
}
async function traceOf(id) {
  const bytes = memory.get(id) || await shelf("readonly", (traces) => traces.get(id));
  return bytes ? (await through(bytes, new DecompressionStream("gzip"))).json() : null;
}
// Of the last few rows only: older ones keep their figures.
async function tidy() {
  const recent = rows.slice(0, TRACES).map((row) => row.id);
  for (const id of memory.keys()) if (!recent.includes(id)) memory.delete(id);
  for (const id of (await shelf("readonly", (traces) => traces.getAllKeys())) || []) if (!recent.includes(id)) await shelf("readwrite", (traces) => traces.delete(id));
}

// --- pin --------------------------------------------------------------------------------------------------------------

const finished = () => {
  const view = theView(), shown = view && view.shown;
  return shown && view.race.whole && view.race.final && (shown.phase === "done" || shown.recording === "ended") ? view : null;
};
const words = (x) => (typeof x === "string" ? x : x ? JSON.stringify(x) : ""); // of a field of a trace that may hold anything
const mean = (rounds, key) => (rounds.length ? 1000 * rounds.reduce((sum, round) => sum + round[key], 0) / rounds.length : null);

function pin() {
  const view = finished();
  if (!view) return;
  const { race, shown } = view, { stats } = shown, passes = race.rounds.speculative.filter((round) => round.index > 0);
  const { request, pair, machine, date } = race.head, { system, ...asked } = request, { omitted } = race.whole;
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  rows.unshift({
    id, date: date || null, recorded: Boolean(shown.recording), cut: asked.prompt.length > PROMPT, system: Boolean(system) || omitted.includes("system"),
    request: { ...asked, prompt: asked.prompt.slice(0, PROMPT) }, machine: words(machine.gpu || machine.processor),
    pair: Object.fromEntries(["target", "drafter", "device", "dtype"].map((name) => [name, words(pair[name])])),
    figures: {
      speedup: stats.speedup ?? null, low: stats.interval ? stats.interval[0] : null, high: stats.interval ? stats.interval[1] : null, end_to_end: stats.end_to_end ?? null,
      baseline: stats.baseline.rate ?? null, speculative: stats.speculative.rate ?? null, acceptance: stats.acceptance ?? null, per_pass: stats.per_pass ?? null,
      draft_ms: mean(passes, "draft_seconds"), verify_ms: mean(passes, "verify_seconds"), tokens: stats.speculative.tokens, identical: Boolean(stats.identical),
    },
  });
  save();
  // The tokens, as a recording for the player. What branches are made of stays out: the server may have another model by then.
  const { request: mine, unbranched, ran, ...about } = shown.about, { trace } = race;
  about.ran = { ...ran, settings: ran.settings.filter((said) => !said.startsWith("system prompt: ")) };
  const data = { ...trace, request: { ...trace.request, system: null }, omitted: trace.request.system ? [...omitted, "system"] : omitted };
  keep(id, { about, data, stats, figures: race.final.figures }).catch(() => {});
  draw();
  say("Pinned. " + rows.length + (rows.length === 1 ? " result is kept." : " results are kept."));
}

// --- rows -------------------------------------------------------------------------------------------------------------

const number = (x, digits) => (x === null || x === undefined ? "–" : x.toFixed(digits));
const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(1) + " %");
const range = (f) => number(f.speedup, 2) + "×" + (f.low === null ? "" : " (" + f.low.toFixed(2) + "–" + f.high.toFixed(2) + ")");
const short = (text, length) => (text.length > length ? text.slice(0, length).trimEnd() + "…" : text);
const settings = ({ request: { settings: s }, pair }) => [
  pair.target + " + " + pair.drafter, Number.isInteger(s.draft_length) ? "γ = " + s.draft_length : s.draft_length, "temperature " + s.temperature, s.rule, s.max_new_tokens + " tokens",
].join(" · ");

function draw() {
  find(".sd-pins-kept").hidden = !rows.length;
  root.dataset.count = rows.length;
  ticked = ticked.filter((id) => rows.some((row) => row.id === id));
  find(".sd-pins-table tbody").replaceChildren(...rows.map((row) => {
    const f = row.figures, prompt = short(row.request.prompt.replace(/\s+/g, " ").trim(), 60);
    const name = button("sd-pins-show", "", "Show again: " + prompt + ", " + settings(row), () => restore(row));
    name.append(make("b", "", prompt), make("span", "", (row.recorded ? "recording · " : "") + settings(row)));
    const tick = make("input");
    tick.type = "checkbox";
    tick.checked = ticked.includes(row.id);
    tick.setAttribute("aria-label", "Compare: " + prompt);
    tick.addEventListener("change", () => {
      ticked = tick.checked ? [...ticked, row.id].slice(-2) : ticked.filter((id) => id !== row.id);
      for (const box of root.querySelectorAll(".sd-pins-table input")) box.checked = ticked.includes(box.dataset.id);
      compare();
    });
    tick.dataset.id = row.id;
    const head = make("th", "", name);
    head.scope = "row";
    const away = button("sd-pins-delete", "×", "Delete: " + prompt, () => {
      rows = rows.filter((other) => other.id !== row.id);
      save();
      draw();
      tidy().catch(() => {});
      say("Deleted.");
      (find(".sd-pins-delete") || find(".sd-pin")).focus();
    });
    return make("tr", "", head, make("td", "", tick), ...[range(f), number(f.baseline, 1), number(f.speculative, 1), percent(f.acceptance), number(f.per_pass, 2), number(f.draft_ms, 2), number(f.verify_ms, 2)].map((text) => make("td", "", text)), make("td", "", away));
  }));
  compare();
  ready();
}

const MEASURES = [
  ["speedup", "speedup", 2], ["baseline", "baseline tokens/s", 1], ["speculative", "speculative tokens/s", 1], ["acceptance", "acceptance rate", 3],
  ["per_pass", "tokens a pass", 2], ["draft_ms", "draft ms a round", 2], ["verify_ms", "verify ms a round", 2], ["end_to_end", "end-to-end speedup", 2],
];
const said = (value) => (value === null || value === undefined || value === "" ? "–" : String(value));

function compare() {
  const two = ticked.map((id) => rows.find((row) => row.id === id)), box = find(".sd-pins-two");
  box.hidden = two.length < 2;
  if (two.length < 2) return;
  const [a, b] = two;
  const column = (text) => Object.assign(make("th", "", text), { scope: "col" });
  box.querySelector("thead").replaceChildren(make("tr", "", column(""), column("first"), column("second"), column("difference")));
  const lines = MEASURES.map(([key, label, digits]) => {
    const [x, y] = [a.figures[key], b.figures[key]], both = typeof x === "number" && typeof y === "number";
    const by = both ? y - x : 0, sign = by > 0 ? "+" : by < 0 ? "−" : "±";
    const off = both && x ? " (" + sign + Math.abs((100 * by) / x).toFixed(1) + " %)" : "";
    return [label, number(x, digits), number(y, digits), both ? sign + Math.abs(by).toFixed(digits) + off : "–"];
  });
  const facts = (row) => ({ prompt: short(row.request.prompt.replace(/\s+/g, " "), 40), target: row.pair.target, drafter: row.pair.drafter, device: row.pair.device, machine: short(row.machine, 40), ...row.request.settings });
  const [left, right] = [facts(a), facts(b)];
  for (const key of Object.keys({ ...left, ...right })) if (said(left[key]) !== said(right[key])) lines.push([key.replaceAll("_", " "), said(left[key]), said(right[key]), "differs"]);
  box.querySelector("tbody").replaceChildren(...lines.map(([label, ...cells]) => make("tr", "", Object.assign(make("th", "", label), { scope: "row" }), ...cells.map((text) => make("td", "", text)))));
}

async function restore(row) {
  const view = theView();
  let kept = null;
  try { kept = await traceOf(row.id); } catch (error) { kept = null; }
  if (!view || view.root.dataset.phase === "running") return say("A race is running; stop it first, or wait for its end.");
  const shown = Boolean(kept && kept.data);
  if (shown) {
    const recorded = view.SpecDecode.recorded(kept.data);
    view.player.open({ ...kept, name: "pinned", title: "pinned result", recorded, about: { ...kept.about, recorded } }, true);
  }
  const fits = view.SpecDecode.formOf(row.request) !== null;
  if (fits) {
    props.value = JSON.stringify(row.system ? row.request : { ...row.request, system: null });
    trigger("input");
  }
  const form = fits ? "its settings are in the form" : "its settings have no place in the form";
  say((shown ? "Shown again, and " + form + "." : form[0].toUpperCase() + form.slice(1) + "; its tokens are no longer kept.")
    + (row.cut ? " Of its prompt the first " + PROMPT.toLocaleString("en-US") + " characters are kept." : "") + (row.system ? " Its system prompt is not kept." : ""));
  if (shown) view.root.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

// --- export -----------------------------------------------------------------------------------------------------------

const COLUMNS = ["date", "kind", "target", "drafter", "device", "dtype", "machine", "prompt", "draft_length", "temperature", "top_p", "top_k", "rule", "max_new_tokens", "seed",
  "baseline_tokens_per_second", "tokens_per_second", "speedup", "speedup_low", "speedup_high", "end_to_end_speedup", "acceptance_rate", "tokens_per_pass", "draft_ms", "verify_ms", "tokens", "identical"];
const values = (row) => {
  const { request: { prompt, settings: s }, pair: p, figures: f } = row;
  return [row.date, row.recorded ? "recording" : "race", p.target, p.drafter, p.device, p.dtype, row.machine, prompt, s.draft_length, s.temperature, s.top_p, s.top_k, s.rule, s.max_new_tokens, s.seed,
    f.baseline, f.speculative, f.speedup, f.low, f.high, f.end_to_end, f.acceptance, f.per_pass, f.draft_ms, f.verify_ms, f.tokens, f.identical];
};
// A text that a spreadsheet would take for a formula begins with an apostrophe, which makes it a text there.
const cell = (value) => {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  if (typeof value !== "string") return cell(JSON.stringify(value));
  return '"' + (/^\s*[=+\-@\t\r\n|%＝＋－＠]/.test(value) ? "'" : "") + value.replaceAll('"', '""') + '"';
};
const csv = () => "\ufeff" + [COLUMNS, ...rows.map(values)].map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
const plain = (text) => String(text).replace(/\s+/g, " ").replace(/[\\`*_{}\[\]<>()#+!|~&]/g, "\\$&").trim();
const markdown = () => ["| prompt | settings | speedup (95 %) | baseline tok/s | speculative tok/s | acceptance | tokens/pass | draft ms | verify ms |", "| --- | --- |" + " ---: |".repeat(7),
  ...rows.map((row) => { const f = row.figures; return "| " + [plain(short(row.request.prompt, 120)), plain((row.recorded ? "recording · " : "") + settings(row)), range(f), number(f.baseline, 1), number(f.speculative, 1), percent(f.acceptance), number(f.per_pass, 2), number(f.draft_ms, 2), number(f.verify_ms, 2)].join(" | ") + " |"; })].join("\n") + "\n";
function download(name, kind, text) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type: kind + ";charset=utf-8" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

let sure = 0;
const clear = button("", "Delete all", "", () => {
  if (performance.now() - sure > 5000) {
    sure = performance.now();
    clear.textContent = "Delete all?";
    setTimeout(() => { clear.textContent = "Delete all"; }, 5000);
    return;
  }
  rows = [];
  save();
  draw();
  tidy().catch(() => {});
  say("Deleted.");
  find(".sd-pin").focus();
});
find(".sd-pins-tools").append(
  button("", "CSV", "Download as CSV", () => download("spec-decode-pins.csv", "text/csv", csv())),
  button("", "Markdown", "Download as Markdown", () => download("spec-decode-pins.md", "text/markdown", markdown())), clear);
find(".sd-pin").addEventListener("click", pin);

// --- the page ---------------------------------------------------------------------------------------------------------

function ready() {
  const can = Boolean(finished());
  find(".sd-pin").disabled = !can;
  root.hidden = !can && !rows.length;
}
const onFigures = () => {
  if (!root.isConnected) return document.removeEventListener("sd-figures", onFigures);
  setTimeout(ready, 0); // the view shows the end a moment later
};
document.addEventListener("sd-figures", onFigures);
new MutationObserver(ready).observe(document.body, { attributes: true, attributeFilter: ["data-sd-phase"] });
window.addEventListener("storage", (event) => { if (event.key === KEY && root.isConnected) { rows = load(); draw(); } });
draw();
