// Draft lengths measured: progress, a row for each draft length as it fills, the advisor's paragraph and its figure.
// In: props.value, JSON of spec_decode/session/pays.py: {phase, done, of, left, rows, ran, prompt, words, advice, why, …};
// props.kind, "race" under a finished race or "list" in the tab. The rows of a race also go to the last figure of the page,
// as the event sd-measured.
const root = element.querySelector(".sd-pays");
const find = (selector) => root.querySelector(selector);
const make = (tag, name, ...children) => {
  const node = Object.assign(document.createElement(tag), { className: name || "" });
  node.append(...children);
  return node;
};
const status = find(".sd-pays-status"), progress = find(".sd-pays-progress"), bar = find(".sd-pays-bar");
const body = find(".sd-pays-table tbody"), answer = find(".sd-pays-answer"), why = find(".sd-pays-why"), chart = find(".sd-pays-chart");
const ofRace = props.kind === "race";
const ACTIVE = ["waiting", "warming", "running", "stopping"];
// Where the figure behind a sentence of the advisor stands.
const WHERE = {
  "draft lengths": "column speedup", categories: "table by category", context: "report", acceptance: "figure, accepted",
  "round time": "figure, plain steps", texts: "note below", machine: "note below",
};
let now = { phase: "idle" }, until = 0, raced = null, drawn = null;

find(".sd-pays-title").textContent = ofRace ? "Draft lengths, measured on this prompt" : "Does speculation pay, for these prompts?";
find(".sd-pays-intro").textContent = ofRace
  ? "γ = 1, 2, 4, 8 and adaptive, each " + props.repeats + " times in shuffled order, beside the baseline (γ = 0), which runs in every race. Warm-up is discarded."
  : "Every prompt runs at γ = 1, 2, 4, 8 and adaptive, " + props.repeats + " times each in shuffled order, beside the baseline (γ = 0), which runs in every race. Warm-up is discarded. Between two races the device is free for others. Prompts are sent to this server to be run; it keeps its last few reports for their download.";

const number = (x, digits) => (x === null || x === undefined ? "–" : x.toFixed(digits));
const percent = (x) => (x === null || x === undefined ? "–" : Math.round(100 * x) + " %");
const range = (low, high) => (low === null || low === undefined ? "" : " (" + low.toFixed(2) + "–" + high.toFixed(2) + ")");
const named = (length) => (length === 0 ? "γ = 0, baseline" : Number.isInteger(length) ? "γ = " + length : length);

function table() {
  const known = Object.fromEntries(now.rows.map((row) => [String(row.length), row]));
  body.replaceChildren(...props.lengths.map((length) => {
    const row = known[String(length)], all = now.prompts * props.repeats;
    const line = make("tr", row && row.verdict ? "sd-" + row.verdict.replace(" ", "-") : "");
    const chosen = now.choice !== undefined && now.choice === length;
    const head = make("th", "", named(length), ...(chosen ? [make("span", "sd-pays-best", "advised")] : []));
    head.scope = "row";
    const cells = row ? [
      number(row.speedup, 2) + "×" + range(row.low, row.high), number(row.rate, 1), percent(row.acceptance), number(row.per_pass, 2),
      number(row.draft_ms, 2), number(row.verify_ms, 2), number(row.other_ms, 2),
      row.identical === null ? "–" : row.identical + " of " + row.count, length === 0 ? String(row.count) : row.count + " of " + all,
    ] : Array(9).fill("");
    line.append(head, ...cells.map((text) => make("td", "", text)));
    return line;
  }));
}

function kinds() {
  const rows = now.categories || [], box = find(".sd-pays-kinds");
  box.hidden = !rows.length;
  if (!rows.length) return;
  const lengths = props.lengths.filter((length) => length !== 0);
  const head = (text) => Object.assign(make("th", "", text), { scope: "col" });
  box.querySelector("thead").replaceChildren(make("tr", "", head("category"), head("prompts"), ...lengths.map((length) => head(named(length)))));
  box.querySelector("tbody").replaceChildren(...rows.map((row) => make("tr", "",
    Object.assign(make("th", "", row.category), { scope: "row" }), make("td", "", String(row.prompts)),
    ...lengths.map((length) => {
      const at = row.speedups[String(length)];
      return make("td", "", at ? at[0].toFixed(2) + "×" + range(at[1], at[2]) : "–");
    }))));
}

function advice() {
  answer.hidden = !now.advice;
  if (!now.advice) return;
  find(".sd-pays-advice").replaceChildren(...(now.advice.length ? now.advice : [{ text: "Too little was measured for a sentence.", refers: "" }])
    .flatMap((sentence) => [make("span", "", sentence.text), ...(WHERE[sentence.refers] ? [" ", make("small", "", "[" + WHERE[sentence.refers] + "]")] : []), " "]));
  const said = [...(now.notes || []), ...(now.left_out || []).map((line) => "Left out: " + line)];
  find(".sd-pays-machine").textContent = said.join(" ");
  kinds();
  why.hidden = !now.why;
  why.open = !ofRace;
  drawn = null;
  draw();
}

// Drawn when it can be seen: Plotly measures nothing in a tab that is hidden.
async function draw() {
  if (!now.why || !why.open || !chart.offsetParent) return;
  const theme = document.body.classList.contains("dark") ? "dark" : "light", mine = now.why[theme] || now.why.light;
  if (drawn === mine) return;
  drawn = mine;
  try {
    const plotly = await document.querySelector(".sd-plots").plotly();
    await plotly.react(chart, mine.data, { ...mine.layout, autosize: true }, { displayModeBar: false, responsive: true });
  } catch (error) {
    chart.textContent = "The figure could not be loaded.";
  }
}
why.addEventListener("toggle", draw);
new IntersectionObserver(draw).observe(chart);
new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });

const clock = (seconds) => (seconds < 90 ? Math.max(1, Math.round(seconds)) + " s" : Math.round(seconds / 60) + " min");
let ticking = 0;
function tick() {
  clearTimeout(ticking);
  const { phase, done, of } = now;
  const left = until ? (until - performance.now()) / 1000 : null;
  progress.textContent = phase === "running" || phase === "stopping"
    ? (done || 0) + " of " + of + " measurements" + (phase === "running" && left !== null ? ", about " + clock(left) + " left" : "") : "";
  if (ACTIVE.includes(phase) && root.isConnected) ticking = setTimeout(tick, 1000);
}

function says() {
  const { phase, done, of, words } = now;
  if (phase === "waiting") return "Waiting for the device.";
  if (phase === "warming") return "Warming up: a few short races that are not counted.";
  if (phase === "running") return "Measuring.";
  if (phase === "stopping") return "Stopping. What was measured is kept.";
  if (phase === "failed") return words;
  if (phase === "done") return "Done: " + done + " of " + of + " measurements.";
  if (phase === "stopped") return (words ? words + " " : "") + (done ? "Stopped after " + done + " of " + of + " measurements, which are kept." : "Stopped before the first measurement.");
  return ofRace ? "" : "Write prompts, one a line, and press Measure.";
}

function show() {
  root.dataset.phase = now.phase;
  const said = says();
  if (status.textContent !== said) status.textContent = said;
  const share = now.of ? Math.floor((100 * (now.done || 0)) / now.of) : 0;
  bar.setAttribute("aria-valuenow", share);
  bar.firstElementChild.style.transform = "scaleX(" + share / 100 + ")";
  find(".sd-pays-ran").textContent = now.ran ? (now.prompt ? "“" + now.prompt + "” · " : now.prompts + (now.prompts === 1 ? " prompt · " : " prompts · ")) + now.ran.join(" · ") : "";
  find(".sd-pays-wide").hidden = !now.rows;
  if (now.rows) table();
  advice();
  tick();
  const view = document.querySelector(".sd-race")?.view;
  if (ofRace && now.rows && view && view.race === raced) document.dispatchEvent(new CustomEvent("sd-measured", { detail: now.rows }));
}

function receive(value) {
  let got;
  try { got = JSON.parse(value || "{}"); } catch (error) { return; }
  if (!got.phase) return;
  if (got.phase === "left") got = ACTIVE.includes(now.phase) ? { ...now, phase: "stopped" } : now;
  if (got.phase === "waiting" && ofRace) raced = document.querySelector(".sd-race").view.race;
  until = got.left === undefined ? (ACTIVE.includes(got.phase) ? until : 0) : performance.now() + 1000 * got.left;
  if (got.phase === "waiting") until = 0;
  now = got;
  show();
}

// Under a race: what was measured belongs to that race, and goes with it.
if (ofRace) {
  const passed = () => {
    if (!root.isConnected) return document.removeEventListener("sd-figures", passed);
    const view = document.querySelector(".sd-race")?.view;
    if (!raced || ACTIVE.includes(now.phase) || (view && view.race === raced)) return;
    raced = null;
    now = { phase: "idle" };
    show();
  };
  document.addEventListener("sd-figures", passed);
}

watch("value", () => receive(props.value));
receive(props.value);
