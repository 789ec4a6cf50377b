// The share image: a card with the headline of a race, its interval, pair and machine, as SVG or PNG.
// In: the last score board and the trace. Out: the words that spec_decode/share/image.py puts into the same template.
SpecDecode.image = (stats, trace, tables) => {
  const { settings } = trace.request, synthetic = settings.synthetic_acceptance !== null, rule = tables.rules[settings.rule];
  const cut = (text, length) => {
    const all = Array.from(text);
    return all.length <= length ? text : all.slice(0, length - 1).join("").trimEnd() + "…";
  };
  const VERDICTS = {
    faster: "faster than the same model without a drafter", slower: "slower than the same model without a drafter",
    "no difference": "no measurable difference: the interval holds 1×", "nothing drafted": "nothing was drafted: both lanes took plain steps",
  };
  const deciding = synthetic ? rule : settings.temperature === 0 && rule.exact ? tables.rules.greedy : rule;
  const rates = Object.fromEntries(SpecDecode.LANES.map((lane) => [lane, stats[lane].rate || 0])), most = Math.max(...Object.values(rates)) || 1;
  const facts = [];
  if (stats.acceptance !== null) facts.push("acceptance rate " + (100 * stats.acceptance).toFixed(0) + " %");
  if (stats.per_pass !== null) facts.push(stats.per_pass.toFixed(2) + " tokens per target pass");
  if (!synthetic) facts.push(deciding.same_text || stats.identical ? (stats.identical ? "identical texts" : "texts differ") : "texts drawn separately");
  let verdict = VERDICTS[stats.verdict] || "speculative ÷ baseline, tokens per second";
  if (synthetic) verdict = "at a synthetic acceptance: only times mean something";
  else if (!rule.exact) verdict += ", lossy";
  const place = ["device", "dtype"].map((name) => trace.pair[name]).filter(Boolean).map(SpecDecode.plain);
  const words = {
    speedup: stats.speedup === null ? "–" : stats.speedup.toFixed(2) + "×", verdict,
    interval: stats.interval ? "95 % interval " + stats.interval[0].toFixed(2) + "–" + stats.interval[1].toFixed(2) + "×" : "no interval: the file holds the trace alone",
    prompt: cut(trace.request.prompt.trim().split(/\s+/).join(" "), 76),
    facts: facts.join(" · "), pair: cut(trace.pair.target + " + " + trace.pair.drafter, 68),
    machine: cut([[...place, SpecDecode.machine(trace) || "machine not known"].join(", "), trace.date ? trace.date.slice(0, 10) : "date not known"].join(" · "), 80),
  };
  for (const lane of SpecDecode.LANES) {
    words[lane] = rates[lane].toFixed(1) + " tokens/s";
    words[lane + "_bar"] = (560 * rates[lane] / most).toFixed(1);
  }
  const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;" };
  const clean = (text) => text.replace(/[\u0000-\u001f\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "");
  return tables.image.replace(/\{\{(\w+)\}\}/g, (_, name) => clean(words[name]).replace(/[&<>"']/g, (c) => ESCAPES[c]));
};

// The same as PNG, drawn on a canvas: a Blob.
SpecDecode.png = async (svg) => {
  const picture = new Image();
  picture.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg);
  await picture.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [1200, 630];
  canvas.getContext("2d").drawImage(picture, 0, 0, 1200, 630);
  return new Promise((done, failed) => canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error("no picture"))), "image/png"));
};

// Hands a file to the visitor.
SpecDecode.hand = (name, blob) => {
  const link = SpecDecode.make("a", "");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};
