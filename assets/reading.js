// Files that hold a race: a trace, a trace compressed by gzip, or a saved replay. They are read here, in the browser, and
// not sent anywhere.
// In: a file, and the tables of spec_decode/share/saved.py. Out: a recording for the player. What is not one is refused
// by `SpecDecode.Refused`, whose message is one sentence; nothing else is thrown, and nothing of a file is executed. What
// a trace may hold is said by spec_decode/trace_format.py and docs/trace.schema.json; tests hold both against this file.
SpecDecode.Refused = class extends Error {};
SpecDecode.FILE = 16e6; // bytes
SpecDecode.UNPACKED = 64e6;
SpecDecode.MOST = 60000; // tokens that a page shows, and rounds

{
  const refuse = (why) => { throw new SpecDecode.Refused(why); };
  const isObject = (x) => typeof x === "object" && x !== null && !Array.isArray(x);
  const number = (x) => typeof x === "number" && Number.isFinite(x);
  const positive = (x) => number(x) && x >= 0;
  const count = (x) => Number.isSafeInteger(x) && x >= 0;
  const probability = (x) => number(x) && x >= 0 && x <= 1;
  const text = (x) => typeof x === "string";
  const truth = (x) => typeof x === "boolean";
  const oneOf = (...values) => (x) => values.includes(x);
  const maybe = (fits) => (x) => x === null || fits(x);
  const all = (fits) => (x) => Array.isArray(x) && x.every(fits);
  const row = (...kinds) => (x) => Array.isArray(x) && x.length === kinds.length && kinds.every((fits, i) => fits(x[i]));
  const names = (x) => isObject(x) && Object.values(x).every(text);
  const within = (low, high) => (x) => number(x) && x >= low && x <= high;
  const whole = (low, high) => (x) => Number.isSafeInteger(x) && x >= low && x <= high;
  const NEEDED = Symbol("needed");
  // An object with these fields and no others: [what fits, what stands for a field that is missing].
  const object = (what, fields) => (x) => {
    if (!isObject(x)) return false;
    for (const name of Object.keys(x)) if (!Object.hasOwn(fields, name)) refuse("This is not a Spec Decode trace: a " + what + " has no field “" + name.slice(0, 40) + "”.");
    for (const [name, [fits, otherwise]] of Object.entries(fields)) {
      if (!Object.hasOwn(x, name)) {
        if (otherwise === NEEDED) refuse("This is not a Spec Decode trace: there is no “" + name + "” in a " + what + ".");
        if (otherwise !== undefined) x[name] = otherwise;
      } else if (!fits(x[name])) refuse("This is not a Spec Decode trace: the " + name + " of a " + what + " cannot be used.");
    }
    return true;
  };
  const tops = all(row(count, probability));
  const token = object("token", {
    id: [count, NEEDED], text: [text, NEEDED], role: [oneOf("prompt", "target", "accepted", "rejected", "correction", "bonus"), NEEDED],
    p: [maybe(probability), null], q: [maybe(probability), null], draft_position: [maybe(count), null],
    target_top: [tops, []], drafter_top: [tops, []], compared: [maybe(row(number, number)), null],
  });
  const round = object("round", {
    lane: [oneOf("baseline", "speculative"), NEEDED], index: [count, NEEDED], tokens: [all(token), NEEDED], draft_length: [count, NEEDED],
    draft_seconds: [positive, NEEDED], verify_seconds: [positive, NEEDED], seconds: [positive, NEEDED], clock: [positive, NEEDED],
    refused: [maybe(count), null], kl: [maybe(number), null], drafter: [text, ""], residual: [maybe(row(positive, tops)), null],
  });
  const costs = object("trace’s costs", {
    step_seconds: [positive, NEEDED], verify_ratio: [all(positive), NEEDED], draft_ratio: [positive, NEEDED], draft_start: [positive, 0],
    other_ratio: [positive, 0], doubt: [positive, 0.1], errors: [all(positive), []],
  });
  const promises = object("trace’s promises", {
    exact: [truth, true], same_text: [truth, true], rejected: [oneOf("probabilities", "tokens", "nothing"), "probabilities"],
  });
  const filled = (x) => text(x) && x.trim() !== "";
  const request = (usual) => object("request", {
    prompt: [filled, NEEDED], settings: [object("request’s settings", {
      draft_length: [(x) => whole(1, 16)(x) || ["adaptive", "rate"].includes(x), usual.draft_length], temperature: [within(0, 5), usual.temperature],
      top_p: [(x) => within(0, 1)(x) && x > 0, usual.top_p], top_k: [whole(0, 1e6), usual.top_k], rule: [maybe(text), null],
      lenience: [within(1e-6, 1), usual.lenience], max_new_tokens: [whole(1, 32768), usual.max_new_tokens],
      seed: [whole(0, 2 ** 53 - 1), usual.seed], synthetic_acceptance: [maybe(probability), null],
    }), NEEDED],
    system: [maybe(text), null], drafter: [maybe(text), null], truncate: [truth, false], thinking: [truth, false],
    prefix: [(x) => maybe(text)(x) || all((part) => text(part) || count(part))(x), null], draft: [all((x) => text(x) || count(x)), []], history: [all(row(text, text)), undefined],
  });
  const date = (x) => text(x) && /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/.test(x);
  const trace = (usual) => object("trace", {
    version: [(x) => x === 2, NEEDED], request: [request(usual), NEEDED], pair: [(x) => isObject(x) && text(x.target) && text(x.drafter), NEEDED],
    machine: [isObject, NEEDED], prompt_tokens: [count, NEEDED], rounds: [all(round), NEEDED], finish: [names, {}], costs: [maybe(costs), null],
    versions: [names, {}], date: [maybe(date), null], promises: [promises, { exact: true, same_text: true, rejected: "probabilities" }],
    pieces: [(x) => names(x) && Object.keys(x).every((key) => /^\d+$/.test(key)), {}], omitted: [all(text), []], notes: [all(text), []],
  });

  // The trace that this JSON holds, with every field that it may have.
  SpecDecode.checked = (source, tables) => {
    let data;
    try { data = JSON.parse(source); } catch { refuse("This is not a Spec Decode trace: it is not JSON."); }
    if (!isObject(data)) refuse("This is not a Spec Decode trace: it holds no object.");
    if (data.version === 1) refuse("This trace is of format version 1; python -m spec_decode replay FILE --html OUT makes a replay of it that can be opened here.");
    if (data.version !== 2) refuse("This is not a Spec Decode trace of a version that can be read here.");
    if (isObject(data.request)) for (const name of ["prompt", "settings"]) { // copies that the endpoint /race adds
      if (!Object.hasOwn(data, name)) continue;
      if (JSON.stringify(data[name]) !== JSON.stringify(data.request[name])) refuse("This is not a Spec Decode trace: its " + name + " is not that of its request.");
      delete data[name];
    }
    if (!trace(tables.settings)(data)) refuse("This is not a Spec Decode trace.");
    const { settings } = data.request, synthetic = settings.synthetic_acceptance !== null;
    if (synthetic && [null, "", "auto"].includes(settings.rule)) settings.rule = "synthetic";
    if ([null, "", "auto"].includes(settings.rule)) settings.rule = settings.temperature === 0 ? "greedy" : "coupled";
    const rule = Object.hasOwn(tables.rules, settings.rule) ? tables.rules[settings.rule] : null;
    if (!rule || rule.synthetic !== synthetic) refuse("This trace cannot be shown: its rule is not one that is known here.");
    if (settings.temperature > 0 && !rule.samples) refuse("This trace cannot be shown: its rule needs temperature 0.");
    if (!data.rounds.length) refuse("This trace cannot be shown: it holds no rounds.");
    if (data.rounds.reduce((sum, r) => sum + Math.max(1, r.tokens.length), 0) > SpecDecode.MOST) refuse("This trace is too long to be shown in a page: it has more than " + SpecDecode.MOST.toLocaleString("en") + " tokens.");
    return data;
  };

  // Bytes that were compressed by gzip, as text; no more than fits is unpacked.
  const inflated = async (bytes) => {
    if (!("DecompressionStream" in window)) refuse("This browser cannot read compressed files; open it in a newer one.");
    const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")).getReader(), parts = [];
    let size = 0;
    for (;;) {
      let part;
      try { part = await reader.read(); } catch { refuse("The file is damaged: it cannot be decompressed."); }
      if (part.done) break;
      size += part.value.length;
      if (size > SpecDecode.UNPACKED) {
        reader.cancel().catch(() => {});
        refuse("The file holds more than " + SpecDecode.UNPACKED / 1e6 + " MB after decompression, and no more are read.");
      }
      parts.push(part.value);
    }
    return decoded(await new Blob(parts).arrayBuffer());
  };
  const decoded = (bytes) => {
    try { return new TextDecoder("utf-8", { fatal: true }).decode(bytes); } catch { return refuse("The file is neither a trace nor a saved replay: it is not text."); }
  };

  // What a saved replay holds beside its trace: numbers and nothing else.
  const numbers = all(maybe(number)), pair = row(number, number);
  const series = (x, length) => Array.isArray(x) && x.length === length && x.every(numbers) && x.every((list) => list.length === x[0].length && list.length <= 400);
  const gap = (x) => isObject(x) && maybe(number)(x.logit_gap);
  const extras = {
    interval: maybe(pair), end_to_end: maybe(number), end_to_end_interval: maybe(pair), looping: truth,
    verdict: maybe(oneOf("faster", "slower", "no difference", "nothing drafted")),
    parting: maybe((x) => isObject(x) && gap(x.baseline) && gap(x.speculative)),
  };
  const model = (m) => m === null || (isObject(m) && ["lengths", "predicted", "low", "high"].every((name) => numbers(m[name]) && m[name].length <= 64)
    && ["low", "high"].every((name) => m[name].length === m.predicted.length) && m.predicted.length <= m.lengths.length
    && maybe(whole(1, m.predicted.length))(m.best) && maybe(number)(m.adaptive) && series(m.measured, 2));
  const figures = (x) => isObject(x) && isObject(x.rate) && SpecDecode.LANES.every((lane) => series(x.rate[lane], 2)) && series(x.acceptance, 3)
    && isObject(x.final) && series(x.final.passes, 2) && model(x.final.model);

  // A saved replay as its data block has it: {trace, stats, figures}.
  SpecDecode.unfolded = async (source, tables) => {
    let saved;
    try { saved = JSON.parse(source); } catch { refuse("The replay in this page is damaged."); }
    if (!isObject(saved) || saved.spec_decode_replay !== 1) refuse("The replay in this page is not of a version that can be read here.");
    if (!text(saved.trace) || !isObject(saved.stats) || !figures(saved.figures)) refuse("The replay in this page is damaged.");
    const stats = {};
    for (const [name, fits] of Object.entries(extras)) {
      if (!Object.hasOwn(saved.stats, name) || !fits(saved.stats[name])) refuse("The replay in this page is damaged.");
      stats[name] = saved.stats[name];
    }
    let bytes;
    try { bytes = Uint8Array.from(atob(saved.trace), (c) => c.charCodeAt(0)); } catch { refuse("The replay in this page is damaged."); }
    return SpecDecode.recording(SpecDecode.checked(await inflated(bytes), tables), tables, stats, saved.figures);
  };

  SpecDecode.recording = (data, tables, stats = null, drawn = null) => ({
    name: "opened", title: "opened file", data, recorded: SpecDecode.recorded(data),
    about: { ...SpecDecode.about(data, tables), recorded: SpecDecode.recorded(data) },
    stats: SpecDecode.stats(data, stats || {}), figures: drawn || SpecDecode.series(data),
  });

  // The recording in a file.
  SpecDecode.read = async (file, tables) => {
    try {
      if (file.size > SpecDecode.FILE) refuse("The file has " + (file.size / 1e6).toFixed(0) + " MB, and at most " + SpecDecode.FILE / 1e6 + " MB are read.");
      let bytes;
      try { bytes = new Uint8Array(await file.arrayBuffer()); } catch { refuse("The file cannot be read."); }
      const source = bytes[0] === 0x1f && bytes[1] === 0x8b ? await inflated(bytes) : decoded(bytes);
      if (!source.trimStart().startsWith("<")) return SpecDecode.recording(SpecDecode.checked(source, tables), tables);
      const open = '<script type="application/json" id="sd-replay">', start = source.indexOf(open), end = source.indexOf("</" + "script>", start);
      if (start < 0 || end < 0) refuse("This page holds no replay of Spec Decode.");
      return await SpecDecode.unfolded(source.slice(start + open.length, end), tables);
    } catch (error) {
      throw error instanceof SpecDecode.Refused ? error : new SpecDecode.Refused("The file cannot be read (" + String(error && error.name).slice(0, 40) + ").");
    }
  };

  // Files that are dropped anywhere on the page, or chosen. `told` gets a sentence where one is refused.
  SpecDecode.drop = (tables, opened, told) => {
    const take = async (files) => {
      if (!files.length) return;
      if (files.length > 1) return told("One file at a time, please.");
      try {
        const recording = await SpecDecode.read(files[0], tables);
        told("");
        opened(recording);
      } catch (error) { told(error.message); }
    };
    const holds = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
    const mark = (on) => document.body.classList.toggle("sd-dropping", on);
    const listen = (name, act) => document.addEventListener(name, (event) => { if (holds(event)) act(event); }, true);
    listen("dragover", (event) => { event.preventDefault(); mark(true); });
    listen("dragleave", (event) => { if (!event.relatedTarget) mark(false); });
    listen("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      mark(false);
      take([...event.dataTransfer.files]);
    });
    return take;
  };
}
