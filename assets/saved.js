// The boot of a saved replay (assets/replay.html): the view of the page, without Gradio, a server or a network.
// In: the elements #sd-replay, the race, and #sd-tables. A file that is dropped on it is shown in place of its own race.
{
  const { make, button } = SpecDecode;
  const tables = JSON.parse(document.getElementById("sd-tables").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)"), root = document.querySelector(".sd-race"), note = document.querySelector(".sd-saved-note");
  const paint = () => document.body.classList.toggle("dark", dark.matches);
  paint();
  dark.addEventListener("change", paint);
  const view = SpecDecode.view(root, tables.terms);
  SpecDecode.card(view);
  SpecDecode.inspector(view);
  SpecDecode.timeline(view);
  SpecDecode.charts(document.querySelector(".sd-plots"));
  const player = SpecDecode.player(view, []);
  const tell = (text) => {
    note.textContent = text;
    note.hidden = !text;
  };
  const tools = document.querySelector(".sd-saved-tools"), facts = document.querySelector(".sd-saved-facts dl");
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") view.card.dismiss(); });

  function show(recording) {
    const { data } = recording, { pair, machine, versions, request } = data;
    recording.title = "this race";
    player.open(recording, true);
    const stem = "spec-decode-" + (data.date || "race").slice(0, 10);
    const svg = () => SpecDecode.image(recording.stats, data, tables);
    tools.replaceChildren(
      button("", "", () => SpecDecode.hand(stem + ".json", new Blob([JSON.stringify(data)], { type: "application/json" })), "Download trace (JSON)"),
      button("", "", () => SpecDecode.hand(stem + ".svg", new Blob([svg()], { type: "image/svg+xml" })), "Share image (SVG)"),
      button("", "", () => SpecDecode.png(svg()).then((blob) => SpecDecode.hand(stem + ".png", blob), () => tell("This browser could not draw the picture.")), "Share image (PNG)"));
    const revision = (model) => {
      const entry = pair.revisions && pair.revisions[model];
      return entry && entry.revision ? " (" + SpecDecode.plain(entry.revision) + ")" : "";
    };
    const lines = {
      target: pair.target + revision("target"), drafter: pair.drafter + revision("drafter"),
      device: [pair.device, pair.dtype].filter(Boolean).map(SpecDecode.plain).join(", "), machine: SpecDecode.machine(data) || "not known", date: data.date || "not known",
      versions: Object.entries(versions).map(([name, version]) => name + " " + version).join(", "), prompt: request.prompt,
      "left out": data.omitted.join(", ") || "nothing", "to run it again": "python -m spec_decode replay FILE --rerun",
    };
    facts.replaceChildren(...Object.entries(lines).map(([name, said]) => make("div", "", make("dt", "", name), make("dd", "", said))));
  }

  const take = SpecDecode.drop(tables, show, tell);
  const own = document.getElementById("sd-replay").textContent;
  if (own.trim()) SpecDecode.unfolded(own, tables).then(show, (error) => tell(error instanceof SpecDecode.Refused ? error.message : "The replay in this file cannot be read."));
  else {
    const pick = make("input", "");
    pick.type = "file";
    pick.accept = ".json,.gz,.html,application/json,text/html";
    pick.addEventListener("change", () => take([...pick.files]));
    tell("Drop a trace or a saved replay on this page, or choose one; it is read in this browser and sent nowhere. ");
    note.after(make("label", "sd-saved-pick", "File ", pick));
    document.querySelector(".sd-saved-facts").hidden = true;
  }
}
