// The view of the exactness lab: bars of observed counts with marks of expected ones, the figures and the verdict.
// In: props.value, JSON of spec_decode/session/lab.py: {phase, count, of, cells, chances, observed, statistic, freedom, p,
// small, smallest, verdict, words}; {phase: "waiting" | "stopped"} says what has become of a test without its counts.
const root = element.querySelector(".sd-test");
const find = (selector) => root.querySelector(selector);
const fields = {};
for (const node of root.querySelectorAll("[data-k]")) fields[node.dataset.k] = node;
const bars = find(".sd-test-bars"), verdict = find(".sd-test-verdict"), progress = find(".sd-test-bar");
const body = find(".sd-test-table tbody");
const count = (n) => n.toLocaleString("en-US");
const percent = (x, digits) => (100 * x).toFixed(digits).replace(/\.?0+$/, "") + " %";
let now = { phase: "idle" }, drawn = "";

function build(cells) {
  drawn = cells.join();
  bars.replaceChildren();
  body.replaceChildren();
  bars.dataset.few = cells.length < 5 ? "yes" : "no";
  for (const name of cells) {
    const column = document.createElement("span");
    column.className = "sd-cell";
    for (const part of ["sd-fill", "sd-mark", "sd-name"]) column.append(Object.assign(document.createElement("i"), { className: part }));
    column.lastChild.textContent = name;
    bars.append(column);
    const row = document.createElement("tr");
    row.append(Object.assign(document.createElement("th"), { scope: "row", textContent: name }));
    row.append(document.createElement("td"), document.createElement("td"));
    body.append(row);
  }
}

function say(text, kind) {
  if (verdict.textContent !== text) verdict.textContent = text;
  verdict.dataset.verdict = kind;
}

function draw() {
  const { cells, chances, observed } = now;
  if (cells.join() !== drawn) build(cells);
  // The axis ends where the largest bar will, so that bars grow through the test.
  const whole = (i) => Math.max(chances[i] * now.of, now.count ? (observed[i] * now.of) / now.count : 0);
  const early = Math.min(1, now.count / 300); // a few texts say little of where a bar will end
  const top = 1.06 * Math.max(...chances.map((p, i) => early * whole(i) + (1 - early) * p * now.of), ...observed);
  const off = [];
  cells.forEach((name, i) => {
    const due = chances[i] * now.count, spread = Math.sqrt(Math.max(due * (1 - chances[i]), 1e-9));
    const column = bars.children[i], row = body.children[i], far = now.count >= 100 && Math.abs(observed[i] - due) > 4 * spread + 1;
    column.children[0].style.height = (100 * observed[i]) / top + "%";
    column.children[1].style.bottom = (100 * due) / top + "%";
    column.classList.toggle("sd-off", far);
    column.title = name + ": " + count(observed[i]) + " observed, " + due.toFixed(1) + " expected";
    row.children[1].textContent = count(observed[i]);
    row.children[2].textContent = due.toFixed(1);
    if (far) off.push(name);
  });
  bars.setAttribute("aria-label", count(now.count) + " texts. " + (off.length ? "Far from what is expected: " + off.join(", ") + "." : "No count is far from what is expected.") + " The table below has all counts.");
  fields.counts.textContent = (now.greedy ? "is the text the target’s own? " : "texts of three tokens; ") + count(now.count) + " of " + count(now.of);
  fields.p.textContent = now.count ? now.p : "–";
  fields.freedom.textContent = now.greedy ? "none" : now.freedom;
  fields.statistic.textContent = now.greedy || now.statistic === null ? "" : "(" + now.statistic.toLocaleString("en-US") + ")";
  fields.smallest.textContent = percent(now.smallest, 2);
  const share = now.of ? Math.floor((100 * now.count) / now.of) : 0;
  progress.setAttribute("aria-valuenow", share);
  progress.firstElementChild.style.transform = "scaleX(" + share / 100 + ")";
}

function receive(value) {
  let got;
  try { got = JSON.parse(value || "{}"); } catch (error) { return; }
  if (!got.phase) return;
  if (got.phase === "running" && now.phase === "stopped") return; // what was on its way; another test begins as "waiting"
  if (got.phase === "stopped" && !["running", "waiting"].includes(now.phase)) return; // it had ended by itself
  now = got.cells ? got : { ...now, phase: got.phase, words: got.words };
  root.dataset.phase = now.phase;
  fields.provisional.hidden = now.phase === "done";
  if (got.cells) draw();
  if (now.phase === "waiting" && window.innerWidth <= 960) root.scrollIntoView({ block: "start" });
  if (now.phase === "waiting") say("Waiting for the device.", "none");
  if (now.phase === "running") say(now.broken ? "Running, with the broken rule." : "Running.", "none");
  if (now.phase === "failed") say(now.words || "The test broke off.", "cannot tell");
  if (now.phase === "stopped") say(now.cells && now.count ? "Cannot tell: stopped after " + count(now.count) + " of " + count(now.of) + " texts. A verdict is given at the end only." : "Stopped before the first text.", "cannot tell");
  if (now.phase === "done") say(now.verdict[0].toUpperCase() + now.verdict.slice(1) + ". " + now.words, now.verdict);
}

fields.family.textContent = percent(props.level * props.family, 2);
fields.tests.textContent = props.family;
fields.level.textContent = percent(props.level, 3);
watch("value", () => receive(props.value));
receive(props.value);
