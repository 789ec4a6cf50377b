// The tour: four captions on the race in view, each anchored to one of its rounds, and what to try next.
// In: a view, its player, and the next steps [{id, title, says, focus}] that the page offers (spec_decode/ui/tour.py).
// Out: `view.tour` with `start()` and `close()`. Buttons `.sd-tour-open` of the page open it. It is offered until
// it was taken or refused, or a race was run, which the browser remembers.
// Every text enters the page as a text node.

// The round that each caption shows, as {round, drafted, accepted, own}; null where the race has none to show.
SpecDecode.tourStops = (race) => {
  const rounds = race.rounds.speculative.filter((round) => round.index > 0).map((round) => {
    const drafted = round.tokens.filter((t) => t.role === "accepted" || t.role === "rejected");
    return { round, drafted, accepted: drafted.filter((t) => t.role === "accepted").length,
      own: round.tokens.find((t) => ["correction", "bonus", "target"].includes(t.role)) || null };
  });
  const drafting = rounds.filter((at) => at.drafted.length), whole = drafting.filter((at) => at.accepted === at.drafted.length);
  const most = (list) => list.reduce((best, at) => (best && best.accepted >= at.accepted ? best : at), null);
  const guess = drafting.find((at) => at.drafted.length > 1) || drafting[0] || rounds[0] || null;
  const pass = whole.find((at) => at.accepted > 2) || most(whole) || most(drafting) || guess;
  return { guess, pass, mistake: drafting.find((at) => at.accepted < at.drafted.length) || null, cost: pass };
};

// A pass over so many tokens in passes over one, from the measured costs; a width that was not measured is left out.
SpecDecode.tourBars = (costs) => [1, 2, 4, 8].filter((width) => costs?.verify_ratio?.[width - 1] > 0)
  .map((width) => ({ width, ratio: costs.verify_ratio[width - 1] }));

SpecDecode.tour = (view, player, steps) => {
  const { root } = view, { make, button, digits, ms, quoted } = SpecDecode, listen = SpecDecode.listener(root);
  const sheet = matchMedia("(max-width: 800px)");
  const count = (n, one) => (n === 1 ? "one " + one : n + " " + one + "s");
  const term = (name) => button("sd-term", "", null, name);
  const heading = make("h2", "sd-tour-title"), place = make("p", "sd-tour-place"), body = make("div", "sd-tour-body");
  const back = button("sd-tour-back", "", () => go(at - 1), "Back"), next = button("sd-tour-next", "", () => go(at + 1), "Next");
  const foot = make("div", "sd-tour-foot", place, back, next);
  const panel = make("section", "sd-tour", make("header", "", heading, button("sd-tip-close", "Close the tour", () => close(), "×")), body, foot);
  heading.id = "sd-tour-title";
  heading.tabIndex = -1;
  for (const part of [heading, body]) part.setAttribute("aria-live", "polite");
  panel.setAttribute("role", "dialog");
  panel.setAttribute("aria-labelledby", heading.id);
  panel.hidden = true;
  let at = -1, shown = null, follow = null, opener = null;

  const chip = (token, judged = true) => make("span", "t " + (judged ? (token.role === "target" ? "t0" : token.role[0]) : "t0"),
    token.text ? token.text.replaceAll("\n", "↵") : "…");
  const chips = (tokens, judged) => make("p", "sd-tour-tokens", ...tokens.map((token) => chip(token, judged)));
  const says = (...parts) => make("p", "", ...parts);
  const where = (stop) => (stop ? "Round " + stop.round.index + ". " : "");

  const captions = [
    { title: "A guess", of: ({ guess }) => guess, tell(stop) {
      if (!stop || !stop.drafted.length) return [says("Nothing was drafted in this race: every step of the speculative lane is a ", term("plain step"), ", one pass of the ", term("target"), " for one token. With a ", term("draft length"), " above 0 a ", term("drafter"), " guesses ahead.")];
      const n = stop.drafted.length, plain = view.race.step, { drafter, draft_seconds: seconds } = stop.round;
      return [says(where(stop) + "The ", term("drafter"), ...(drafter ? [" (", ...view.explained(drafter), ")"] : []), " guesses the next " + (n === 1 ? "token" : n + " tokens") + ", without asking the ", term("target"), ":"),
        chips(stop.drafted, false),
        says("Nothing of it is text yet." + (plain && seconds < plain.seconds ? " Guessing is cheap: it took " + ms(seconds) + ", where a " : ""), ...(plain && seconds < plain.seconds ? [term("plain step"), " of the target takes " + ms(plain.seconds) + "."] : []))];
    } },
    { title: "One pass checks all", of: ({ pass }) => pass, tell(stop) {
      if (!stop || !stop.drafted.length) return [says("One ", term("target pass"), " gives one token where nothing is drafted. Over a ", term("draft"), " it would give the target’s word on every guess at once.")];
      const n = stop.drafted.length, kept = stop.accepted, emitted = stop.round.tokens.filter(SpecDecode.emits).length;
      const verdict = kept === n ? (n === 1 ? "It is" : "All " + n + " are") + " accepted" : kept ? kept + " of " + n + " are accepted" : "None is accepted here";
      return [says(where(stop) + "One ", term("target pass"), " over " + (n === 1 ? "the guess" : "all " + n + " guesses") + " computes the target’s distribution at every position, which verifies " + (n === 1 ? "it" : "all of them at once") + ":"),
        chips(stop.round.tokens),
        says(verdict + ". ", ...(stop.own ? ["The same pass also gives a token of the target’s own, the ", term(stop.own.role === "bonus" ? "bonus" : "correction"), ": " + count(emitted, "token") + " from one pass."] : [count(emitted, "token") + " from one pass."]))];
    } },
    { title: "The first mistake, corrected", of: ({ mistake, pass }) => mistake || pass, tell(stop, { mistake }) {
      if (!mistake) return [says(none(stop) + " A guess that the ", term("target"), " does not accept is dropped, and the target’s own token from the same pass stands in its place: the ", term("correction"), ". ", promise())];
      const i = mistake.accepted, wrong = mistake.drafted[i], after = mistake.drafted.length - i - 1;
      return [says(where(mistake) + "The guess " + quoted(wrong.text) + " is not accepted" + (after ? ", and the " + (after === 1 ? "one" : after) + " after it " + (after === 1 ? "falls" : "fall") + " with it" : "") + "."),
        chips(mistake.round.tokens),
        says(...(mistake.own ? ["In its place stands the target’s own token, " + quoted(mistake.own.text) + ", from the same pass: the ", term("correction"), ". "] : []), promise())];
    } },
    { title: "Why it is cheap", of: ({ cost }) => cost, tell(stop) {
      const bars = SpecDecode.tourBars(view.race.costs), wide = bars[bars.length - 1], plain = view.race.step;
      const out = [];
      if (bars.length > 1) {
        out.push(says("A ", term("target pass"), " reads the weights once, for however many tokens. " + (wide.ratio < wide.width ? "Over " + wide.width + " tokens it takes " + digits(wide.ratio, 3) + " times as long as over one, not " + wide.width + " times." : "Here that saves nothing: over " + wide.width + " tokens it takes " + digits(wide.ratio, 3) + " times as long as over one.")),
          chart(bars), make("p", "sd-tour-note", "Time of one pass, in passes over one token; pale: as many single passes. " + measured()));
      } else out.push(says("A ", term("target pass"), " reads the weights once, for however many tokens, so a pass over a few tokens takes little longer than a pass over one. " + (document.body.dataset.sdPhase === "running" ? "The measured times come when the race is over." : "How much was not measured for this race.")));
      if (stop && plain && stop.drafted.length) {
        const { seconds } = stop.round, emitted = stop.round.tokens.filter(SpecDecode.emits).length;
        out.push(says("Round " + stop.round.index + " gave " + count(emitted, "token") + " in " + ms(seconds) + ", the time of " + digits(seconds / plain.seconds, 2) + " ", term("plain steps"), "."));
      }
      return out;
    } },
  ];

  function none(stop) {
    if (!stop || !stop.drafted.length) return "Nothing was drafted in this race, so there was nothing to correct.";
    return view.race.about?.rejected === "nothing" ? "This engine does not tell which guesses it rejected." : "No guess was rejected in this race.";
  }
  function promise() {
    const { about } = view.race;
    if (about?.same_text && view.race.differ) return "Yet the texts of this race differ, which they should not.";
    if (!about || (about.exact && about.same_text)) return "So the text is the one that the target alone writes.";
    if (about.synthetic) return "In this race the verdicts were drawn, to measure time, so the text means nothing.";
    return about.exact ? "So the text follows the target’s own distribution." : "The rule of this race is lossy: it also accepts guesses that the target would refuse.";
  }
  const recorded = () => view.race.about?.recorded || "";
  const measured = () => (recorded() ? "Measured on the machine of the recording." : "Measured on this machine.");

  function chart(bars) {
    const most = bars[bars.length - 1].width, list = make("ul", "sd-tour-bars");
    for (const { width, ratio } of bars) {
      const one = make("i", "sd-tour-one"), many = make("i", "sd-tour-many");
      one.style.width = 100 * ratio / Math.max(most, bars[bars.length - 1].ratio) + "%";
      many.style.width = 100 * width / Math.max(most, bars[bars.length - 1].ratio) + "%";
      const value = make("data", "", digits(ratio, 3) + "×");
      value.value = String(ratio);
      list.append(make("li", "", make("span", "", width + (width === 1 ? " token" : " tokens")), make("span", "sd-tour-bar", many, one), value));
    }
    return list;
  }

  // What the page offers afterwards. A server without a model, or one that plays a recording, has no form to fill.
  function ending() {
    const bare = document.querySelector('#sd-status :is([data-state="absent"], [data-recording])');
    if (bare || !steps.length) return [says("Press any token to open its round: what was proposed, what the target said, and the numbers that the rule compared.")];
    return [says("Press any token to open its round. Or try one of these: each fills the form, and you press Run."),
      make("div", "sd-tour-chips", ...steps.map((step) => button("sd-tour-chip", "", () => choose(step), step.title)))];
  }
  function choose(step) {
    const filled = make("p", "", make("strong", "", step.title + ". "), step.says);
    heading.focus({ preventScroll: true });
    body.replaceChildren(filled);
    document.getElementById(step.id)?.click();
    const go = (tries) => {
      const aim = document.getElementById(step.focus), to = aim && (aim.matches("button") ? aim : aim.querySelector("button"));
      if (to && !to.disabled && to.getClientRects().length) {
        to.focus({ preventScroll: true });
        to.scrollIntoView({ block: "center", behavior: "instant" });
      } else if (tries && !panel.hidden) setTimeout(go, 100, tries - 1);
    };
    setTimeout(go, 150, 30);
  }

  function go(to) {
    if (to < 0) return;
    at = to;
    unmark();
    const stops = SpecDecode.tourStops(view.race), caption = captions[at];
    const had = panel.contains(document.activeElement);
    back.hidden = at === 0 || !caption;
    next.hidden = !caption;
    next.textContent = at + 1 === captions.length ? "Finish" : "Next";
    heading.textContent = caption ? caption.title : "Try next";
    place.textContent = caption ? at + 1 + " of " + captions.length + " · " + (recorded() ? "a race " + recorded() : "on your race") : "";
    const stop = caption ? caption.of(stops) : null;
    body.replaceChildren(...(caption ? caption.tell(stop, stops) : ending()));
    if (had && (!panel.contains(document.activeElement) || document.activeElement.hidden)) heading.focus({ preventScroll: true });
    mark(stop);
    put();
  }

  // The round of a caption, outlined and in sight within its pane.
  function mark(stop) {
    const span = stop && view.spanOf("speculative", stop.round.index);
    if (!span) return;
    const lane = view.lane("speculative");
    follow = follow === null ? lane.follow : follow;
    lane.follow = false; // the round must not scroll away
    shown = span.about.mates;
    for (const mate of shown) mate.classList.add("toured");
    const first = visible()[0];
    if (first) lane.box.scrollTop += first.getBoundingClientRect().top - lane.box.getBoundingClientRect().top - lane.box.clientHeight / 4;
  }
  function unmark() {
    for (const mate of shown || []) mate.classList.remove("toured");
    shown = null;
  }
  const visible = () => (shown || []).filter((mate) => mate.getClientRects().length);

  // Beside the round, below it where there is room; on a phone at the lower edge, the round in sight above.
  function put() {
    const all = visible(), corner = !all.length;
    panel.dataset.place = sheet.matches ? "sheet" : corner ? "corner" : "round";
    panel.style.left = panel.style.top = "";
    if (corner) return;
    const top = all[0].getBoundingClientRect().top, bottom = all[all.length - 1].getBoundingClientRect().bottom;
    const height = panel.offsetHeight, free = innerHeight - (sheet.matches ? height : height + 24);
    const under = bottom + 12 > free, over = top < 12;
    if (under || over) scrollBy({ top: under ? Math.min(bottom + 12 - free, top - 12) : top - 80, behavior: "instant" });
    if (sheet.matches) return;
    follows();
  }
  function follows() {
    const all = visible(), pane = view.lane("speculative").box.getBoundingClientRect();
    if (!all.length || panel.dataset.place !== "round") return;
    const rects = all.map((mate) => mate.getBoundingClientRect());
    const home = panel.offsetParent?.getBoundingClientRect() || { left: -scrollX, top: -scrollY };
    const left = Math.max(8, Math.min(rects[0].left - 20, document.documentElement.clientWidth - panel.offsetWidth - 12));
    const bottom = Math.min(Math.max(...rects.map((r) => r.bottom)), pane.bottom);
    panel.style.left = left - home.left + "px";
    panel.style.top = Math.max(bottom, pane.top) + 10 - home.top + "px";
  }
  view.lane("speculative").box.addEventListener("scroll", () => { if (!panel.hidden) follows(); }, { passive: true });
  addEventListener("resize", () => { if (!panel.hidden) follows(); });
  sheet.addEventListener("change", () => { if (!panel.hidden) put(); });

  async function start(from = null) {
    opener = from;
    remember();
    if (!root.getClientRects().length) { // the other tab is open
      document.querySelector('#sd-tabs [role="tab"]')?.click();
      for (let tries = 0; tries < 40 && !root.getClientRects().length; tries += 1) await new Promise(requestAnimationFrame);
    }
    view.inspector.close();
    view.card.dismiss();
    if (root.dataset.recording && root.dataset.recording !== "ended") await player.play(player.name, true);
    else if (!view.race.rounds.speculative.length && root.dataset.phase === "idle" && player.names.length) await player.play(player.names[0], true);
    (root.closest(".gradio-container") || document.body).append(panel);
    panel.hidden = false;
    go(0);
    heading.focus({ preventScroll: true });
  }

  function close() {
    if (panel.hidden) return false;
    const had = panel.contains(document.activeElement), button = opener && opener.isConnected ? opener : openers()[0];
    unmark();
    if (follow !== null) view.lane("speculative").follow = follow;
    follow = null;
    at = -1;
    if (had && button) button.focus({ preventScroll: true });
    panel.hidden = true;
    panel.remove();
    return true;
  }

  // The offer: the page's button says more until the tour was taken or refused, or a race was run.
  const openers = () => [...document.querySelectorAll(".sd-tour-open")];
  // Kept by the browser alone: `gr.BrowserState` would do the same, and brings 24 kB of cryptography with it.
  const KEY = "spec-decode-tour";
  let seen = false;
  try { seen = Boolean(localStorage.getItem(KEY)); } catch (error) { /* no storage: it is offered again */ }
  const toured = () => seen;
  function offer() {
    for (const open of openers()) {
      open.textContent = toured() ? "Tour" : "60-second tour";
      if (!toured()) open.prepend(make("span", "sd-tour-new", "New here? "));
      const refuse = open.nextElementSibling;
      if (refuse) refuse.hidden = toured();
    }
  }
  function remember() {
    if (toured()) return;
    seen = true;
    try { localStorage.setItem(KEY, "yes"); } catch (error) { /* as above */ }
    offer();
  }
  const begin = (tries) => { if (openers().length) offer(); else if (tries) setTimeout(begin, 50, tries - 1); }; // the header may come later
  begin(100);

  listen("click", (event) => {
    const open = event.target.closest?.(".sd-tour-open");
    if (open) start(open);
    if (!event.target.closest?.(".sd-tour-refuse")) return;
    openers()[0]?.focus({ preventScroll: true });
    remember();
  });
  listen("keydown", (event) => {
    if (panel.hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      event.preventDefault();
      event.stopImmediatePropagation(); // what is open is closed before a race is stopped
      if (!view.card.dismiss()) close();
    }
    if (!panel.contains(event.target) || at >= captions.length) return;
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key] || (event.key === "Enter" && event.target === heading ? 1 : 0);
    if (!by) return;
    event.preventDefault();
    go(at + by);
  });
  view.parts.push({
    reset: () => { if (at >= 0 && at < captions.length) close(); },
    inspected: (round) => { if (round) close(); },
    shown: (phase) => { if (phase === "running") remember(); },
  });
  view.tour = { start, close, panel };
};
