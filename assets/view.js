// Two lanes of tokens and the score board, grown by appending.
// In: the element of assets/token_view.html, and the sentences of terms by term. Out: a view with `reset(race)`,
// `add(rounds)`, `show(state)` and `follow()`. Knows neither Gradio nor a server, so that any page can show a race.
// Every text enters the page as a text node.
SpecDecode.SAYS = {
  target: "the target’s own token, nothing was drafted here",
  accepted: "drafted, and accepted: the target agreed",
  rejected: "drafted, and rejected: no part of the text",
  correction: "the target’s own token in place of a rejected one",
  bonus: "the target’s extra token after every drafted token was accepted",
  prompt: "given: the output is made to begin with it",
};
SpecDecode.FINISH = { stop: "end of text", length: "token limit", cancelled: "stopped", time: "time limit", running: "broke off" };
SpecDecode.SYNTHETIC = "at a synthetic acceptance: times are measured, and the drafter is not judged";
SpecDecode.VERDICT = {
  faster: "faster than the baseline, same model, same prompt",
  slower: "slower than the baseline, same model, same prompt",
  "no difference": "no measurable difference: the interval holds 1×",
  "nothing drafted": "nothing was drafted: both lanes took plain steps",
};

SpecDecode.make = (tag, name, ...children) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
};
SpecDecode.button = (name, label, act, ...children) => {
  const node = SpecDecode.make("button", name, ...children);
  node.type = "button";
  if (label) node.setAttribute("aria-label", label);
  if (act) node.addEventListener("click", act);
  return node;
};
SpecDecode.still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
// Listeners on the document that leave with an element.
SpecDecode.listener = (root) => (name, act) => {
  const guarded = (event) => (root.isConnected ? act(event) : document.removeEventListener(name, guarded, true));
  document.addEventListener(name, guarded, true);
};

// Makes the ids in an element its own where the page has them already, for several views on one page; and a function that
// makes further ids likewise.
SpecDecode.unique = (root) => {
  const named = [...root.querySelectorAll("[id]")];
  if (!SpecDecode.guest) return (id) => id; // the only view of its page
  const id = (name) => name + "-" + tag, tag = Math.random().toString(36).slice(2, 8);
  for (const node of named) node.id = id(node.id);
  for (const name of ["aria-labelledby", "aria-describedby"]) {
    for (const node of root.querySelectorAll("[" + name + "]")) node.setAttribute(name, id(node.getAttribute(name)));
  }
  return id;
};

SpecDecode.view = (root, terms) => {
  const find = (selector) => root.querySelector(selector);
  const make = SpecDecode.make;
  const fields = {};
  for (const node of root.querySelectorAll("[data-k]")) fields[node.dataset.k] = node;
  const lanes = SpecDecode.LANES.map((name) => ({
    name,
    box: find(".sd-" + name + " .sd-text"),
    bar: find(".sd-" + name + " .sd-bar i"),
    empty: find(".sd-" + name + " .sd-empty"),
    spans: [], line: null, follow: true, cursor: -1,
  }));
  const view = { root, lanes, terms, race: new SpecDecode.Race(), spoken: find(".sd-sr"), parts: [] };
  root.view = view; // for whoever has the element
  view.explains = (node) => root.contains(node); // whether a term that is pressed is this view's to explain
  view.id = SpecDecode.unique(root);
  const tell = (name, ...values) => { for (const part of view.parts) if (part[name]) part[name](...values); };
  view.lane = (name) => lanes[SpecDecode.LANES.indexOf(name)];
  view.say = (text) => { view.spoken.textContent = text; };

  // An empty view of this race; without one, the panes say what they are for.
  view.reset = (race = null) => {
    view.race = race || new SpecDecode.Race();
    for (const lane of lanes) {
      lane.box.replaceChildren();
      if (!race) lane.box.append(lane.empty);
      Object.assign(lane, { spans: [], line: null, follow: true, cursor: -1 });
      lane.bar.style.transform = "scaleX(0)";
      lane.box.removeAttribute("aria-activedescendant");
    }
    tell("reset");
  };

  view.add = (rounds) => {
    if (!rounds.length) return;
    for (const lane of lanes) lane.fresh = document.createDocumentFragment();
    for (const round of rounds) {
      view.race.add(round);
      append(round);
    }
    for (const lane of lanes) if (lane.fresh.childNodes.length) lane.box.append(lane.fresh);
    tell("added", rounds);
  };

  function append(round) {
    const lane = view.lane(round.lane), mates = [];
    const drafted = round.tokens.filter((t) => t.draft_position !== null).length;
    for (const token of round.tokens) {
      const { text, role } = token;
      if (!lane.line) {
        lane.line = make("div", "sd-line");
        lane.fresh.append(lane.line);
      }
      const thrown = role === "rejected";
      const mark = role === "target" ? "t0" : role[0];
      const span = make("span", "t " + mark + (text.includes("\n") ? " nl" : "") + (text ? "" : " part"), thrown ? text.replaceAll("\n", "↵") : text);
      span.about = { lane, round, token, drafted, mates };
      mates.push(span);
      lane.spans.push(span);
      lane.line.append(span);
      if (!thrown && text.endsWith("\n")) lane.line = null;
    }
  }

  view.follow = () => { for (const lane of lanes) if (lane.follow) lane.box.scrollTop = lane.box.scrollHeight; };
  // The first span of a round that is on the page.
  view.spanOf = (lane, index) => view.lane(lane).spans.find((span) => span.about.round.index === index);

  const write = (key, text) => { if (fields[key].textContent !== text) fields[key].textContent = text; };
  const number = (x, digits, unit) => (x === null || x === undefined ? "–" : x.toFixed(digits) + (unit || ""));
  const range = (ends) => (ends ? ends[0].toFixed(2) + "–" + ends[1].toFixed(2) + "×" : "");
  // How near a tie the token was at which lanes part that should not.
  const near = (parting) => {
    const gaps = parting ? ["baseline", "speculative"].map((lane) => parting[lane].logit_gap) : [];
    return gaps.length && gaps.every((gap) => gap !== null) ? " (logit gap " + gaps.map((gap) => gap.toPrecision(2)).join(" and ") + ")" : "";
  };
  const percent = (x) => (x === null || x === undefined ? "–" : (100 * x).toFixed(x < 0.0995 ? 1 : 0) + " %");

  // The score board. `phase` is that of a race of this page; a recording is "playing", "paused" or "ended", and the
  // phase stays "idle": it says nothing of the device, and is not read out.
  view.show = ({ phase, stats, about, reading, notes, recording = "" }) => {
    const was = root.dataset.phase, over = phase === "done" || phase === "failed" || recording === "ended";
    const idle = phase === "idle" && !recording;
    view.shown = { phase, stats, about, recording }; // for what keeps or shares a result
    root.dataset.phase = phase;
    if (recording) root.dataset.recording = recording;
    else delete root.dataset.recording;
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
      write(lane.name + ".finish", s.finish ? SpecDecode.FINISH[s.finish] || s.finish
        : reading && !s.tokens ? "reading the prompt, " + reading.map((n) => n.toLocaleString("en")).join(" of ") + " tokens"
        : phase === "running" && notes && notes[lane.name] ? notes[lane.name] : "");
      lane.bar.style.transform = "scaleX(" + Math.min(1, (s.tokens || 0) / about.limit) + ")";
    }
    write("wall", stats.wall === undefined || !over ? "" : ", " + stats.wall.toFixed(1) + " s,");
    const badge = fields.identical;
    const state = idle || about.synthetic || (stats.identical && !stats.same) ? "none" // nothing to compare yet
      : !stats.identical ? (about.same_text ? "differ" : "free") : "same";
    if (badge.dataset.state !== state) badge.dataset.state = state;
    write("identical", state === "none" ? "–"
      : state === "same" ? (over ? "✓ identical" : "✓ identical so far")
      : "≠ differ from token " + (stats.same + 1) + near(stats.parting));
    write("why", idle ? "" : about.why);
    const verdict = (over && stats.verdict) || "";
    if (root.dataset.verdict !== verdict) root.dataset.verdict = verdict;
    write("verdict", (about.synthetic ? SpecDecode.SYNTHETIC : SpecDecode.VERDICT[verdict]) || "speculative ÷ baseline, tokens per second");
    write("interval", stats.interval ? range(stats.interval) + " (95 %)" : "");
    write("end_to_end", number(stats.end_to_end, 2, "×"));
    write("end_to_end_interval", range(stats.end_to_end_interval));
    write("loops", stats.looping
      ? "The text loops: it repeats itself. That is easy to draft, so this speedup flatters the drafter."
      : "");
    caption(recording ? null : about.ran);
    tell("shown", phase, { phase, stats, about });
    if (was === phase) return;
    if (recording) return view.say("");
    if (phase === "running") view.say("The race has started.");
    if (over) view.say("The race is over. Speedup " + fields.speedup.textContent
      + (stats.interval ? ", 95 percent interval " + range(stats.interval).replace("–", " to ") : "")
      + (about.synthetic ? ", " + SpecDecode.SYNTHETIC : verdict ? ", " + SpecDecode.VERDICT[verdict] : "") + ". " + fields.loops.textContent + " Texts " + fields.identical.textContent + ".");
    if (phase === "idle") view.say("");
  };

  // What was run, whatever the form holds by now.
  let captioned = "";
  function caption(ran) {
    const text = ran ? JSON.stringify(ran) : "";
    if (text === captioned) return;
    captioned = text;
    find(".sd-ran").hidden = !ran;
    if (!ran) return;
    find(".sd-ran-prompt").textContent = ran.prompt;
    find(".sd-ran-settings").replaceChildren(...ran.settings.flatMap((said, i) => [i ? " · " : "", ...(said.startsWith("system prompt: ") ? [said] : view.explained(said))]));
  }

  // Text with each term that the page explains made a button; the sentences are those of spec_decode/ui/terms.py.
  const TERM = new RegExp("(?<![\\w-])(" + Object.keys(terms).join("|") + ")(?![\\w-])");
  view.explained = (text) => text.split(TERM).map((part, i) => (i % 2 ? SpecDecode.button("sd-term", "", null, part) : part));

  find(".sd-toggle input").addEventListener("change", (event) => {
    root.classList.toggle("hide-rejected", !event.target.checked);
  });
  return view;
};
