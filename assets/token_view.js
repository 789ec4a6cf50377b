// The race on a page of Gradio: batches become rounds of the view.
// In: props.value, a JSON batch {run, phase, from, rounds, stats, about} (see spec_decode/session/feed.py). Rounds already
// seen are skipped; a gap is filled by asking the server. given.recordings play until a race begins. On the page of this
// app `page.js` adds what that page needs, on any other `guest.js` brings the style sheet, given.sheet.
const root = element.querySelector(".sd-race");
const view = SpecDecode.view(root, given.terms);
SpecDecode.card(view);
SpecDecode.inspector(view);
SpecDecode.timeline(view);
if (SpecDecode.branch) SpecDecode.branch(view);
const player = SpecDecode.player(view, given.recordings || []);
Object.assign(view, { player, SpecDecode }); // for the other scripts of the page
if (SpecDecode.tour) SpecDecode.tour(view, player, given.steps || []);
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
    if (batch.trace) Object.assign(view.race, { whole: batch.trace, final: { stats: batch.stats, figures: batch.figures } });
    if (batch.head) view.race.head = batch.head;
    if (batch.costs) view.race.costs = batch.costs;
    if (batch.phase) view.show(batch);
    if (batch.figures || !batch.run) {
      document.dispatchEvent(new CustomEvent("sd-figures", { detail: batch.figures || null }));
    }
  }
  view.follow();
  root.spent = (root.spent || 0) + performance.now() - began;
  root.flushes = (root.flushes || 0) + 1;
}

// Empties the view; Clear sends the empty batch, which is no change of the value where no race has been.
function clear() {
  reset({ run: "" });
  queue.push(JSON.stringify({ run: "", from: 0, phase: "idle", stats: {}, rounds: [] }));
  flush();
}

if (SpecDecode.page) SpecDecode.page(view, player, clear);
else SpecDecode.guest(view, given.sheet);
watch("value", () => receive(props.value));
player.begin();
receive(props.value);
