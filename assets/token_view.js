// The race on the page: two lanes of tokens and the score board, grown by appending.
// In: props.value, a JSON batch {run, phase, from, rounds, stats, about} (see spec_decode/session/feed.py). Rounds already
// seen are skipped; a gap is filled by asking the server. Every text enters the page through textContent.
const root = element.querySelector(".sd-race");
const find = (selector) => root.querySelector(selector);
const ROLE = { t: "target", a: "accepted", r: "rejected", c: "correction", b: "bonus", p: "prompt" };
const SAYS = {
  t: "the target’s own token, nothing was drafted here",
  a: "drafted, and accepted: the target agreed",
  r: "drafted, and rejected: no part of the text",
  c: "the target’s own token in place of a rejected one",
  b: "the target’s extra token after every drafted token was accepted",
  p: "given: the output is made to begin with it",
};
const FINISH = { stop: "end of text", length: "token limit", cancelled: "stopped", time: "time limit", running: "broke off" };
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
  if (marked && marked.about) hideTip();
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
const SYNTHETIC = "at a synthetic acceptance: times are measured, and the drafter is not judged";
// How near a tie the token was at which lanes part that should not.
const near = (parting) => {
  const gaps = parting ? ["baseline", "speculative"].map((lane) => parting[lane].logit_gap) : [];
  return gaps.length && gaps.every((gap) => gap !== null) ? " (logit gap " + gaps.map((gap) => gap.toPrecision(2)).join(" and ") + ")" : "";
};
const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %");

function show({ phase, stats, about, reading, notes }) {
  const was = root.dataset.phase;
  root.dataset.phase = document.body.dataset.sdPhase = phase;
  about = about || { exact: true, same_text: true, limit: 1, rule: "", why: "", rejected: "probabilities" };
  root.dataset.exact = about.exact ? "yes" : "no";
  root.dataset.rejected = about.rejected;
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
    write(lane.name + ".finish", s.finish ? FINISH[s.finish] || s.finish
      : reading && !s.tokens ? "reading the prompt, " + reading.map((n) => n.toLocaleString("en")).join(" of ") + " tokens"
      : phase === "running" && notes && notes[lane.name] ? notes[lane.name] : "");
    lane.bar.style.transform = "scaleX(" + Math.min(1, (s.tokens || 0) / about.limit) + ")";
  }
  const over = phase === "done" || phase === "failed";
  // Until the next status line comes, this one must not say again that the visitor waits.
  if (over) document.querySelector("#sd-status p")?.classList.add("sd-over");
  write("wall", stats.wall === undefined || !over ? "" : ", " + stats.wall.toFixed(1) + " s,");
  const badge = fields.identical;
  const state = phase === "idle" || about.synthetic || (stats.identical && !stats.same) ? "none" // nothing to compare yet
    : !stats.identical ? (about.same_text ? "differ" : "free") : "same";
  if (badge.dataset.state !== state) badge.dataset.state = state;
  write("identical", state === "none" ? "–"
    : state === "same" ? (over ? "✓ identical" : "✓ identical so far")
    : "≠ differ from token " + (stats.same + 1) + near(stats.parting));
  write("why", phase === "idle" ? "" : about.why);
  const verdict = (over && stats.verdict) || "";
  if (root.dataset.verdict !== verdict) root.dataset.verdict = verdict;
  write("verdict", (about.synthetic ? SYNTHETIC : VERDICT[verdict]) || "speculative ÷ baseline, tokens per second");
  write("interval", stats.interval ? range(stats.interval) + " (95 %)" : "");
  write("end_to_end", number(stats.end_to_end, 2, "×"));
  write("end_to_end_interval", range(stats.end_to_end_interval));
  write("loops", stats.looping
    ? "The text loops: it repeats itself. That is easy to draft, so this speedup flatters the drafter."
    : "");
  caption(about.ran);
  if (was !== phase) {
    if (phase === "running") {
      spoken.textContent = "The race has started.";
      if (window.innerWidth <= 800) root.scrollIntoView({ block: "start", behavior: "smooth" });
    }
    if (over) spoken.textContent = "The race is over. Speedup " + fields.speedup.textContent
      + (stats.interval ? ", 95 percent interval " + range(stats.interval).replace("–", " to ") : "")
      + (about.synthetic ? ", " + SYNTHETIC : verdict ? ", " + VERDICT[verdict] : "") + ". " + fields.loops.textContent + " Texts " + fields.identical.textContent + ".";
    if (phase === "idle") spoken.textContent = "";
  }
}

// What was run, whatever the form holds by now.
let captioned = "";
function caption(ran) {
  const text = ran ? JSON.stringify(ran) : "";
  if (text === captioned) return;
  captioned = text;
  find(".sd-ran").hidden = !ran;
  if (!ran) return;
  find(".sd-ran-prompt").textContent = ran.prompt;
  find(".sd-ran-settings").replaceChildren(...ran.settings.flatMap((said, i) => [i ? " · " : "", ...explained(said)]));
}

// Text with each term that the page explains made a button; the sentences are those of spec_decode/ui/terms.py.
const TERM = new RegExp("(?<![\\w-])(" + Object.keys(props.terms).join("|") + ")(?![\\w-])");
function explained(text) {
  return text.split(TERM).map((part, i) => {
    if (i % 2 === 0) return part;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sd-term";
    button.textContent = part;
    return button;
  });
}

// One card for all tokens and terms. It shows what the pointer, the focus or the arrow keys are on, and goes with
// them; a click or a tap pins it, until another, its button or Escape.
let marked = null, pinned = null, byKeys = false;
function describe(a) {
  const lines = [["p", "sd-tip-head", ROLE[a.role] + " " + JSON.stringify(a.text || "…")], ["p", "sd-tip-says", a.text
    ? SAYS[a.role] || "" : "part of a character; the last of its tokens shows it"]];
  const facts = [["target p", a.p === null ? "not known" : String(a.p)]];
  if (a.lane.name === "speculative") {
    if (a.position !== null) facts.push(["draft q", a.q === null ? "not drawn" : String(a.q)]);
    facts.push(["round", a.index ? String(a.index) : "prefill"]);
    facts.push(["in the draft", a.position === null ? "not drafted" : a.position + " of " + a.drafted]);
    if (a.kl !== null && a.kl !== undefined) facts.push(["KL of round", a.kl + " nat"]);
  } else facts.push(["pass", a.index ? String(a.index) : "prefill"]);
  return [lines, facts];
}
function make(tag, name, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
}
function showTip(anchor, keys) {
  if (anchor === marked) return;
  hideTip();
  marked = anchor;
  byKeys = Boolean(keys);
  tip.replaceChildren();
  if (anchor.about) {
    for (const mate of anchor.about.mates) mate.classList.add("mate");
    anchor.classList.add("cur");
    const [lines, facts] = describe(anchor.about);
    for (const [tag, name, text] of lines) tip.append(make(tag, name, text));
    tip.append(make("dl", "", ...facts.map(([name, text]) =>
      make("div", "", make("dt", "", ...explained(name)), make("dd", "", text)))));
  } else {
    tip.append(make("p", "sd-tip-head", anchor.textContent), make("p", "sd-tip-text", props.terms[anchor.textContent]));
  }
  tip.hidden = false;
  place();
}
function place() {
  if (!marked.isConnected) return; // it stood in the card itself, or in a line that was written anew
  const at = marked.getClientRects()[0] || marked.getBoundingClientRect();
  const home = root.getBoundingClientRect();
  const pane = marked.about ? marked.about.lane.box.getBoundingClientRect() : at;
  const top = Math.min(Math.max(at.top, pane.top), pane.bottom), bottom = Math.min(Math.max(at.bottom, pane.top), pane.bottom);
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const above = top - tip.offsetHeight - 8;
  tip.style.left = Math.max(8, Math.min(at.left, room)) - home.left + "px";
  tip.style.top = (above > 4 ? above : bottom + 8) - home.top + "px";
}
function pin() {
  const lane = marked.about && marked.about.lane;
  pinned = { lane, follow: lane && lane.follow };
  if (lane) lane.follow = false; // the token must not scroll away beneath its card
  const close = make("button", "sd-tip-close", "×");
  close.type = "button";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", hideTip);
  tip.prepend(close);
  tip.setAttribute("role", "dialog");
  tip.setAttribute("aria-label", marked.about ? "Token" : "Definition");
  place();
}
function hideTip() {
  if (!marked) return;
  const from = tip.contains(document.activeElement) && (marked.about ? marked.about.lane.box : marked);
  if (marked.about) {
    for (const mate of marked.about.mates) mate.classList.remove("mate");
    marked.classList.remove("cur");
  }
  if (pinned && pinned.lane) pinned.lane.follow = pinned.follow;
  marked = pinned = null;
  byKeys = false;
  tip.hidden = true;
  tip.setAttribute("role", "tooltip");
  tip.removeAttribute("aria-label");
  if (from) from.focus({ preventScroll: true });
}
const anchorOf = (node) => {
  const found = node.closest ? node.closest(".sd-term, .sd-text .t") : null;
  return found && (found.about || props.terms[found.textContent]) ? found : null;
};
// Listeners on the document leave with this component.
const listen = (name, act) => {
  const guarded = (event) => (root.isConnected ? act(event) : document.removeEventListener(name, guarded, true));
  document.addEventListener(name, guarded, true);
};
listen("pointerover", (event) => {
  if (event.pointerType === "touch" || pinned) return;
  const anchor = anchorOf(event.target);
  if (anchor) showTip(anchor);
  else if (!byKeys) hideTip();
});
let pressed = null;
listen("pointerdown", (event) => {
  pressed = event.isPrimary ? [event.clientX, event.clientY] : null;
  taken = event.pointerType === "mouse" && Boolean(event.target.closest('[role="option"]')); // see the drop-downs below
});
listen("pointerup", (event) => { // a scroll by touch ends in pointercancel instead
  if (!pressed || event.button || Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 8) return;
  if (tip.contains(event.target) && !anchorOf(event.target)) return;
  const anchor = anchorOf(event.target);
  if (anchor && !anchor.about) return; // a button: its click says so
  toggle(anchor);
});
listen("click", (event) => {
  const anchor = anchorOf(event.target);
  if (anchor && !anchor.about) toggle(anchor);
});
function toggle(anchor) {
  const again = pinned && anchor === marked;
  if (pinned) hideTip();
  if (!anchor || again) return;
  showTip(anchor);
  pin();
}
listen("focusin", (event) => {
  const anchor = anchorOf(event.target);
  if (!anchor || anchor.about) return;
  anchor.setAttribute("aria-description", props.terms[anchor.textContent]);
  if (!pinned && anchor.matches(":focus-visible")) showTip(anchor, true);
});
listen("focusout", (event) => { if (event.target === marked && !pinned) hideTip(); });
const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
for (const lane of lanes) {
  lane.box.addEventListener("scroll", () => {
    lane.follow = lane.box.scrollHeight - lane.box.scrollTop - lane.box.clientHeight < 24;
    if (pinned && pinned.lane === lane) { lane.follow = false; place(); }
    else if (marked && !pinned && !lane.box.matches(":focus")) hideTip();
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
    showTip(span, true);
    lane.follow = false;
    span.scrollIntoView({ block: "nearest" });
    place();
    const [lines, facts] = describe(span.about);
    spoken.textContent = lines[0][2] + ". " + facts.map((f) => f.join(" ")).join(", ");
  });
  lane.box.addEventListener("blur", () => { if (!pinned) hideTip(); });
  lane.box.addEventListener("copy", (event) => { // rejected tokens are no part of the text
    const range = getSelection().rangeCount ? getSelection().getRangeAt(0) : null;
    if (!range || range.collapsed || !lane.box.contains(range.commonAncestorContainer)) return;
    const part = range.cloneContents();
    for (const thrown of part.querySelectorAll(".r")) thrown.remove();
    event.clipboardData.setData("text/plain", part.textContent);
    event.preventDefault();
  });
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
listen("keydown", (event) => {
  const list = event.target.closest && event.target.closest('[role="combobox"][aria-expanded="true"]');
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); press("sd-run"); }
  taken = event.key === "Enter" && Boolean(list);
  if (event.key !== "Escape" || list) return;
  const opened = marked && (pinned || byKeys); // is closed before a race is stopped
  hideTip();
  if (!opened) press("sd-stop", "sd-leave");
});
// Gradio opens the list of a drop-down when it gets the focus and by nothing else, leaves it open when the focus goes on
// by Tab, and drops the focus when an option is taken.
const opens = { pointerdown: () => true, keydown: (event) => /^Arrow(Down|Up)$/.test(event.key) };
for (const [name, does] of Object.entries(opens)) listen(name, (event) => {
  const box = event.target;
  if (box !== document.activeElement || !box.matches('[role="combobox"][aria-expanded="false"]') || !does(event)) return;
  box.dispatchEvent(new FocusEvent("focus"));
});
let taken = false;
listen("focusout", (event) => {
  const box = event.target;
  if (box.matches('[role="combobox"]')) setTimeout(() => {
    if (taken && document.activeElement === document.body) {
      box.focus({ preventScroll: true });
      box.dispatchEvent(new FocusEvent("blur")); // the focus would open it again
    } else if (box !== document.activeElement && box.getAttribute("aria-expanded") === "true") {
      box.dispatchEvent(new FocusEvent("blur"));
    }
    taken = false;
  }, 50);
});

// Focus does not fall to the body: where the element that had it was hidden, disabled or removed, it goes to whatever
// took its place, at worst to the status line, or to the view of the other tab.
const visible = (node) => node && node.isConnected && !node.disabled && node.getClientRects().length;
const rests = ["sd-status", "sd-lab-view"];
let last = null, fallen = false;
listen("focusin", (event) => {
  last = event.target;
  fallen = fallen && rests.includes(last.id);
});
const keep = () => {
  const now = document.activeElement;
  const lost = last && (now === document.body || now === last) && !visible(last);
  if (!lost && !(fallen && rests.includes(now.id))) return;
  const next = ["sd-stop", "sd-leave", "sd-run", "sd-lab-stop", "sd-lab-run"].map((id) => document.getElementById(id)).find(visible);
  const status = rests.map((id) => document.getElementById(id)).find(visible);
  if (!next && status) status.tabIndex = -1;
  fallen = !next;
  const to = next || status;
  if (to && to !== now) to.focus({ preventScroll: true });
};
listen("focusout", () => setTimeout(keep, 0));
const page = root.closest(".gradio-container") || document.body;
new MutationObserver(keep).observe(page, { subtree: true, childList: true, attributeFilter: ["disabled", "hidden", "class", "style"] });

// Gradio writes the place in the queue over the status line, faint and unexplained; here it is said in words.
const waits = () => {
  const place = document.querySelector("#sd-status .sd-place"), queue = document.querySelector("#sd-status .progress-text");
  const found = place && queue && queue.textContent.match(/(\d+)\/(\d+)\s*\|\s*([\d.]+)(?:\/([\d.]+))?/);
  if (!found) return;
  const [, rank, size, passed, whole] = found;
  const left = 5 * Math.ceil((whole - passed) / 5);
  const text = ", place " + rank + " of " + size + " in the queue" + (left > 0 ? ", result in about " + left + " s" : "");
  if (place.textContent !== text) place.textContent = text;
};
const watchStatus = (tries) => {
  const status = document.getElementById("sd-status");
  if (status) new MutationObserver(waits).observe(status, { subtree: true, childList: true, characterData: true });
  else if (tries) setTimeout(watchStatus, 50, tries - 1);
};
watchStatus(100);

// The settings stand open where there is room beside the race; the panel may be mounted after this component.
const unfold = (tries) => {
  const panel = document.querySelector("#sd-settings > button");
  if (!panel) return tries && setTimeout(unfold, 50, tries - 1);
  if (window.innerWidth > 960 && !panel.classList.contains("open")) panel.click();
};
setTimeout(unfold, 0, 100);

watch("value", () => receive(props.value));
receive(props.value);
