// The timeline: the rounds of both lanes to scale on one axis of lane time, drafts, passes and the rest told apart by
// colour and by height. It zooms, and a press on a round opens it in the inspector.
// In: a view with its inspector. Out: nothing; it draws what the view's race holds. One canvas, redrawn whole: some
// thousand rectangles take a few milliseconds.
SpecDecode.timeline = (view) => {
  const { root } = view, { make, button, ms } = SpecDecode;
  const home = root.querySelector(".sd-timeline"), canvas = make("canvas", ""), pen = canvas.getContext("2d");
  const says = make("p", "sd-t-says"), box = make("div", "sd-t-box", canvas);
  const HINT = "Press a round to open it. Zoom: Ctrl and wheel, pinch, + and −; 0 shows the whole.";
  const ROW = 30, GAP = 8, TOP = 4, AXIS = 20, LABEL = 84, LEAST = 0.004; // pixels, and seconds
  const key = (kind, text) => make("li", "", make("i", "sd-s-" + kind), text);
  const zooms = [["−", "Zoom out", () => zoom(0.5)], ["+", "Zoom in", () => zoom(2)], ["whole", "Show the whole race", whole]];
  home.append(
    make("header", "", make("h2", "", "Timeline"), make("ul", "", key("draft", "draft"), key("verify", "verify"), key("other", "other"),
      key("plain", "plain step"), key("prefill", "prefill")), make("div", "sd-t-zoom", ...zooms.map(([text, label, act]) => button("", label, act, text)))),
    box, says);
  box.tabIndex = 0;
  box.setAttribute("role", "slider");
  box.setAttribute("aria-label", "Timeline of rounds. Left and right go through the rounds of a lane, up and down change the lane, Enter opens the round, plus and minus zoom.");
  canvas.setAttribute("aria-hidden", "true");

  let range = null; // [from, to] in seconds of lane time, null for the whole
  let cursor = { lane: 1, at: 0 }, pointed = null, due = 0, drawn = 0, colours = null;
  const rounds = (lane) => view.race.rounds[SpecDecode.LANES[lane]];
  const begin = (lane, at) => (at > 0 ? rounds(lane)[at - 1].clock : 0);
  const end = () => Math.max(view.race.span || 0, view.race.counts.baseline.clock, view.race.counts.speculative.clock, 0.01);
  const bounds = () => range || [0, end()];
  const width = () => Math.max(1, canvas.clientWidth - LABEL);
  const left = (seconds) => { const [a, b] = bounds(); return LABEL + (seconds - a) / (b - a) * width(); };
  const seconds = (x) => { const [a, b] = bounds(); return a + (x - LABEL) / width() * (b - a); };
  const top = (lane) => TOP + lane * (ROW + GAP);

  function look() {
    const probe = make("i", ""), found = {};
    probe.style.forcedColorAdjust = "none";
    root.append(probe);
    for (const name of ["ink", "muted", "line", "line-strong", "accent", "base", "bonus", "surface", "on-accent"]) {
      probe.style.color = "var(--sd-" + name + ")";
      found[name] = getComputedStyle(probe).color;
    }
    found.font = getComputedStyle(root).fontFamily;
    probe.remove();
    return found;
  }

  function draw() {
    due = 0;
    drawn = performance.now();
    if (!root.isConnected || !canvas.clientWidth) return;
    colours = colours || look();
    const ratio = window.devicePixelRatio || 1, wide = canvas.clientWidth, high = 2 * ROW + GAP + TOP + AXIS;
    if (canvas.width !== Math.round(wide * ratio)) canvas.width = Math.round(wide * ratio);
    if (canvas.height !== Math.round(high * ratio)) canvas.height = Math.round(high * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, wide, high);
    axis(wide);
    pen.save();
    pen.beginPath();
    pen.rect(LABEL, 0, wide - LABEL, high);
    pen.clip();
    for (const lane of [0, 1]) bars(lane);
    pen.restore();
    pen.font = "12px " + colours.font;
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    ["Baseline", "Speculative"].forEach((name, lane) => {
      pen.fillStyle = colours[lane ? "accent" : "ink"];
      pen.fillText(name, 0, top(lane) + ROW / 2);
    });
  }

  function bars(lane) {
    const all = rounds(lane), [a, b] = bounds(), y = top(lane), scale = width() / (b - a);
    const first = Math.max(0, search(lane, a)), open = view.inspector.round;
    pen.textAlign = "center";
    pen.font = "11px " + colours.font;
    pen.textBaseline = "middle";
    for (let i = first; i < all.length; i += 1) {
      const r = all[i], from = begin(lane, i);
      if (from > b) break;
      const x = left(from), w = (r.clock - from) * scale, gap = w > 4 ? 1 : w > 2 ? 0.5 : 0;
      const part = (colour, height, start, length) => {
        pen.fillStyle = colour;
        pen.fillRect(start, y + ROW - height, Math.max(length, 0), height);
      };
      if (r.index === 0) {
        part(colours["line-strong"], ROW, x, w - gap);
        if (w > 50) label("prefill", x + w / 2, y, colours.ink);
      } else {
        const plain = !r.tokens.some((t) => t.draft_position !== null);
        const draft = lane * r.draft_seconds * scale, verify = Math.min(r.verify_seconds * scale, w - draft);
        part(colours["line-strong"], 0.3 * ROW, x + draft + verify, w - draft - verify - gap);
        part(colours.bonus, 0.65 * ROW, x, draft);
        part(colours[plain ? "base" : "accent"], ROW, x + draft, verify - (draft + verify > w - gap ? gap : 0));
        if (verify > 18) label(String(r.tokens.filter(SpecDecode.emits).length), x + draft + verify / 2, y, colours[plain ? "surface" : "on-accent"]);
      }
      const marked = open === r || (pointed && pointed.round === r) || (box.matches(":focus-visible") && cursor.lane === lane && cursor.at === i);
      if (marked) {
        pen.strokeStyle = colours.ink;
        pen.lineWidth = open === r ? 2.5 : 1.5;
        pen.strokeRect(x - 1, y - 2, Math.max(w - gap, 1.5) + 2, ROW + 4);
      }
    }
  }
  function label(text, x, y, colour) {
    pen.fillStyle = colour;
    pen.fillText(text, x, y + ROW / 2 + 0.5);
  }

  function axis(wide) {
    const [a, b] = bounds(), y = top(1) + ROW + 4, raw = (b - a) / Math.max(2, width() / 90);
    const power = 10 ** Math.floor(Math.log10(raw)), tick = power * [1, 2, 5, 10].find((n) => n * power >= raw);
    pen.strokeStyle = colours.line;
    pen.fillStyle = colours.muted;
    pen.font = "11px " + colours.font;
    pen.textAlign = "center";
    pen.textBaseline = "top";
    pen.lineWidth = 1;
    for (let n = Math.ceil(a / tick); n * tick <= b; n += 1) {
      const x = left(n * tick), text = tick < 0.02 ? Math.round(1e6 * n * tick) / 1000 + " ms" : Number((n * tick).toPrecision(6)) + " s";
      pen.beginPath();
      pen.moveTo(x, TOP);
      pen.lineTo(x, y);
      pen.stroke();
      if (x < wide - 14) pen.fillText(text, x, y + 2);
    }
  }

  // The first round of a lane that ends after this time.
  function search(lane, time) {
    const all = rounds(lane);
    let low = 0, high = all.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (all[middle].clock > time) high = middle;
      else low = middle + 1;
    }
    return low;
  }
  function at(event) {
    const area = canvas.getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
    const lane = y < TOP + ROW + GAP / 2 ? 0 : 1;
    if (x < LABEL || y > top(1) + ROW + 4) return null;
    const found = search(lane, seconds(x)), round = rounds(lane)[found];
    return round ? { lane, at: found, round } : null;
  }
  function described({ lane, round }) {
    const count = round.tokens.filter(SpecDecode.emits).length, rest = Math.max(0, round.seconds - round.draft_seconds - round.verify_seconds);
    const name = round.index === 0 ? "prefill" : (lane ? "round " : "pass ") + round.index;
    return ["Baseline, ", "Speculative, "][lane] + name + ": " + count + (count === 1 ? " token" : " tokens") + " in " + ms(round.seconds)
      + (lane && round.index ? " (draft " + ms(round.draft_seconds) + ", verify " + ms(round.verify_seconds) + ", other " + ms(rest) + ")" : "");
  }
  function tell(text) {
    if (says.textContent !== text) says.textContent = text;
  }

  // Drawn with the next frame, or a little later while tokens stream in.
  function schedule(soon = true) {
    if (due) return;
    due = setTimeout(() => requestAnimationFrame(draw), soon === true ? 0 : Math.max(0, drawn + 150 - performance.now()));
  }
  function whole() {
    range = null;
    schedule();
  }
  function show(a, b) {
    const last = end(), span = Math.min(Math.max(b - a, LEAST), last);
    const from = Math.min(Math.max(0, a), last - span);
    range = span >= last ? null : [from, from + span];
    schedule();
  }
  function zoom(factor, centre = null) {
    const [a, b] = bounds(), round = rounds(cursor.lane)[cursor.at];
    const seen = round && round.clock >= a && round.clock <= b ? round.clock : (a + b) / 2;
    const middle = centre === null ? seen : centre;
    show(middle - (middle - a) / factor, middle + (b - middle) / factor);
  }
  function go(lane, index) {
    const all = rounds(lane);
    if (!all.length) return;
    cursor = { lane, at: Math.min(Math.max(0, index), all.length - 1) };
    const round = all[cursor.at], [a, b] = bounds();
    if (range && (round.clock > b || begin(lane, cursor.at) < a)) show(round.clock - (b - a) / 2, round.clock + (b - a) / 2);
    box.setAttribute("aria-valuemax", String(all.length - 1));
    box.setAttribute("aria-valuenow", String(cursor.at));
    box.setAttribute("aria-valuetext", described({ lane, round }));
    tell(described({ lane, round }));
    schedule();
  }

  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const round = rounds(cursor.lane)[cursor.at];
    const acts = {
      ArrowLeft: () => go(cursor.lane, cursor.at - 1), ArrowRight: () => go(cursor.lane, cursor.at + 1),
      ArrowUp: () => go(0, search(0, begin(cursor.lane, cursor.at))), ArrowDown: () => go(1, search(1, begin(cursor.lane, cursor.at))),
      Home: () => go(cursor.lane, 0), End: () => go(cursor.lane, Infinity),
      Enter: () => round && view.inspect(round.lane, round.index),
      "+": () => zoom(2), "=": () => zoom(2), "-": () => zoom(0.5), 0: whole,
    };
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  });
  box.addEventListener("wheel", (event) => {
    if (event.ctrlKey || event.metaKey || (box === document.activeElement && Math.abs(event.deltaY) > Math.abs(event.deltaX))) {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 300), seconds(event.clientX - canvas.getBoundingClientRect().left));
    } else if (range && Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      const by = event.deltaX / width() * (range[1] - range[0]);
      show(range[0] + by, range[1] + by);
    }
  }, { passive: false });

  // One pointer presses or drags, two pinch.
  const held = new Map();
  let moved = 0;
  box.addEventListener("pointerdown", (event) => {
    held.set(event.pointerId, event.clientX);
    if (held.size === 1) moved = 0;
  });
  box.addEventListener("pointermove", (event) => {
    if (!held.has(event.pointerId)) {
      pointed = at(event);
      tell(pointed ? described(pointed) : HINT);
      return schedule();
    }
    const before = [...held.values()], [a, b] = bounds();
    const by = event.clientX - held.get(event.pointerId);
    held.set(event.pointerId, event.clientX);
    moved += Math.abs(by);
    if (held.size === 2) {
      const now = [...held.values()], apart = (xs) => Math.max(8, Math.abs(xs[0] - xs[1]));
      zoom(apart(now) / apart(before), seconds((now[0] + now[1]) / 2 - canvas.getBoundingClientRect().left));
    } else if (range && moved > 6) show(a - by / width() * (b - a), b - by / width() * (b - a));
  });
  const release = (event) => {
    const was = held.delete(event.pointerId), found = at(event);
    if (event.type !== "pointerup" || !was || moved > 6 || event.button || !found) return;
    go(found.lane, found.at);
    view.inspect(found.round.lane, found.round.index);
  };
  for (const name of ["pointerup", "pointercancel"]) box.addEventListener(name, release);
  box.addEventListener("pointerleave", (event) => {
    held.delete(event.pointerId);
    pointed = null;
    tell(HINT);
    schedule();
  });
  box.addEventListener("focus", () => go(cursor.lane, cursor.at));
  box.addEventListener("blur", () => { tell(HINT); schedule(); });

  function reset() {
    range = null;
    cursor = { lane: 1, at: 0 };
    pointed = null;
    for (const [name, value] of [["valuemin", "0"], ["valuemax", "0"], ["valuenow", "0"], ["valuetext", "no rounds yet"]]) box.setAttribute("aria-" + name, value);
    tell(HINT);
    schedule();
  }
  const recolour = () => { colours = null; schedule(); };
  new ResizeObserver(schedule).observe(box);
  new MutationObserver(recolour).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  matchMedia("(forced-colors: active)").addEventListener("change", recolour);
  view.parts.push({
    reset,
    added: () => schedule(false),
    inspected: (round) => {
      if (!round) return schedule();
      const lane = SpecDecode.LANES.indexOf(round.lane), [a, b] = bounds(), at = rounds(lane).indexOf(round);
      cursor = { lane, at };
      if (range && (round.clock > b || begin(lane, at) < a)) show(round.clock - (b - a) / 2, round.clock + (b - a) / 2);
      schedule();
    },
  });
  view.timeline = { bounds, show, whole };
  reset();
};
