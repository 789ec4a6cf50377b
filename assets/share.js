// Share and open: a link, a saved replay, an image, a snippet for embedding; files that hold a race; and the same race run
// again here. All of it in the browser: a link keeps to the fragment, and no file is uploaded.
// In: `view` and `SpecDecode` of the token view, the element of this component, props.tables (spec_decode/share/saved.py).
// Form values come as events sd-form, and sd-filled says that a link was put into the form (spec_decode/ui/share.py).
const { make, button } = SpecDecode, { tables } = props, { player } = view;
const home = element.querySelector(".sd-share"), page = new URL(location.href), embedded = page.searchParams.get("embed") === "1";
document.documentElement.classList.toggle("sd-embed", embedded);
home.tables = tables; // for whoever has the element

const says = make("p", "sd-share-says");
says.setAttribute("role", "status");
const tell = (text) => {
  says.textContent = text;
  shown.hidden = true;
};
const press = (id) => document.getElementById(id).click();
const stem = () => "spec-decode-" + (view.race.trace.date || "race").slice(0, 10);

// What was shared, to be copied by hand where the clipboard is closed to the page.
const shown = make("textarea", "sd-share-text");
shown.readOnly = true;
shown.hidden = true;
shown.addEventListener("focus", () => shown.select());
async function copy(text, what) {
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  tell(copied ? what + " copied: " + text.length.toLocaleString("en") + " characters." : "The clipboard is closed to this page; copy the text below.");
  shown.value = text;
  shown.hidden = false;
  shown.setAttribute("aria-label", what);
  if (!copied) shown.focus();
}
const attempt = (act) => async () => {
  try { await act(); } catch (error) {
    tell(error instanceof SpecDecode.Refused ? error.message : "That did not work (" + error.name + ").");
  }
};

// The values of the form as they are now.
const form = () => new Promise((done) => {
  document.addEventListener("sd-form", (event) => done(event.detail), { once: true });
  press("sd-form");
});
const ask = make("input", "");
ask.type = "checkbox";
async function address(live) {
  const asked = await form(), { whole } = view.race;
  const values = asked.prompt || !whole ? asked : SpecDecode.formOf(whole.request) || asked; // that of a recording, where nothing is asked
  const fragment = await SpecDecode.linkOf(values, tables, ask.checked);
  const left = values.system && !values.keep_system;
  return { text: page.origin + page.pathname + (live ? "?embed=1" : "") + "#" + fragment, left };
}
const link = attempt(async () => {
  const { text, left } = await address(false);
  await copy(text, "Link");
  if (left) says.append(" The system prompt is left out; “Keep the system prompt in the trace” puts it in.");
});
const IFRAME = (src, more) => '<iframe src="' + src.replaceAll("&", "&amp;") + '" title="Spec Decode: a race with and without a drafter" width="100%" height="' + more + " style=\"border:0\"></iframe>";
const live = attempt(async () => copy(IFRAME((await address(true)).text, '820"'), "Snippet"));
const still = attempt(() => copy(IFRAME(stem() + ".html", '1100" sandbox="allow-scripts allow-downloads"'), "Snippet"));

// A saved replay: the file without a trace, from the server, filled here.
async function folded(race) {
  const packed = await new Response(new Blob([JSON.stringify(race.trace)]).stream().pipeThrough(new CompressionStream("gzip"))).arrayBuffer();
  const bytes = new Uint8Array(packed);
  let binary = "";
  for (let at = 0; at < bytes.length; at += 8192) binary += String.fromCharCode(...bytes.subarray(at, at + 8192));
  const { stats, figures } = race.final, { rate, acceptance, final } = figures || SpecDecode.series(race.trace);
  const extras = Object.fromEntries(tables.extras.map((name) => [name, stats[name] ?? (name === "looping" ? false : null)]));
  const data = { spec_decode_replay: 1, stats: extras, figures: { rate, acceptance, final }, trace: btoa(binary) };
  return JSON.stringify(data).replace(/[<>&]/g, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}
const save = attempt(async () => {
  const answer = await fetch("replay.html"), shell = answer.ok ? await answer.text() : "", open = '<script type="application/json" id="sd-replay">';
  const place = shell.indexOf(open) + open.length; // the first one: the script of the file names it too
  if (place < open.length) throw new SpecDecode.Refused("The server did not send the empty file that a replay is made of; try again.");
  const short = Array.from(view.race.trace.request.prompt.trim().replace(/\s+/g, " "));
  const title = make("b", "", short.length > 60 ? short.slice(0, 59).join("").trimEnd() + "…" : short.join("")).innerHTML; // a text, escaped
  const head = shell.slice(0, place).replace(/<title>.*?<\/title>/, () => "<title>" + title + " · Spec Decode replay</title>");
  const text = head + await folded(view.race) + shell.slice(place);
  SpecDecode.hand(stem() + ".html", new Blob([text], { type: "text/html" }));
  const system = view.race.trace.request.system ? " It holds the system prompt, as chosen." : "";
  tell("Saved: one file of " + Math.round(new Blob([text]).size / 1000) + " kB that opens without a network." + system);
});
const trace = button("", "", attempt(() => SpecDecode.hand("spec-decode-trace.json", new Blob([JSON.stringify(view.race.trace)], { type: "application/json" }))), "Download trace (JSON)");
trace.id = "sd-download";
const svg = () => SpecDecode.image(view.race.final.stats, view.race.trace, tables);
const picture = attempt(() => SpecDecode.hand(stem() + ".svg", new Blob([svg()], { type: "image/svg+xml" })));
const pixels = attempt(async () => SpecDecode.hand(stem() + ".png", await SpecDecode.png(svg())));

// Opening a file.
const take = SpecDecode.drop(tables, (recording) => {
  if (document.body.dataset.sdPhase === "running") return tell("A race is running; stop it first, then open the file.");
  player.open(recording, SpecDecode.still());
  tell("Opened: " + recording.recorded + ". The file was read in this browser and sent nowhere.");
  view.root.scrollIntoView({ block: "start" });
}, tell);
const pick = make("input", "sd-sr");
pick.type = "file";
pick.accept = ".json,.gz,.html,application/json,application/gzip,text/html";
pick.tabIndex = -1;
pick.setAttribute("aria-label", "A trace or a saved replay");
pick.addEventListener("change", () => {
  take([...pick.files]);
  pick.value = "";
});

const made = [button("", "", save, "Save replay (HTML)"), button("", "", picture, "Share image (SVG)"), button("", "", pixels, "PNG"), button("", "", still, "Embed the saved file")];
const panel = make("div", "sd-share-panel",
  make("div", "sd-share-row", button("", "", link, "Copy link"), button("", "", live, "Embed this page"), make("label", "", ask, " opening it asks to run the race")),
  make("p", "sd-share-help", "A link holds the prompt and every setting, in its fragment: no server stores it. Embedded, the page shows the prompt, Run and both lanes, and races on this server."),
  make("div", "sd-share-row", ...made),
  make("p", "sd-share-help", "A saved replay is one file with the whole race and its view; it needs no network. Local paths are left out, and the system prompt unless “Keep the system prompt in the trace” was checked. To embed it, put the file beside your page."));
panel.id = "sd-share-panel";
panel.hidden = true;
const toggle = button("", "", () => {
  panel.hidden = !panel.hidden;
  toggle.setAttribute("aria-expanded", String(!panel.hidden));
}, "Share");
toggle.setAttribute("aria-expanded", "false");
toggle.setAttribute("aria-controls", panel.id);
const compared = make("section", "sd-compare");
compared.hidden = true;
compared.setAttribute("aria-label", "Comparison");
home.replaceChildren(make("div", "sd-share-row", trace, toggle, button("", "", () => pick.click(), "Open replay"), pick), panel, says, shown, compared);
// Attributes are written where they change alone: the page looks after the focus whenever one is written.
const put = (node, name, value) => { if (node[name] !== value) node[name] = value; };
const refresh = () => {
  put(trace, "disabled", !view.race.whole);
  for (const each of made) put(each, "disabled", !view.race.whole || !view.race.final);
};
refresh();

// The same race again, here.
const again = button("sd-again", "", attempt(rerun), "Run this again here");
again.hidden = true;
view.root.querySelector(".sd-player").append(again);
const ready = () => document.querySelector('#sd-status p[data-state="ready"]:not([data-recording])') !== null;
const offer = () => { put(again, "hidden", !(player.recording && ready())); };
let pending = null; // the recorded trace that is being run again
async function rerun() {
  const recorded = player.recording.data, values = SpecDecode.formOf(recorded.request);
  if (!values) throw new SpecDecode.Refused("This race has a forced prefix, a draft, a history or a synthetic acceptance, which the form has no place for: python -m spec_decode replay FILE --rerun.");
  const said = await fill(JSON.stringify(SpecDecode.dataOf(values, tables)));
  if (said) return;
  pending = recorded;
  compared.hidden = false;
  compared.replaceChildren(make("h2", "", "The recording, and the same race run here"), make("p", "", "Both results and their differences appear here when the race is over."));
  press("sd-run");
}
const drop = () => { [pending, compared.hidden] = [null, true]; };
const fill = (text) => new Promise((done) => {
  document.addEventListener("sd-filled", (event) => done(event.detail), { once: true });
  home.dataset.fill = text;
  press("sd-fill");
});
function ended() {
  const here = view.race.trace;
  if (!pending || !here || player.active) return;
  if (here.request.prompt !== pending.request.prompt) return drop(); // another race: that one never began
  const omitted = pending.omitted.includes("system") ? [make("p", "", "The recording left its system prompt out, so the texts may differ for that alone.")] : [];
  const rows = SpecDecode.compare(pending, here), texts = rows.filter((row) => row.name.endsWith(" text"));
  compared.replaceChildren(make("h2", "", texts.every((row) => row.same) ? "The same text here as in the recording" : "Another text here than in the recording"), ...omitted, SpecDecode.compared(rows),
    button("", "Close the comparison", () => { compared.hidden = true; }, "Close"));
  pending = null;
  compared.scrollIntoView({ block: "nearest", behavior: SpecDecode.still() ? "auto" : "smooth" });
}
view.parts.push({
  reset: () => { offer(); refresh(); },
  shown: (phase) => {
    offer();
    refresh();
    if (phase === "done") ended();
    if (phase === "failed" || (phase === "idle" && !view.root.dataset.recording)) drop();
  },
});

// A link that was opened: the form is filled by the server's own checks, and `&run=1` asks before it runs.
document.addEventListener("sd-filled", (event) => {
  if (event.detail || !/[#&]race=/.test(location.hash) || home.dataset.fill) return;
  tell("The form was filled from the link.");
  if (!/&run=1(&|$)/.test(location.hash)) return;
  const note = document.querySelector(".sd-ask");
  const close = () => note.replaceChildren();
  const yes = button("sd-ask-yes", "", () => { close(); press("sd-run"); }, "Run it"), asks = make("p", "");
  const wait = () => {
    yes.disabled = document.querySelector("#sd-run:not([disabled])") === null;
    if (yes.isConnected || !note.childNodes.length) setTimeout(wait, 300);
  };
  asks.setAttribute("role", "status");
  note.replaceChildren(asks, make("div", "sd-share-row", yes, button("", "", close, "Not now")));
  setTimeout(() => { asks.textContent = "The link asks to run this race on this server."; }, 100); // what a status says is read out when it changes
  wait();
});
const opened = () => {
  if (!/[#&]race=/.test(location.hash)) return;
  home.dataset.fill = "";
  press("sd-fill");
};
addEventListener("hashchange", () => (home.isConnected ? opened() : null));
const status = (tries) => {
  const found = document.getElementById("sd-status"); // these are mounted in any order
  if (!found || !document.getElementById("sd-fill") || !document.querySelector(".sd-ask")) return tries && setTimeout(status, 100, tries - 1);
  new MutationObserver(offer).observe(found, { subtree: true, childList: true, attributeFilter: ["data-state"] });
  opened();
};
status(100);
if (embedded) {
  const whole = make("a", "sd-whole", "Open in Spec Decode");
  whole.href = page.pathname + location.hash;
  whole.target = "_blank";
  if (/[#&]race=/.test(location.hash)) { // no recording where a race is asked for
    player.leave();
    view.reset();
    view.show({ phase: "idle", stats: {} });
  }
  view.root.append(whole);
}
