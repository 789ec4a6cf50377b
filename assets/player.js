// Recordings, played in the browser: every round comes when the clock of its lane has come so far. The server is asked
// for no more than the file of a recording that did not come with the page, when it is picked.
// In: a view, and recordings [{name, title, trace, about, recorded, stats, figures}] (spec_decode/session/recordings.py),
// where `trace` may be empty and `address` is that of the file.
// Out: `play(name)`, `leave()` and `begin()`, which plays the first by itself, and stands still where motion is unwanted.
// `open(recording, still)` plays one more, whose trace is read already (`data`), in place of the one opened before.
SpecDecode.player = (view, shipped) => {
  const { root } = view, make = SpecDecode.make;
  const bar = root.querySelector(".sd-player");
  const SPEEDS = [[0.25, "¼ speed"], [0.5, "½ speed"], [1, "full speed"]];
  const recordings = [...shipped];
  let playing = null, speed = SPEEDS[0][0], frame = 0;
  const player = { play, leave, begin, open, get active() { return playing !== null; },
    get recording() { return playing && playing.recording; }, get name() { return playing && playing.recording.name; },
    names: shipped.map((recording) => recording.name) };
  bar.hidden = !recordings.length;

  const chipOf = (recording) => SpecDecode.button("sd-pick", "Play the recording: " + recording.title,
    () => play(recording.name, SpecDecode.still()), recording.title);
  const chips = recordings.map(chipOf);
  const pause = SpecDecode.button("sd-pause", "", toggle, "Pause");
  const pace = make("select", "sd-pace", ...SPEEDS.map(([factor, title]) => new Option(title, factor)));
  pace.setAttribute("aria-label", "Speed of the recording");
  pace.addEventListener("change", () => { speed = Number(pace.value); });
  const title = make("span", "sd-player-title", "Recordings");
  const about = root.querySelector(".sd-played"), prompt = root.querySelector(".sd-player-prompt"), facts = root.querySelector(".sd-player-facts");
  bar.append(title, ...chips, pause, pace);
  paint();

  function paint() {
    const on = playing && playing.recording;
    title.textContent = on ? "Recording" : "Recordings";
    chips.forEach((chip, i) => chip.setAttribute("aria-pressed", String(on === recordings[i])));
    bar.dataset.state = playing ? playing.state : "none";
    pause.hidden = pace.hidden = about.hidden = !playing;
    if (!playing) return;
    pause.textContent = { playing: "Pause", paused: "Resume", ended: "Again" }[playing.state];
    const { ran } = on.about;
    const said = [on.recorded[0].toUpperCase() + on.recorded.slice(1), ...ran.settings].join(" · ");
    if (prompt.textContent !== ran.prompt) prompt.textContent = ran.prompt;
    if (facts.textContent !== said) facts.replaceChildren(...view.explained(said));
  }

  // The rounds of a trace in the order in which their lanes' clocks reach them.
  async function load(recording) {
    recording.data = recording.data || await SpecDecode.unzipped(recording.trace || await fetched(recording.address));
    recording.order = recording.order || [...recording.data.rounds].sort((a, b) => a.clock - b.clock);
    return recording;
  }

  async function fetched(address) {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(answer.statusText);
    return answer.arrayBuffer();
  }

  async function play(name, still = false) {
    cancelAnimationFrame(frame);
    const recording = recordings.find((r) => r.name === name);
    const mine = playing = { recording, state: "playing", clock: 0, next: 0, shown: 0 };
    const problem = await load(recording).then(() => "", () => "This recording could not be loaded.");
    if (playing !== mine) return; // another was picked meanwhile, or a race began
    if (problem) {
      leave();
      title.textContent = problem;
      return view.say(problem);
    }
    view.say("");
    const race = new SpecDecode.Race(recording.about, recording.data.costs);
    Object.assign(race.pieces, recording.data.pieces);
    race.whole = recording.data;
    race.final = { stats: recording.stats, figures: recording.figures };
    const { request, pair, machine, versions, date } = recording.data;
    race.head = { request, pair, machine, versions, date };
    race.span = recording.order[recording.order.length - 1].clock;
    view.reset(race);
    document.dispatchEvent(new CustomEvent("sd-figures", { detail: null }));
    if (still) finish();
    else resume();
  }

  function resume() {
    playing.state = "playing";
    playing.last = performance.now();
    score();
    paint();
    frame = requestAnimationFrame(tick);
  }

  function toggle() {
    if (playing.state === "ended") play(playing.recording.name);
    else if (playing.state === "paused") resume();
    else halt();
  }

  function halt() {
    playing.state = "paused";
    cancelAnimationFrame(frame);
    score();
    paint();
  }

  function tick(now) {
    if (!playing || playing.state !== "playing") return;
    if (!root.isConnected) return leave();
    const { order } = playing.recording;
    playing.clock += speed * Math.min(0.1, (now - playing.last) / 1000); // a page that was hidden goes on where it was
    playing.last = now;
    let end = playing.next;
    while (end < order.length && order[end].clock <= playing.clock) end += 1;
    view.add(order.slice(playing.next, end));
    playing.next = end;
    if (end === order.length) return finish();
    if (now - playing.shown > 90) {
      score();
      playing.shown = now;
    }
    view.follow();
    frame = requestAnimationFrame(tick);
  }

  function finish() {
    const { recording } = playing;
    view.add(recording.order.slice(playing.next));
    playing.next = recording.order.length;
    playing.state = "ended";
    score();
    paint();
    view.follow();
    document.dispatchEvent(new CustomEvent("sd-figures", { detail: { ...recording.figures, recording: true } }));
  }

  function score() {
    const { recording, state } = playing;
    view.show({ phase: "idle", stats: state === "ended" ? recording.stats : view.race.stats(), about: recording.about, recording: state });
  }

  function open(recording, still) {
    const before = recordings.findIndex((r) => r.name === recording.name);
    if (before >= 0) {
      recordings.splice(before, 1);
      chips.splice(before, 1)[0].remove();
    }
    recordings.push(recording);
    chips.push(chipOf(recording));
    pause.before(chips[chips.length - 1]);
    bar.hidden = false;
    return play(recording.name, still);
  }

  // The view is another's from now on.
  function leave() {
    cancelAnimationFrame(frame);
    playing = null;
    paint();
  }

  view.parts.push({ shown: (phase) => { for (const chip of chips) chip.disabled = phase === "running"; } });

  function begin() {
    if (!recordings.length) return;
    if ("DecompressionStream" in window) play(recordings[0].name, SpecDecode.still());
    else bar.hidden = true;
  }
  return player;
};
