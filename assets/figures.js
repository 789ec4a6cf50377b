// Four figures, drawn by the basic bundle of plotly.js (assets/plotly-basic.min.js) and updated in place.
// In: events sd-figures of the token view, {rate, acceptance, final} (see spec_decode/session/curves.py) or null to clear;
// events sd-measured, rows of draft lengths that were measured on the prompt of this race (assets/pays.js); props.plotly,
// the path of the script.
const root = element.querySelector(".sd-plots");
const boxes = {};
for (const node of root.querySelectorAll("[data-plot]")) boxes[node.dataset.plot] = node;
let data = null, measured = null, loading = null, scheduled = false;

function plotly() {
  if (window.Plotly) return Promise.resolve(window.Plotly);
  loading = loading || new Promise((resolve, reject) => {
    const script = document.createElement("script");
    const fail = () => { loading = null; script.remove(); reject(new Error("plotly")); };
    script.src = props.plotly;
    script.onload = () => (window.Plotly ? resolve(window.Plotly) : fail());
    script.onerror = fail;
    document.head.append(script);
  });
  return loading;
}

root.plotly = plotly; // for other figures of the page

// Colours as the browser resolves them: in forced colours they are the system's.
function look() {
  const probe = document.createElement("i");
  probe.style.forcedColorAdjust = "none";
  root.append(probe);
  const colour = (name) => {
    probe.style.color = "var(--sd-" + name + ")";
    return getComputedStyle(probe).color;
  };
  const c = { font: getComputedStyle(root).fontFamily };
  for (const name of ["ink", "muted", "line", "accent", "base", "bonus"]) c[name] = colour(name);
  c.soft = colour("accent-soft");
  probe.remove();
  return c;
}

function layout(c, x, y) {
  const axis = ({ title, ...more }) => ({
    title: { text: title, font: { size: 11, color: c.muted }, standoff: 6 }, gridcolor: c.line, linecolor: c.line,
    zeroline: false, tickfont: { size: 11, color: c.muted }, fixedrange: true, rangemode: "tozero", ...more,
  });
  return {
    autosize: true, margin: { l: 44, r: 12, t: 26, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: c.font, size: 12, color: c.ink }, showlegend: true, hovermode: "closest", uirevision: "keep",
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11, color: c.ink }, itemclick: false, itemdoubleclick: false },
    xaxis: axis(x), yaxis: axis(y), hoverlabel: { font: { family: c.font, size: 12 } },
  };
}

// Measured medians with their intervals; a policy, which has no γ, as a line with its interval at the end.
function medians(c) {
  const told = measured.filter((row) => row.speedup !== null), fixed = told.filter((row) => Number.isInteger(row.length));
  const bars = (rows) => ({
    type: "data", symmetric: false, color: c.bonus, thickness: 1.5, width: 4,
    array: rows.map((row) => (row.high === null ? 0 : row.high - row.speedup)), arrayminus: rows.map((row) => (row.low === null ? 0 : row.speedup - row.low)),
  });
  const marks = {
    x: fixed.map((row) => row.length), y: fixed.map((row) => row.speedup), name: "measured, 95 % interval", mode: "markers", marker: { symbol: "diamond", size: 9, color: c.bonus },
    error_y: bars(fixed), hovertemplate: "γ = %{x}: %{y:.2f}× measured, median<extra></extra>",
  };
  return [marks, ...told.filter((row) => !Number.isInteger(row.length)).flatMap((row) => [
    { x: [0.5, 8.4], y: [row.speedup, row.speedup], name: row.length + ", measured", mode: "lines", line: { color: c.bonus, width: 1.5, dash: "dash" }, hoverinfo: "skip" },
    { x: [8.4], y: [row.speedup], showlegend: false, mode: "markers", marker: { symbol: "diamond-open", size: 9, color: c.bonus }, error_y: bars([row]), hovertemplate: row.length + ": %{y:.2f}× measured, median<extra></extra>" },
  ])];
}

const CONFIG = { displayModeBar: false, responsive: true };
const draws = {
  rate(P, c) {
    const line = (lane, name, color, width, dash) => ({
      x: data.rate[lane][0], y: data.rate[lane][1], name, mode: "lines", line: { color, width, dash },
      hovertemplate: "%{y:.1f} tok/s at %{x:.1f} s<extra>" + name + "</extra>",
    });
    return [[line("baseline", "baseline", c.base, 2, "dot"), line("speculative", "speculative", c.accent, 2.5, "solid")],
      layout(c, { title: "lane time, s" }, { title: "tokens/s" })];
  },
  acceptance(P, c) {
    const [x, share, mean] = data.acceptance;
    return [[
      { x, y: share, name: "round", mode: "markers", marker: { color: c.base, size: 5, opacity: 0.55 }, hovertemplate: "round %{x}: %{y:.0%}<extra></extra>" },
      { x, y: mean, name: "running mean", mode: "lines", line: { color: c.accent, width: 2.5 }, hovertemplate: "mean to round %{x}: %{y:.1%}<extra></extra>" },
    ], layout(c, { title: "round" }, { title: "accepted", range: [-0.04, 1.04], tickformat: ".0%", rangemode: "normal" })];
  },
  passes(P, c) {
    const [x, y] = data.final.passes;
    return [[{ x, y, name: "target passes", type: "bar", marker: { color: c.accent }, hovertemplate: "%{y} passes gave %{x} tokens<extra></extra>" }],
      { ...layout(c, { title: "tokens from one target pass", dtick: 1, rangemode: "normal" }, { title: "passes", tickformat: "d", dtick: Math.max(...y) < 6 ? 1 : undefined }), showlegend: false, bargap: 0.25 }];
  },
  model(P, c) {
    const m = data.final.model;
    const traces = [];
    if (m.predicted.length) {
      const there = m.lengths, back = [...there].reverse();
      traces.push({ x: [...there, ...back], y: [...m.high, ...[...m.low].reverse()], name: "band", mode: "lines", fill: "toself", fillcolor: c.soft, line: { width: 1, color: c.accent, dash: "dot" }, hoverinfo: "skip" });
      traces.push({ x: there, y: m.predicted, customdata: m.low.map((low, i) => [low, m.high[i]]), name: "predicted", mode: "lines+markers", line: { color: c.accent, width: 2.5 }, marker: { size: 6 }, hovertemplate: "γ = %{x}: %{y:.2f}× predicted, %{customdata[0]:.2f}–%{customdata[1]:.2f}×<extra></extra>" });
      if (m.best) traces.push({ x: [m.best], y: [m.predicted[m.best - 1]], name: "best γ = " + m.best, mode: "markers", marker: { symbol: "circle-open", size: 15, color: c.accent, line: { width: 2.5 } }, hoverinfo: "skip" });
    }
    if (measured) traces.push(...medians(c));
    const near = measured ? [] : m.measured[0].map((n, i) => [n, m.measured[1][i]]).filter(([n]) => n <= 8);
    if (near.length) traces.push({ x: near.map((p) => p[0]), y: near.map((p) => p[1]), name: "this race", mode: "markers", marker: { symbol: "diamond", size: 9, color: c.bonus }, hovertemplate: "γ = %{x}: %{y:.2f}× in this race<extra></extra>" });
    if (m.adaptive && !measured) traces.push({ x: [0.5, 8.5], y: [m.adaptive, m.adaptive], name: "this race, γ changing", mode: "lines", line: { color: c.bonus, width: 1.5, dash: "dash" }, hovertemplate: "%{y:.2f}× in this race<extra></extra>" });
    const base = { type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: c.base, width: 1.5, dash: "dot" } };
    return [traces, { ...layout(c, { title: "draft length γ", range: [measured ? -0.5 : 0.5, 8.5], dtick: 1, rangemode: "normal" }, { title: "speedup ×" }), shapes: [base],
      annotations: m.predicted.length && !m.best ? [{ text: "no single best γ", xref: "paper", yref: "paper", x: 1, y: 0, xanchor: "right", yanchor: "bottom", showarrow: false, font: { size: 11, color: c.muted } }] : [] }];
  },
};

function says(name) {
  const last = (a) => a[a.length - 1];
  if (name === "rate") return "Tokens per second over lane time. Baseline " + (last(data.rate.baseline[1]) ?? "–") + ", speculative " + (last(data.rate.speculative[1]) ?? "–") + " at the end.";
  if (name === "acceptance") return "Acceptance rate per round. Running mean " + Math.round(100 * (last(data.acceptance[2]) ?? 0)) + " percent.";
  if (name === "passes") return "Tokens per target pass: " + data.final.passes[0].map((n, i) => data.final.passes[1][i] + " passes gave " + n).join(", ") + ".";
  const m = data.final.model;
  return "Predicted speedup by draft length, with the 90 percent band: " + m.predicted.map((x, i) => m.lengths[i] + ": " + x + ", " + m.low[i] + " to " + m.high[i]).join("; ") + ". " + (m.best ? "Best " + m.best + "." : "No single best.")
    + (measured ? " Measured medians: " + measured.filter((row) => row.speedup !== null).map((row) => row.length + ": " + row.speedup.toFixed(2) + (row.low === null ? "" : ", " + row.low.toFixed(2) + " to " + row.high.toFixed(2))).join("; ") + "." : "");
}

// Drawing must not take the machine from an engine that runs on it too: about one part in 25 of the time at most.
let after = 0;
function schedule() {
  if (scheduled) return;
  scheduled = true;
  const wait = data && data.final ? 0 : Math.max(0, after - performance.now());
  setTimeout(() => requestAnimationFrame(draw), wait);
}

async function draw() {
  scheduled = false;
  if (!data || (data.recording && !window.Plotly)) return; // those of a recording wait until the script is read
  let P;
  try { P = await plotly(); } catch (error) { root.dataset.state = "broken"; return; }
  if (!data) return;
  root.dataset.state = "drawn";
  const began = performance.now();
  const c = look();
  const wanted = data.final ? ["rate", "acceptance", "passes", "model"] : ["rate", "acceptance"];
  for (const name of Object.keys(boxes)) {
    const box = boxes[name], canvas = box.querySelector(".sd-canvas");
    const untold = name === "model" && data.final && !data.final.model && !measured; // a trace alone does not tell it
    const empty = name === "model" && data.final && !data.final.model?.predicted.length && !measured;
    const full = wanted.includes(name) && !empty;
    box.dataset.state = full ? "drawn" : untold ? "untold" : data.final ? "none" : "waiting";
    if (!full) continue;
    const [traces, plan] = draws[name](P, c);
    await P.react(canvas, traces, plan, CONFIG);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", says(name));
  }
  const cost = performance.now() - began;
  after = performance.now() + (root.draws ? Math.min(24 * cost, 6000) : 800); // the first is dear, but comes once
  root.spent = (root.spent || 0) + cost;
  root.draws = (root.draws || 0) + 1;
}

function receive(event) {
  if (!root.isConnected) return document.removeEventListener("sd-figures", receive);
  data = event.detail;
  measured = null; // it belongs to the race before
  if (data && data.final) scheduled = false; // the last word is drawn at once
  if (data) return schedule();
  root.dataset.state = "idle";
  for (const box of Object.values(boxes)) box.dataset.state = "waiting";
}

function compare(event) {
  if (!root.isConnected) return document.removeEventListener("sd-measured", compare);
  measured = event.detail;
  if (data && data.final) schedule();
}

new MutationObserver(schedule).observe(document.body, { attributes: true, attributeFilter: ["class"] });
matchMedia("(forced-colors: active)").addEventListener("change", schedule);
document.addEventListener("sd-figures", receive);
document.addEventListener("sd-measured", compare);

// Reading the script and drawing for the first time take the better part of a second. Both are done while the page is
// idle and nothing races; a race that comes first loads it with its first figures, a second after its start.
const idle = (act) => (window.requestIdleCallback || ((f) => setTimeout(f, 200)))(() => {
  if (!root.isConnected || (data && !data.recording)) return;
  if (document.body.dataset.sdPhase === "running") setTimeout(idle, 1000, act);
  else act();
});
const rehearse = () => {
  const stage = document.createElement("div");
  stage.style.cssText = "position:absolute;visibility:hidden;width:300px;height:200px";
  stage.setAttribute("aria-hidden", "true");
  root.append(stage);
  const plan = layout(look(), { title: "x" }, { title: "y" });
  window.Plotly.newPlot(stage, [{ x: [0, 1], y: [0, 1], mode: "lines+markers" }, { x: [0, 1], y: [1, 1], type: "bar" }], plan, CONFIG)
    .then(() => { window.Plotly.purge(stage); stage.remove(); });
};
const prepare = () => idle(() => plotly().then(() => (data ? schedule() : idle(rehearse)), () => {}));
if (document.readyState === "complete") prepare();
else window.addEventListener("load", prepare, { once: true });
