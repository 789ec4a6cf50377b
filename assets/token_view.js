// The race on a page of Gradio: batches become rounds of the view, and what the page around it needs.
// In: props.value, a JSON batch {run, phase, from, rounds, stats, about} (see spec_decode/session/feed.py). Rounds already
// seen are skipped; a gap is filled by asking the server. props.recordings play until a race begins.
const root = element.querySelector(".sd-race");
const listen = SpecDecode.listener(root);
const view = SpecDecode.view(root, props.terms);
SpecDecode.card(view);
SpecDecode.inspector(view);
SpecDecode.timeline(view);
const player = SpecDecode.player(view, props.recordings || []);
let run = "", dismissed = "", have = 0, queue = [], scheduled = false, asking = false, again = false;

function reset(batch) {
  player.leave();
  run = batch.run;
  have = 0;
  view.reset(run ? new SpecDecode.Race(batch.about) : null);
}

function take(batch) {
  if (batch.run !== run) reset(batch);
  const skip = have - batch.from;
  if (skip < 0) return ask();
  const fresh = batch.rounds.slice(skip).map(SpecDecode.unpack);
  view.add(fresh);
  have += fresh.length;
}

// One question at a time; what is missed while it is answered is asked for afterwards, since no batch may follow.
function ask() {
  if (!run) return;
  if (asking) {
    again = true;
    return;
  }
  asking = true;
  const wanted = run;
  const answered = (text) => {
    asking = false;
    if (text && wanted === run) receive(text);
    if (again) requestAnimationFrame(ask);
    again = false;
  };
  server.missing(JSON.stringify({ run, from: have })).then(answered, () => answered(""));
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
    if (!batch.run && !run && player.active) continue; // the empty batch that the page begins with
    take(batch);
    if (batch.about) view.race.about = batch.about;
    if (batch.head) view.race.head = batch.head;
    if (batch.phase) show(batch);
    if (batch.figures || !batch.run) {
      document.dispatchEvent(new CustomEvent("sd-figures", { detail: batch.figures || null }));
    }
  }
  view.follow();
  root.spent = (root.spent || 0) + performance.now() - began;
  root.flushes = (root.flushes || 0) + 1;
}

function show(batch) {
  view.show(batch);
  // Until the next status line comes, this one must not say again that the visitor waits.
  if (batch.phase === "done" || batch.phase === "failed") document.querySelector("#sd-status p")?.classList.add("sd-over");
}

// A race of before, whole: what the view held when it was finished.
view.present = ({ about, costs, rounds, pieces, stats, figures, head }) => {
  player.leave();
  dismissed = run || dismissed;
  [run, have] = ["", 0];
  const race = new SpecDecode.Race(about, costs);
  Object.assign(race.pieces, pieces);
  race.head = head;
  race.span = Math.max(...rounds.map((round) => round.clock));
  view.reset(race);
  view.add(rounds);
  view.show({ phase: "done", stats, about });
  for (const lane of view.lanes) lane.box.scrollTop = 0;
  for (const detail of figures ? [null, figures] : [null]) document.dispatchEvent(new CustomEvent("sd-figures", { detail }));
};

// Clear sends the empty batch, which is no change of the value where no race has been.
listen("click", (event) => {
  if (!player.active || !event.target.closest?.("#sd-clear")) return;
  reset({ run: "" });
  flushed(JSON.stringify({ run: "", from: 0, phase: "idle", stats: {}, rounds: [] }));
});
const flushed = (text) => { queue.push(text); flush(); };

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
  if (!view.card.dismiss()) press("sd-stop", "sd-leave", "sd-measure-stop", "sd-measure-leave", "sd-pays-stop", "sd-pays-leave"); // what is open is closed before a race is stopped
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
listen("pointerdown", (event) => { taken = event.pointerType === "mouse" && Boolean(event.target.closest('[role="option"]')); });
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
const rests = ["sd-status", "sd-lab-view", "sd-pays-view"];
const stops = (last) => ["sd-measure", "sd-pays"].filter((name) => last.id.startsWith(name)).flatMap((name) => [name + "-stop", name + "-leave", name + "-run"]);
let last = null, fallen = false;
listen("focusin", (event) => {
  last = event.target;
  fallen = fallen && rests.includes(last.id);
});
const keep = () => {
  const now = document.activeElement;
  const lost = last && (now === document.body || now === last) && !visible(last);
  if (!lost && !(fallen && rests.includes(now.id))) return;
  const next = [...stops(last), "sd-stop", "sd-leave", "sd-run", "sd-lab-stop", "sd-lab-run"].map((id) => document.getElementById(id)).find(visible);
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
player.begin();
receive(props.value);
