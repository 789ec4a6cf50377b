// A link that holds a prompt and its settings, compressed, in the fragment, which no server gets. Read on the server, by
// the code that checks the form (spec_decode/share/link.py, which also says what the fields are).
// In: the values of the form by name, and the tables of share/saved.py. Out: the fragment without #; `Refused` where
// there is none.
SpecDecode.LINK = 8000; // characters
// What a link holds of these values.
SpecDecode.dataOf = (form, tables) => {
  const settings = {}, sampling = Number(form.temperature) > 0, named = tables.rules[form.rule];
  const values = { ...form, draft_length: form.policy === "fixed" ? form.draft_length : form.policy };
  for (const name of ["draft_length", "temperature", "top_p", "top_k", "lenience", "max_new_tokens", "seed"]) {
    if (name === "lenience" && !(named && named.lenient)) continue;
    if (values[name] !== tables.settings[name] && values[name] !== null && values[name] !== undefined) settings[name] = values[name];
  }
  if (named && form.rule !== (sampling ? "coupled" : "greedy")) settings.rule = form.rule;
  const data = { prompt: form.prompt };
  if (Object.keys(settings).length) data.settings = settings;
  const local = /^([/~]|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\)/.test(form.drafter || ""); // of a directory, its last component
  if (form.drafter) data.drafter = local ? form.drafter.replace(/[\\/]+$/, "").split(/[\\/]/).pop() : form.drafter;
  if (form.system && form.keep_system) data.system = form.system;
  if (form.thinking) data.thinking = true;
  return data;
};
SpecDecode.linkOf = async (form, tables, run = false) => {
  const refuse = (why) => { throw new SpecDecode.Refused(why); };
  if (!String(form.prompt || "").trim()) refuse("Write a prompt first: a link holds the prompt and its settings.");
  if (!("CompressionStream" in window)) refuse("This browser cannot compress; copy the link in a newer one.");
  const bytes = new TextEncoder().encode(JSON.stringify(SpecDecode.dataOf(form, tables)));
  const packed = new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate-raw"))).arrayBuffer());
  let binary = "";
  for (const byte of packed) binary += String.fromCharCode(byte);
  const text = "race=1." + btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "") + (run ? "&run=1" : "");
  if (text.length > SpecDecode.LINK) refuse(tables.too_long);
  return text;
};

// The form that a recorded request is: what a form has no place for is null.
SpecDecode.formOf = (request) => {
  const { settings } = request, fixed = typeof settings.draft_length === "number";
  if (request.prefix || request.draft.length || (request.history || []).length || settings.synthetic_acceptance !== null) return null;
  return { ...settings, prompt: request.prompt, policy: fixed ? "fixed" : settings.draft_length, drafter: request.drafter,
    system: request.system, keep_system: true, thinking: request.thinking };
};
