// The round inspector: what the drafter proposed and the target said, position by position, with the numbers of the trace.
// In: a view with its card. Out: `view.inspect(lane, index, token)` opens a round, `view.inspector.close()` closes it. On a
// wide page it stands beside the panes, else it is a sheet. Every text enters the page as a text node.
SpecDecode.inspector = (view) => {
  const { root } = view, { make, button, digits, ms } = SpecDecode;
  const stage = root.querySelector(".sd-stage"), home = root.querySelector(".sd-inspector");
  const page = matchMedia("(min-width: 1181px)"), wide = { get matches() { return page.matches && !root.matches(".sd-tight"); } };
  let shown = null; // {lane, at, round, columns, place}
  const data = (value, count) => {
    const node = make("data", "", digits(value, count));
    node.value = String(value);
    node.title = String(value);
    return node;
  };
  const chip = (token, more = "") => make("span", "t " + (token.role === "target" ? "t0" : token.role[0]) + more, token.text ? token.text.replaceAll("\n", "↵") : "…");
  const title = (round) => (round.index === 0 ? "Prefill" : round.lane === "baseline" ? "Pass " + round.index : "Round " + round.index);

  view.inspect = (lane, index, token = null, focus = true) => {
    const rounds = view.race.rounds[lane], at = rounds.findIndex((r) => r.index === index);
    if (at < 0) return;
    const round = rounds[at], columns = SpecDecode.columns(round);
    const wanted = columns.findIndex((c) => c.draft === token || (c.own && c.target === token));
    const place = Math.max(0, token && wanted >= 0 ? wanted : columns.findIndex((c) => c.verdict === "rejected"));
    const before = shown;
    if (!before) shown = { from: view.lane(lane), follow: view.lane(lane).follow };
    stop();
    Object.assign(shown, { lane, at, round, columns, place });
    view.lane(lane).follow = false; // the round must not scroll away
    home.hidden = false;
    stage.dataset.open = "";
    render(before);
    reveal();
    if (focus && !home.contains(document.activeElement)) home.querySelector("h2").focus({ preventScroll: true });
    for (const part of view.parts) if (part.inspected) part.inspected(round);
  };

  function close() {
    if (!shown) return;
    const { from, follow, lane } = shown, had = home.contains(document.activeElement) || document.activeElement === document.body;
    stop();
    shown = null;
    for (const span of root.querySelectorAll(".sd-text .mate, .sd-text .cur")) span.classList.remove("mate", "cur");
    view.card.undock();
    home.hidden = true;
    home.replaceChildren();
    delete stage.dataset.open;
    from.follow = follow;
    if (had) view.lane(lane).box.focus({ preventScroll: true });
    for (const part of view.parts) if (part.inspected) part.inspected(null);
  }

  function step(by) {
    const round = view.race.rounds[shown.lane][shown.at + by];
    if (round) view.inspect(shown.lane, round.index);
  }

  const heading = make("h2", "sd-i-title");
  heading.tabIndex = -1;
  heading.id = view.id("sd-i-title");
  const body = make("div", "sd-i-body");
  const back = button("", "Previous round", () => step(-1), "◀"), on = button("", "Next round", () => step(1), "▶");
  const slow = button("sd-i-slow", "", () => (running ? stop() : replay()), "Replay slowly");

  function render(open) {
    const { lane, at, round } = shown, rounds = view.race.rounds[lane];
    heading.textContent = title(round);
    back.disabled = at === 0;
    on.disabled = at + 1 >= rounds.length;
    slow.hidden = round.index === 0 || lane === "baseline";
    if (!open) {
      const shut = button("sd-tip-close", "Close", close, "×");
      home.replaceChildren(make("header", "sd-i-head", heading, back, on, slow, shut), body);
    }
    const parts = [make("p", "sd-i-says", ...summary(round))];
    if (lane === "speculative" && round.index > 0) parts.push(table());
    const detail = make("div", "sd-i-detail");
    body.replaceChildren(...parts, detail, strip(round));
    for (const span of root.querySelectorAll(".sd-text .mate, .sd-text .cur")) span.classList.remove("mate", "cur");
    fill(detail);
    for (const span of spans()) span.classList.add("mate");
  }

  function summary(round) {
    const drafted = shown.columns.filter((c) => c.draft).length, emitted = round.tokens.filter(SpecDecode.emits).length;
    const out = (emitted === 1 ? "1 token" : emitted + " tokens") + " in " + ms(round.seconds);
    if (round.lane === "baseline" || round.index === 0) return [(round.lane === "baseline" ? "Baseline: " : "Speculative: ") + out + "."];
    if (!drafted) return ["Nothing drafted, a plain step: " + out + "."];
    const kept = round.tokens.filter((t) => t.role === "accepted").length;
    const asked = round.draft_length > drafted ? " (γ up to " + round.draft_length + ")" : "";
    return view.explained(drafted + " drafted" + (round.drafter ? " by " + round.drafter : "") + asked + ", " + kept + " accepted: " + out + ".");
  }

  const VERDICT = { accepted: "✓", rejected: "✗", "not judged": "–", bonus: "+1", target: "" };
  function table() {
    const { columns, place } = shown;
    const heads = columns.map((c, i) => {
      const pick = button("", "Position " + c.place + ", " + c.verdict, () => choose(i), String(c.place));
      pick.setAttribute("aria-pressed", String(i === place));
      return make("th", "", pick);
    });
    const row = (name, cells) => {
      const head = make("th", "", name);
      head.scope = "row";
      return make("tr", "", head, ...cells);
    };
    const cell = (node, at) => {
      const made = make("td", "", node);
      made.dataset.at = at;
      return made;
    };
    const count = columns.length;
    const drafted = columns.map((c, i) => cell(c.draft ? chip(c.draft) : "", i));
    const said = columns.map((c) => cell(c.target ? chip(c.target, c.own ? "" : " same") : "–", count));
    const marks = columns.map((c, i) => {
      const made = cell(VERDICT[c.verdict], count + 1 + i);
      made.title = c.verdict;
      made.dataset.verdict = c.verdict;
      return made;
    });
    const caption = make("caption", "sd-sr", "The round, position by position");
    const head = make("tr", "", make("td", "", ""), ...heads);
    const grid = make("table", "sd-i-grid", caption, make("thead", "", head),
      make("tbody", "", row("the drafter proposed", drafted), row("the target said", said), row("verdict", marks)));
    return make("div", "sd-i-scroll", grid);
  }

  function choose(i) {
    stop();
    shown.place = i;
    body.querySelectorAll("thead button").forEach((pick, at) => pick.setAttribute("aria-pressed", String(at === i)));
    fill(body.querySelector(".sd-i-detail"));
  }

  // Everything of one position.
  function fill(detail) {
    const { round, columns, place } = shown, column = columns[place];
    if (!column) return detail.replaceChildren(make("div", "sd-i-rule", make("p", "", "Prefill: the target reads the prompt and the given text. A draft comes first, so no token follows from it.")));
    const dock = make("div", "sd-i-dock");
    const token = column.draft || column.target;
    const rule = make("div", "sd-i-rule", ...SpecDecode.explain(view.race, round, column).filter((s) => s.length)
      .map((parts) => make("p", "", ...parts.map((part) => (typeof part === "string" ? part : data(part.value))))));
    const target = (column.draft || column.target).target_top || [], drafter = (column.draft && column.draft.drafter_top) || [];
    const marks = [column.draft && [column.draft.id, "drafted"], column.own && column.target && [column.target.id, "own"]].filter(Boolean);
    const named = [column.draft, column.own ? column.target : null].filter(Boolean);
    const lists = [bars("target p", target, marks, named.map((t) => [t.id, t.p, t.text]))];
    if (column.draft) lists.push(bars("drafter q", drafter, marks, [[column.draft.id, column.draft.q, column.draft.text]],
      view.race.about.undrawn.includes(round.drafter) ? "proposed outright, no distribution" : "not recorded"));
    const rest = column.own && column.verdict === "rejected" && round.residual && round.residual[0] > 0 && round.residual[1].length
      ? [bars("residual, drawn from after the rejection", round.residual[1], marks, [])] : [];
    const key = make("p", "sd-i-key", ...marks.map(([, word]) => make("span", "", MARK[word] + " " + NAME[word])));
    detail.replaceChildren(dock, rule, make("div", "sd-i-bars", ...lists), ...rest, key);
    const span = spans().find((s) => s.about.token === token);
    if (span) view.card.dock(dock, span);
    for (const part of view.parts) if (part.detailed) part.detailed(detail, round, column);
  }

  const MARK = { drafted: "◆", own: "●" }, NAME = { drafted: "drafted", own: "the target’s own" };
  // Probabilities as bars; tokens of interest that are not among the likeliest stand below them.
  function bars(name, top, marks, named, empty = "not recorded") {
    const rows = top.map(([id, p]) => [id, p, view.race.piece(id) ?? named.find(([known]) => known === id)?.[2]]);
    for (const [id, p, text] of named) if (p !== null && !rows.some(([known]) => known === id)) rows.push([id, p, text]);
    const list = make("ul", "", ...rows.map(([id, p, text]) => {
      const said = marks.filter(([marked]) => marked === id).map(([, word]) => word);
      const fill = make("i", "");
      fill.style.transform = "scaleX(" + p + ")";
      const item = make("li", said.length ? "marked" : "", fill, make("span", "sd-i-token", text === undefined ? "token " + id : text ? text.replaceAll("\n", "↵") : "…"),
        make("small", "", said.map((word) => MARK[word]).join("")), make("span", "sd-sr", said.map((word) => NAME[word]).join(", ")), data(p));
      return item;
    }));
    return make("section", "sd-i-list", make("h3", "", ...view.explained(name)), rows.length ? list : make("p", "sd-i-none", empty));
  }

  // Milliseconds of the round against plain steps for as many tokens.
  function strip(round) {
    const other = Math.max(0, round.seconds - round.draft_seconds - round.verify_seconds);
    const plain = view.race.step, count = round.tokens.filter(SpecDecode.emits).length;
    const steps = round.index > 0 && plain ? count : 0;
    const scale = Math.max(round.seconds, steps ? steps * plain.seconds : 0) || 1;
    const piece = (kind, seconds) => {
      const node = make("i", "sd-s-" + kind);
      node.style.width = 100 * seconds / scale + "%";
      return node;
    };
    const key = (kind, seconds) => {
      const value = make("data", "", ms(seconds));
      value.value = String(seconds);
      return make("li", "sd-s-" + kind, make("i", "sd-s-" + kind), kind + " ", value);
    };
    const parts = [["draft", round.draft_seconds], ["verify", round.verify_seconds], ["other", other]];
    const rows = [make("div", "sd-s-row", make("span", "", round.index ? "this round" : "prefill"), make("div", "sd-s-bar", ...parts.map(([kind, s]) => piece(kind, s))))];
    if (steps) rows.push(make("div", "sd-s-row", make("span", "", steps === 1 ? "a plain step" : steps + " plain steps"),
      make("div", "sd-s-bar", ...Array.from({ length: steps }, () => piece("plain", plain.seconds)))));
    const says = steps ? make("p", "sd-i-says", "A plain step takes ", data(1000 * plain.seconds, 3), " ms (median of ", String(plain.count), "); this round ",
      data(1000 * round.seconds / count, 3), " ms a token.") : "";
    return make("section", "sd-i-strip", make("h3", "", "time"), ...rows, make("ul", "", ...parts.map(([kind, s]) => key(kind, s))), says);
  }

  function spans() {
    const span = view.spanOf(shown.lane, shown.round.index);
    return span ? span.about.mates : [];
  }

  // The round in sight: within its pane, and above a sheet.
  function reveal() {
    const all = spans(), { box } = view.lane(shown.lane);
    if (!all.length) return;
    const pane = box.getBoundingClientRect(), first = all[0].getBoundingClientRect(), last = all[all.length - 1].getBoundingClientRect();
    if (first.top < pane.top + 8) box.scrollTop -= pane.top + 8 - first.top;
    else if (last.bottom > pane.bottom - 8) box.scrollTop += last.bottom - pane.bottom + 8;
    if (wide.matches) return;
    const below = pane.bottom - home.getBoundingClientRect().top + 8;
    if (below > 0) window.scrollBy(0, Math.min(below, pane.top - 8));
  }

  // The round once more, slowly: the guesses one by one, the pass at once, then the verdicts.
  let running = 0;
  const PAUSE = 550;
  function replay() {
    const grid = body.querySelector(".sd-i-grid"), mine = (running = setTimeout(() => {}, 0));
    const count = shown.columns.length;
    grid.dataset.replaying = "";
    slow.textContent = "Stop";
    const cells = [...grid.querySelectorAll("[data-at]")];
    for (const cell of cells) cell.classList.remove("on");
    const times = [...new Set(cells.filter((c) => c.textContent).map((c) => Number(c.dataset.at)))].sort((a, b) => a - b);
    const next = (i) => {
      if (running !== mine || !grid.isConnected) return;
      if (i === times.length) return stop();
      for (const cell of cells) if (Number(cell.dataset.at) === times[i]) cell.classList.add("on");
      if (times[i] > count) {
        const place = times[i] - count - 1;
        shown.place = place;
        body.querySelectorAll("thead button").forEach((pick, at) => pick.setAttribute("aria-pressed", String(at === place)));
        fill(body.querySelector(".sd-i-detail"));
      }
      setTimeout(next, times[i] >= count ? 2.4 * PAUSE : PAUSE, i + 1);
    };
    next(0);
  }
  function stop() {
    running = 0;
    slow.textContent = "Replay slowly";
    const grid = body.querySelector(".sd-i-grid");
    if (grid) delete grid.dataset.replaying;
  }

  home.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    step(by);
  });
  view.inspector = { close, get open() { return shown !== null; }, get round() { return shown && shown.round; }, home, wide };
  view.parts.push({
    reset: close,
    added: () => { if (shown) on.disabled = shown.at + 1 >= view.race.rounds[shown.lane].length; },
  });
};
