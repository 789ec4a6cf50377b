// The race on the page: two lanes of tokens and the score board, grown by appending.
// In: props.value, a JSON batch {run, phase, from, rounds, stats, about} (see spec_decode/ui/feed.py). Rounds already
// seen are skipped; a gap is filled by asking the server. Every text enters the page through textContent.
const root = element.querySelector(".sd-race");
const find = (selector) => root.querySelector(selector);
const ROLE = { t: "target", a: "accepted", r: "rejected", c: "correction", b: "bonus", p: "prompt" };
const SAYS = {
  t: "the target’s own token, nothing was guessed here",
  a: "guessed by the drafter, and the target agreed",
  r: "guessed by the drafter, and thrown away",
  c: "the target’s own token in place of a rejected guess",
  b: "the target’s extra token after every guess was accepted",
};
const FINISH = { stop: "end of text", length: "token limit", cancelled: "stopped", running: "broke off" };
const fields = {};
for (const node of root.querySelectorAll("[data-k]")) fields[node.dataset.k] = node;
const tip = find(".sd-tip");
const spoken = find(".sd-sr");

const lanes = ["baseline", "speculative"].map((name) => ({
  name,
  box: find(".sd-" + name + " .sd-text"),
  bar: find(".sd-" + name + " .sd-bar i"),
  empty: find(".sd-" + name + " .sd-empty"),
  spans: [], line: null, follow: true, cursor: -1,
}));
let run = "", dismissed = "", have = 0, queue = [], scheduled = false, asking = false;

function reset(id) {
  run = id;
  have = 0;
  for (const lane of lanes) {
    lane.box.replaceChildren();
    if (!id) lane.box.append(lane.empty);
    Object.assign(lane, { spans: [], line: null, follow: true, cursor: -1 });
    lane.bar.style.transform = "scaleX(0)";
    lane.box.removeAttribute("aria-activedescendant");
  }
  hideTip();
}

function append(round) {
  const [laneIndex, index, asked, refused, kl, tokens] = round;
  const lane = lanes[laneIndex];
  const drafted = tokens.filter((t) => t[4] !== null).length;
  const mates = [];
  for (const [text, role, p, q, position] of tokens) {
    if (!lane.line) {
      lane.line = document.createElement("div");
      lane.line.className = "sd-line";
      lane.fresh.append(lane.line);
    }
    const span = document.createElement("span");
    const thrown = role === "r";
    const breaks = text.includes("\n");
    span.className = "t " + (role === "t" ? "t0" : role) + (breaks ? " nl" : "") + (text ? "" : " part");
    span.textContent = thrown ? text.replaceAll("\n", "↵") : text;
    span.about = { lane, index, asked, refused, kl, text, role, p, q, position, drafted, mates, at: lane.spans.length };
    mates.push(span);
    lane.spans.push(span);
    lane.line.append(span);
    if (!thrown && text.endsWith("\n")) lane.line = null;
  }
}

function take(batch) {
  if (batch.run !== run) reset(batch.run);
  const skip = have - batch.from;
  if (skip < 0) return ask();
  const fresh = batch.rounds.slice(skip);
  if (fresh.length) {
    for (const lane of lanes) lane.fresh = document.createDocumentFragment();
    for (const round of fresh) append(round);
    for (const lane of lanes) if (lane.fresh.childNodes.length) lane.box.append(lane.fresh);
    have += fresh.length;
  }
}

function ask() {
  if (asking || !run) return;
  asking = true;
  const wanted = run;
  server.missing(JSON.stringify({ run, from: have })).then((text) => {
    asking = false;
    if (text && wanted === run) receive(text);
  }, () => { asking = false; });
}

function receive(text) {
  if (!text) return;
  queue.push(text);
  if (scheduled) return;
  scheduled = true;
  if (document.hidden) setTimeout(flush, 0);
  else requestAnimationFrame(flush);
}

function flush() {
  scheduled = false;
  const began = performance.now();
  const texts = queue;
  queue = [];
  for (const text of texts) {
    const batch = JSON.parse(text);
    if (!batch.run) dismissed = run || dismissed;
    else if (batch.run === dismissed) continue; // what was cleared stays so
    take(batch);
    if (batch.phase) show(batch);
    if (batch.figures || !batch.run) {
      document.dispatchEvent(new CustomEvent("sd-figures", { detail: batch.figures || null }));
    }
  }
  for (const lane of lanes) if (lane.follow) lane.box.scrollTop = lane.box.scrollHeight;
  root.spent = (root.spent || 0) + performance.now() - began;
  root.flushes = (root.flushes || 0) + 1;
}

const write = (key, text) => { if (fields[key].textContent !== text) fields[key].textContent = text; };
const number = (x, digits, unit) => (x === null || x === undefined ? "–" : x.toFixed(digits) + (unit || ""));
const range = (ends) => (ends ? ends[0].toFixed(2) + "–" + ends[1].toFixed(2) + "×" : "");
const VERDICT = {
  faster: "faster than the baseline, same model, same prompt",
  slower: "slower than the baseline, same model, same prompt",
  "no difference": "no measurable difference: the interval holds 1×",
  "nothing drafted": "nothing was drafted: both lanes took plain steps",
};
const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %");

function show({ phase, stats, about }) {
  const was = root.dataset.phase;
  root.dataset.phase = document.body.dataset.sdPhase = phase;
  about = about || { exact: true, same_text: true, limit: 1, rule: "" };
  root.dataset.exact = about.exact ? "yes" : "no";
  write("speedup", number(stats.speedup, 2, "×"));
  write("acceptance", percent(stats.acceptance));
  write("per_pass", number(stats.per_pass, 2));
  write("refused", percent(stats.refused));
  write("kl", number(stats.kl, 3, " nat"));
  for (const lane of lanes) {
    const s = stats[lane.name] || {};
    write(lane.name + ".rate", number(s.rate, 1));
    write(lane.name + ".first", number(s.first, 2, " s"));
    write(lane.name + ".tokens", s.tokens === undefined ? "–" : String(s.tokens));
    write(lane.name + ".clock", number(s.clock, 2, " s"));
    write(lane.name + ".finish", s.finish ? FINISH[s.finish] || s.finish : "");
    lane.bar.style.transform = "scaleX(" + Math.min(1, (s.tokens || 0) / about.limit) + ")";
  }
  const over = phase === "done" || phase === "failed";
  // Until the next status line comes, this one must not say again that the visitor waits.
  if (over) document.querySelector("#sd-status p")?.classList.add("sd-over");
  write("wall", stats.wall === undefined || !over ? "" : ", " + stats.wall.toFixed(1) + " s,");
  const badge = fields.identical;
  const state = phase === "idle" || stats.same === undefined ? "none"
    : !stats.identical ? (about.same_text ? "differ" : "free") : "same";
  if (badge.dataset.state !== state) badge.dataset.state = state;
  write("identical", state === "none" ? "–"
    : state === "same" ? (over ? "✓ identical" : "✓ identical so far")
    : "≠ differ from token " + (stats.same + 1));
  write("why", phase === "idle" ? ""
    : !about.exact ? "The threshold rule is lossy: it lets guesses through that the target would refuse, so the texts may differ and the speedup is not free."
    : !about.same_text ? "Rejection sampling is exact in distribution: the lanes draw separately, so they may show different, equally likely texts."
    : "");
  const verdict = (over && stats.verdict) || "";
  if (root.dataset.verdict !== verdict) root.dataset.verdict = verdict;
  write("verdict", VERDICT[verdict] || "speculative ÷ baseline, tokens per second");
  write("interval", stats.interval ? range(stats.interval) + " (95 %)" : "");
  write("end_to_end", number(stats.end_to_end, 2, "×"));
  write("end_to_end_interval", range(stats.end_to_end_interval));
  write("loops", stats.looping
    ? "The text loops: it says the same again and again. That is easy to draft, so this speedup flatters the drafter."
    : "");
  if (was !== phase) {
    if (phase === "running") {
      spoken.textContent = "The race has started.";
      if (window.innerWidth <= 800) root.scrollIntoView({ block: "start", behavior: "smooth" });
    }
    if (over) spoken.textContent = "The race is over. Speedup " + fields.speedup.textContent
      + (stats.interval ? ", 95 percent interval " + range(stats.interval).replace("–", " to ") : "")
      + (verdict ? ", " + VERDICT[verdict] : "") + ". " + fields.loops.textContent + " Texts " + fields.identical.textContent + ".";
    if (phase === "idle") spoken.textContent = "";
  }
}

// One tooltip for all tokens: by pointer, or by arrow keys within a lane.
let marked = null;
function describe(a) {
  const lines = [["p", "sd-tip-head", ROLE[a.role] + " " + JSON.stringify(a.text || "…")], ["p", "sd-tip-says", a.text
    ? SAYS[a.role] || "" : "part of a character; the last of its tokens shows it"]];
  const facts = [["target p", a.p === null ? "not known" : String(a.p)]];
  if (a.lane.name === "speculative") {
    if (a.position !== null) facts.push(["draft q", a.q === null ? "certain guess" : String(a.q)]);
    facts.push(["round", a.index ? String(a.index) : "prefill"]);
    facts.push(["in the draft", a.position === null ? "not drafted" : a.position + " of " + a.drafted]);
    if (a.kl !== null && a.kl !== undefined) facts.push(["KL of round", a.kl + " nat"]);
  } else facts.push(["pass", a.index ? String(a.index) : "prefill"]);
  return [lines, facts];
}
function showTip(span) {
  if (span === marked) return;
  hideTip();
  marked = span;
  for (const mate of span.about.mates) mate.classList.add("mate");
  span.classList.add("cur");
  const [lines, facts] = describe(span.about);
  tip.replaceChildren();
  for (const [tag, name, text] of lines) {
    const node = document.createElement(tag);
    node.className = name;
    node.textContent = text;
    tip.append(node);
  }
  const list = document.createElement("dl");
  for (const [name, text] of facts) {
    const row = document.createElement("div");
    const term = document.createElement("dt");
    const value = document.createElement("dd");
    term.textContent = name;
    value.textContent = text;
    row.append(term, value);
    list.append(row);
  }
  tip.append(list);
  tip.hidden = false;
  const at = (span.getClientRects()[0] || span.getBoundingClientRect());
  const home = root.getBoundingClientRect();
  const width = tip.offsetWidth, height = tip.offsetHeight;
  const left = Math.min(Math.max(at.left - home.left, 0), home.width - width);
  const above = at.top - height - 8;
  tip.style.left = Math.max(0, left) + "px";
  tip.style.top = (above > 4 ? above : at.bottom + 8) - home.top + "px";
}
function hideTip() {
  if (!marked) return;
  for (const mate of marked.about.mates) mate.classList.remove("mate");
  marked.classList.remove("cur");
  marked = null;
  tip.hidden = true;
}
root.addEventListener("pointerover", (event) => {
  const span = event.target.closest(".sd-text .t");
  if (span && span.about) showTip(span);
  else hideTip();
});
root.addEventListener("pointerleave", hideTip);
const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
for (const lane of lanes) {
  lane.box.addEventListener("scroll", () => {
    lane.follow = lane.box.scrollHeight - lane.box.scrollTop - lane.box.clientHeight < 24;
    if (marked && !lane.box.matches(":focus")) hideTip();
  }, { passive: true });
  lane.box.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step || !lane.spans.length || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const hidden = (span) => !span.about.text || (span.about.role === "r" && root.classList.contains("hide-rejected"));
    let next = Math.min(lane.spans.length - 1, Math.max(0, lane.cursor + step));
    const way = step < 0 && next > 0 ? -1 : 1;
    while (hidden(lane.spans[next]) && lane.spans[next + way]) next += way;
    const before = lane.spans[lane.cursor];
    if (before) before.removeAttribute("id");
    lane.cursor = next;
    const span = lane.spans[next];
    span.id = "sd-cursor-" + lane.name;
    lane.box.setAttribute("aria-activedescendant", span.id);
    lane.follow = false;
    span.scrollIntoView({ block: "nearest" });
    showTip(span);
    const [lines, facts] = describe(span.about);
    spoken.textContent = lines[0][2] + ". " + facts.map((f) => f.join(" ")).join(", ");
  });
  lane.box.addEventListener("blur", hideTip);
}
find(".sd-toggle input").addEventListener("change", (event) => {
  root.classList.toggle("hide-rejected", !event.target.checked);
});

// Ctrl+Enter runs, Esc stops: whichever of the buttons is there and enabled.
const press = (...ids) => {
  for (const id of ids) {
    const node = document.getElementById(id);
    const button = node && (node.matches("button") ? node : node.querySelector("button"));
    if (button && !button.disabled && button.offsetParent) return button.click();
  }
};
const keys = (event) => {
  if (!root.isConnected) return document.removeEventListener("keydown", keys, true);
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); press("sd-run"); }
  if (event.key === "Escape") { hideTip(); press("sd-stop", "sd-leave"); }
};
document.addEventListener("keydown", keys, true);

// The settings stand open where there is room beside the race; the panel may be mounted after this component.
const unfold = (tries) => {
  const panel = document.querySelector("#sd-settings > button");
  if (!panel) return tries && setTimeout(unfold, 50, tries - 1);
  if (window.innerWidth > 960 && !panel.classList.contains("open")) panel.click();
};
setTimeout(unfold, 0, 100);

watch("value", () => receive(props.value));
receive(props.value);
