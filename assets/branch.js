// What a visitor tries on a finished race: another token at a position, and a draft of their own.
// In: a view with its inspector, whose race tells what branches are made of (`about.request`, else `about.unbranched` says
// why there are none; spec_decode/session/branch.py). Out: questions as events "sd-ask" of the document, which another race
// or an event "sd-answer" follows; one with `leave` takes the question of a round back. The page holds all of it: the
// races, the ids, the score. Knows neither Gradio nor a server. Every text enters the page as a text node.
SpecDecode.branch = (view) => {
  const { root } = view, { make, button, digits, quoted } = SpecDecode, listen = SpecDecode.listener(root);
  const MOST = 16; // tokens of a draft in a round
  let entries = [], at = 0; // the original and its branches: {label, from, kept, race, state, figures}
  let pending = null, restoring = false;

  const prompts = (race, lane) => (race.rounds[lane][0] || { tokens: [] }).tokens.filter((t) => t.role === "prompt");
  const text = (race, lane) => [...prompts(race, lane), ...race.rounds[lane].flatMap((r) => r.tokens.filter(SpecDecode.emits))];
  // The place in the text that a position of a round is judged for; -1 where the text never came to it.
  function placeOf(race, round, column) {
    if (column.verdict !== "accepted" && !column.own) return -1;
    const before = race.rounds[round.lane].filter((r) => r.index < round.index).flatMap((r) => r.tokens.filter(SpecDecode.emits));
    return prompts(race, round.lane).length + before.length + column.place - 1;
  }
  // Why nothing can be tried now; empty where it can.
  function reason() {
    if (root.dataset.recording) return "This is a recording, and another model may have made it. Race your own prompt to try another token or to draft.";
    const { about } = view.race;
    if (root.dataset.phase === "running") return "Possible once the race is over.";
    if (!about) return "Once a race is over, you can draft for it, or open a token and ask what if another stood there.";
    return about.request ? "" : about.unbranched || "Race again to try another token or to draft.";
  }
  const ask = (question) => document.dispatchEvent(new CustomEvent("sd-ask", { detail: { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), ...question } }));

  // The row under the panes: the drafter's button, the races, the panel.
  const draft = button("sd-b-draft", "", () => open(0), "Be the drafter"), says = make("p", "sd-b-says");
  const list = make("div", "sd-b-list"), panel = make("section", "sd-person");
  list.setAttribute("role", "group");
  list.setAttribute("aria-label", "The original race and its branches");
  list.hidden = panel.hidden = true;
  const home = make("section", "sd-branches", make("div", "sd-b-bar", draft, says), list, panel);
  home.setAttribute("aria-label", "Branches, and a draft of your own");
  root.querySelector(".sd-timeline").before(home);
  const keys = [["t p", "given", "text that a branch keeps"], ["t p sd-forced", "forced", "chosen by you; the branch begins here"]];
  root.querySelector(".sd-legend ul").append(...keys.map(([mark, name, what]) => make("li", "sd-only-branched", make("span", mark, name), " " + what)));

  function paint() {
    const why = reason();
    draft.disabled = Boolean(why);
    const hint = why || "Type the next tokens yourself, or open a token and ask what if another stood there.";
    if (says.textContent !== hint) says.textContent = hint;
    list.hidden = entries.length < 2;
    const longest = Math.max(1, ...entries.map((e) => text(e.race, "speculative").length));
    const rows = entries.map((entry, i) => {
      const row = button("", "", () => show(i), drawn(entry, longest), make("span", "", entry.label), make("small", "", score(entry)));
      row.setAttribute("aria-pressed", String(i === at));
      row.disabled = root.dataset.phase === "running";
      return row;
    });
    const had = list.contains(document.activeElement) ? [...list.children].indexOf(document.activeElement) : -1;
    list.replaceChildren(...rows);
    if (had >= 0) list.children[had].focus({ preventScroll: true });
    if (!panel.hidden) ready();
  }

  // Where a branch leaves the text of the original, to scale.
  function drawn(entry, longest) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), width = 132;
    const line = (d, name) => {
      const path = document.createElementNS(svg.namespaceURI, "path");
      path.setAttribute("d", d);
      if (name) path.setAttribute("class", name);
      svg.append(path);
    };
    const x = (tokens) => 4 + (width - 8) * tokens / longest, total = text(entries[0].race, "speculative").length;
    const long = text(entry.race, "speculative").length;
    svg.setAttribute("viewBox", "0 0 132 24");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    line("M4 7H" + x(total), entry === entries[0] ? "sd-b-own" : "");
    if (entry === entries[0]) return svg;
    const fork = x(entry.kept), end = Math.max(x(long), fork + 14);
    line("M" + fork + " 7C" + (fork + 7) + " 7 " + (fork + 3) + " 18 " + (fork + 12) + " 18H" + end, "sd-b-own");
    const dot = document.createElementNS(svg.namespaceURI, "circle");
    for (const [name, value] of [["cx", fork], ["cy", 7], ["r", 3.5]]) dot.setAttribute(name, value);
    svg.append(dot);
    return svg;
  }
  const tokens = (n) => (n === 1 ? "1 token" : n + " tokens");
  function score(entry) {
    const said = tokens(text(entry.race, "speculative").length);
    if (!entry.person) return said;
    const { accepted, drafted } = tally(entry.race.rounds.speculative.filter((r) => r.drafter === "person"));
    return drafted ? accepted + " of " + drafted + " drafted by you accepted" : said;
  }

  // Keeps what stands in the panes as it is now.
  function keep() {
    if (!entries.length) entries = [{ label: "Original", kept: 0 }], at = 0;
    entries[at].race = view.race;
  }

  function show(i) {
    if (i === at || root.dataset.phase === "running") return;
    keep();
    at = i;
    const { race, state, figures, person } = entries[i], { pieces, head, whole, final } = race;
    const copy = Object.assign(new SpecDecode.Race(state.about, race.costs), { head, whole, final });
    Object.assign(copy.pieces, pieces);
    restoring = true;
    view.reset(copy);
    view.add([...race.rounds.baseline, ...race.rounds.speculative]);
    entries[i].race = copy;
    restoring = false;
    view.show(state);
    view.follow();
    for (const lane of view.lanes) reveal(lane);
    for (const detail of [null, figures]) document.dispatchEvent(new CustomEvent("sd-figures", { detail }));
    view.say((i ? "Branch: " : "") + entries[i].label + (person ? ", your draft" : ""));
    paint();
  }

  // Where a branch leaves its text, in sight within the pane.
  function reveal(lane) {
    const fork = lane.spans.find((span) => span.classList.contains("sd-fork"));
    if (!fork) return;
    lane.follow = false;
    lane.box.scrollTop += fork.getBoundingClientRect().top - lane.box.getBoundingClientRect().top - 48;
  }

  // Races on from a text: `kept` tokens of it, then what is forced, or drafted.
  function race(lane, kept, label, more, person = false) {
    keep();
    const ids = text(view.race, lane).slice(0, kept).map((t) => t.id);
    pending = { label, kept, person };
    view.inspector.close();
    ask({ request: entries[0].state.about.request, ...more, prefix: [...ids, ...(more.prefix || [])] });
  }

  listen("sd-figures", ({ detail }) => {
    if (detail && !restoring && !root.dataset.recording) last = detail;
    if (detail && entries[at]) entries[at].figures = detail;
  });
  let last = null;
  view.parts.push({
    reset: () => {
      if (restoring) return;
      const { about } = view.race;
      last = null;
      if (about && about.given && pending) {
        entries.push({ ...pending, race: view.race, state: { phase: "running", stats: {}, about } });
        at = entries.length - 1;
      } else {
        entries = [];
        at = 0;
        leave();
        panel.hidden = true;
      }
      pending = null;
    },
    added: (rounds) => {
      const kept = entries[at] && at ? entries[at].kept : Infinity;
      for (const { lane, index } of rounds) {
        if (index) continue;
        view.lane(lane).spans.filter((span) => span.about.token.role === "prompt").forEach((span, i) => {
          span.classList.toggle("sd-forced", i >= kept);
          span.classList.toggle("sd-fork", i === kept);
          if (i >= kept) span.title = "forced: the race goes on from here";
        });
      }
    },
    shown: (phase, state) => {
      if (state && entries.length && !root.dataset.recording) Object.assign(entries[at], { state, race: view.race });
      else if (state && phase !== "idle" && state.about) entries = [{ label: "Original", kept: 0, race: view.race, state, figures: last }], at = 0;
      root.toggleAttribute("data-branched", at > 0);
      const now = phase + (root.dataset.recording || "") + Boolean(state && state.about && "request" in state.about) + entries.length;
      if (now !== painted) paint();
      painted = now;
    },
    // What if another token stood at this position: what the inspector shows below it.
    detailed: (detail, round, column) => {
      const place = placeOf(view.race, round, column);
      if (place < 0) return;
      const here = text(view.race, round.lane)[place], why = reason();
      const part = make("section", "sd-i-if", make("h3", "", "what if another token stood here?"));
      detail.append(part);
      if (why) return part.append(make("p", "", why));
      const options = new Map();
      const offer = (id, said, p) => { if (id !== here.id && said && !options.has(id)) options.set(id, { said, p }); };
      for (const token of [column.draft, column.own ? column.target : null]) if (token) offer(token.id, token.text, token.p);
      for (const top of [here.target_top, column.draft && column.draft.target_top, column.draft && column.draft.drafter_top]) {
        for (const [id, p] of top || []) offer(id, view.race.piece(id), top === (column.draft && column.draft.drafter_top) ? null : p);
      }
      const label = (said) => "Token " + (place + 1) + ": " + quoted(said) + " for " + quoted(here.text);
      const picks = [...options].slice(0, 6).map(([id, { said, p }]) => {
        const pick = button("", "Race on with " + quoted(said), () => race(round.lane, place, label(said), { prefix: [id] }), said.replaceAll("\n", "↵"));
        if (p !== null && p !== undefined) pick.append(make("small", "", "p " + digits(p, 2)));
        return pick;
      });
      const typed = make("input", ""), go = make("button", "", "Race on");
      typed.type = "text";
      typed.maxLength = 400;
      typed.placeholder = "or type";
      typed.setAttribute("aria-label", "Text that stands here instead, exactly as it goes on, with its spaces");
      go.type = "submit";
      const form = make("form", "", typed, go);
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        if (typed.value) race(round.lane, place, label(typed.value), { prefix: [typed.value] });
      });
      for (const name of ["keydown", "keyup"]) form.addEventListener(name, (event) => { if (event.key.startsWith("Arrow")) event.stopPropagation(); });
      const from = button("", "", () => open(place, round.lane), "Draft from here");
      part.append(make("div", "sd-i-picks", ...picks), form, make("div", "", from));
    },
  });
  let painted = "";

  // A person's draft.
  let person = null; // {about, base, from, given, tokens, rounds, waiting, ended}
  const heading = make("h2", "", "Be the drafter"), told = make("p", "sd-p-says"), sofar = make("div", "sd-p-text");
  const field = make("textarea", ""), space = make("input", ""), go = make("button", "sd-p-go"), whole = button("", "", raceWhole, "Race with it as a whole text");
  const length = make("select", "", ...[2, 4, 8].map((n) => new Option(n + " tokens a round", n)));
  const outcome = make("div", "sd-p-round"), board = make("dl", "sd-p-score"), again = button("", "", () => open(person.from, person.lane, person.base), "Start over");
  heading.tabIndex = -1;
  heading.id = "sd-p-title";
  panel.setAttribute("aria-labelledby", heading.id);
  sofar.tabIndex = 0;
  sofar.setAttribute("role", "group");
  sofar.setAttribute("aria-label", "The text so far");
  field.rows = 2;
  field.maxLength = 4000;
  field.spellcheck = false;
  space.type = "checkbox";
  space.checked = true;
  go.type = "submit";
  length.value = "4";
  length.setAttribute("aria-label", "Draft length of the race");
  outcome.setAttribute("aria-live", "polite");
  const form = make("form", "", make("label", "", "What comes next?", field),
    make("div", "sd-p-options", go, make("label", "", space, "begin with a space"), whole, length, again));
  panel.append(make("header", "", heading, button("", "Close the drafter's panel", shut, "×")), told, sofar, form, outcome, board);

  function open(from, lane = "speculative", base = view.race) {
    if (base === view.race) keep();
    person = { about: base.about, base, from, lane, given: text(base, lane).slice(0, from), rounds: [], tokens: [], waiting: null, ended: null };
    const promise = base.about.same_text ? "It changes how much is accepted, never the text." : base.about.exact ? "The text still follows the target’s own distribution." : "This rule is lossy, so the text may differ.";
    told.textContent = "Type how the text goes on. One pass of the target checks all of your tokens at once, up to " + MOST + " a round, and keeps them up to the first that it would not have written. " + promise;
    view.inspector.close();
    panel.hidden = false;
    outcome.replaceChildren();
    field.value = "";
    paintText();
    paintScore();
    ready();
    panel.scrollIntoView({ block: "nearest" });
    field.focus({ preventScroll: true });
  }
  // Takes a question back that is not answered yet: its round ends, or never begins.
  function leave() {
    const asked = Boolean(person && person.waiting);
    if (asked) ask({ leave: true });
    if (asked) person.waiting = null;
    return asked;
  }
  function shut() {
    leave();
    panel.hidden = true;
    person = null;
    draft.focus({ preventScroll: true });
  }
  listen("keydown", (event) => {
    if (event.key !== "Escape" || panel.hidden || !panel.contains(event.target)) return;
    event.preventDefault();
    event.stopImmediatePropagation(); // what is open is closed before a race is stopped
    shut();
  });
  const soFar = () => [...person.given, ...person.tokens];
  function paintText() {
    const mark = (token) => "t " + (token.role === "target" ? "t0" : token.role[0]);
    sofar.replaceChildren(...person.given.map((t) => make("span", "t p", t.text)), ...person.tokens.map((t) => make("span", mark(t), t.text)));
    sofar.scrollTop = sofar.scrollHeight;
  }
  function ready() {
    if (!person) return;
    const busy = Boolean(person.waiting) || root.dataset.phase === "running", over = Boolean(person.ended);
    go.textContent = person.waiting ? "Cancel" : "Check my draft";
    go.disabled = !person.waiting && (busy || over);
    field.disabled = over;
    whole.disabled = length.disabled = busy || over;
    again.hidden = !person.rounds.length;
    again.disabled = busy;
  }
  // What was typed, as it goes on after the text: a new word begins with a space.
  function typed() {
    const before = soFar().map((t) => t.text).join("");
    return (space.checked && before && !/\s$/.test(before) && /^[\p{L}\p{N}"“(]/u.test(field.value) ? " " : "") + field.value;
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (leave()) return answered({ problem: "Cancelled. The text is as it was." });
    if (!field.value) return field.focus();
    const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
    person.waiting = id;
    outcome.replaceChildren(make("p", "sd-p-says", "The target reads the text and your draft. Where others are racing, it waits for the device."));
    ready();
    ask({ id, round: true, request: entries[0].state.about.request, prefix: soFar().map((t) => t.id), draft: typed() });
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
    event.preventDefault();
    if (!go.disabled && !person.waiting) form.requestSubmit();
  });
  function raceWhole() {
    if (!field.value) return field.focus();
    const before = soFar(), lane = person.lane, text = typed();
    const label = "Your draft from token " + (before.length + 1);
    keep();
    pending = { label, kept: before.length, person: true };
    ask({ request: entries[0].state.about.request, prefix: before.map((t) => t.id), draft: text, length: Number(length.value) });
  }

  listen("sd-answer", ({ detail }) => { if (person && detail.answer === person.waiting) answered(detail); });
  function answered({ problem, round: wire, ended }) {
    person.waiting = null;
    if (problem) {
      outcome.replaceChildren(make("p", "sd-p-wrong", problem));
    } else {
      const round = SpecDecode.unpack(wire);
      Object.assign(person.base.pieces, round.pieces);
      const start = soFar().length;
      person.rounds.push({ round, start });
      person.tokens.push(...round.tokens.filter(SpecDecode.emits));
      person.ended = ended;
      paintOutcome(round);
      paintText();
      paintScore();
      field.value = "";
    }
    ready();
    (person.ended ? again : field).focus({ preventScroll: true });
  }
  function number(value) {
    const node = make("data", "", digits(value, 2));
    node.value = String(value);
    return node;
  }
  const SIGN = { accepted: "✓", rejected: "✗", "not judged": "not judged", bonus: "+1", target: "" };
  function paintOutcome(round) {
    const columns = SpecDecode.columns(round), own = columns.find((c) => c.own), kept = columns.filter((c) => c.verdict === "accepted").length;
    const drafted = columns.filter((c) => c.draft).length;
    const cells = columns.map((c) => {
      const token = c.draft || c.target;
      const p = c.verdict === "not judged" || token.p === null ? "" : make("small", "", "p ", number(token.p));
      return make("li", "", make("span", "t " + (c.draft ? token.role[0] : c.verdict[0]), token.text ? token.text.replaceAll("\n", "↵") : "…"), make("small", "", SIGN[c.verdict]), p);
    });
    const lines = [make("p", "", make("b", "", kept + " of " + drafted + " accepted. "),
      ...(own && own.verdict === "rejected" ? ["The target’s own token is " + quoted(own.target.text) + " (p = ", number(own.target.p), "), in place of " + quoted(own.draft.text) + " (p = ", number(own.draft.p), ")."]
        : own ? ["The target adds " + quoted(own.target.text) + " (p = ", number(own.target.p), ") as a bonus."] : []))];
    const likely = own && own.target ? own.target.target_top : [];
    if (likely && likely.length) {
      lines.push(make("p", "sd-p-says", "Likeliest there: ", ...likely.flatMap(([id, p], i) => [i ? ", " : "", quoted(round.pieces[id] ?? person.base.piece(id) ?? ""), " ", number(p)]), "."));
    }
    if (person.ended) lines.push(make("p", "", make("b", "", person.ended === "stop" ? "The text has ended." : "The text has reached its limit of tokens.")));
    outcome.replaceChildren(make("ol", "", ...cells), ...lines);
  }

  // accepted and drafted tokens, and emitted ones, of some rounds
  function tally(rounds) {
    const all = rounds.flatMap((r) => r.tokens), count = (...roles) => all.filter((t) => roles.includes(t.role)).length;
    return { accepted: count("accepted"), drafted: count("accepted", "rejected"), emitted: all.filter(SpecDecode.emits).length, passes: rounds.length };
  }
  // place in the text → whether the token that was drafted for it was accepted, for those that were judged
  function judged(race, pairs) {
    const found = new Map();
    for (const { round, start } of pairs) {
      SpecDecode.columns(round).forEach((c, i) => { if (c.draft && (c.verdict === "accepted" || c.own)) found.set(start + i, c.verdict === "accepted"); });
    }
    return found;
  }
  function paintScore() {
    const yours = tally(person.rounds.map((r) => r.round)), share = (of, to) => (to ? " (" + Math.round(100 * of / to) + " %)" : "");
    const row = (name, value, small = "") => make("div", "", make("dt", "", name), make("dd", "", value, make("small", "", small)));
    if (!yours.passes) return board.replaceChildren();
    const rows = [row("you", yours.accepted + " of " + yours.drafted + " accepted", share(yours.accepted, yours.drafted)),
      row("your tokens per pass", digits(yours.emitted / yours.passes, 3), " in " + yours.passes + (yours.passes === 1 ? " round" : " rounds"))];
    const { base, about } = person, lane = base.rounds.speculative, drafter = lane.filter((r) => r.index > 0);
    if (about.same_text) {
      let start = prompts(base, "speculative").length;
      const pairs = lane.map((round) => {
        const pair = { round, start };
        start += round.tokens.filter(SpecDecode.emits).length;
        return pair;
      });
      const mine = judged(base, person.rounds), its = judged(base, pairs);
      const both = [...mine.keys()].filter((place) => its.has(place)), hits = (found) => both.filter((place) => found.get(place)).length;
      const name = [...new Set(drafter.map((r) => r.drafter).filter(Boolean))].join(" + ") || "the drafter";
      rows.push(row("where both were judged", both.length ? "you " + hits(mine) + ", " + name + " " + hits(its) : "no position yet", both.length ? " of " + both.length + (both.length === 1 ? " position" : " positions") : ""));
    }
    const its = tally(drafter);
    if (its.passes) rows.push(row("the drafter’s tokens per pass", digits(its.emitted / its.passes, 3), " in its race"));
    board.replaceChildren(...rows);
  }

  paint();
};
