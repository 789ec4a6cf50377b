// What the page of the app needs of its view: keys, the focus, the queue, the settings, and the phase on the body.
// In: the view, its player, and a function that empties both. Knows Gradio's markup.
SpecDecode.page = (view, player, clear) => {
  const { root } = view, listen = SpecDecode.listener(root);
  view.explains = () => true; // of terms wherever they stand

  let was = "";
  view.parts.push({ shown: (phase) => {
    document.body.dataset.sdPhase = phase;
    if (phase === "running" && was !== phase && window.innerWidth <= 800) root.scrollIntoView({ block: "start", behavior: "smooth" });
    // Until the next status line comes, this one must not say again that the visitor waits.
    if (phase === "done" || phase === "failed") document.querySelector("#sd-status p")?.classList.add("sd-over");
    was = phase;
  } });

  listen("click", (event) => { if (player.active && event.target.closest?.("#sd-clear")) clear(); });

  // Ctrl+Enter runs, Esc stops: whichever of the buttons is there and enabled.
  const press = (...ids) => {
    for (const id of ids) {
      const node = document.getElementById(id);
      const button = node && (node.matches("button") ? node : node.querySelector("button"));
      if (button && !button.disabled && button.offsetParent) return button.click();
    }
  };
  listen("keydown", (event) => {
    const list = event.target.closest && event.target.closest('[role="combobox"][aria-expanded="true"]');
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); press("sd-run"); }
    taken = event.key === "Enter" && Boolean(list);
    if (event.key !== "Escape" || list) return;
    if (!view.card.dismiss()) press("sd-stop", "sd-leave", "sd-measure-stop", "sd-measure-leave", "sd-pays-stop", "sd-pays-leave"); // what is open is closed before a race is stopped
  });
  // Gradio opens the list of a drop-down when it gets the focus and by nothing else, leaves it open when the focus goes on
  // by Tab, and drops the focus when an option is taken.
  const opens = { pointerdown: () => true, keydown: (event) => /^Arrow(Down|Up)$/.test(event.key) };
  for (const [name, does] of Object.entries(opens)) listen(name, (event) => {
    const box = event.target;
    if (box !== document.activeElement || !box.matches('[role="combobox"][aria-expanded="false"]') || !does(event)) return;
    box.dispatchEvent(new FocusEvent("focus"));
  });
  let taken = false;
  listen("pointerdown", (event) => { taken = event.pointerType === "mouse" && Boolean(event.target.closest('[role="option"]')); });
  listen("focusout", (event) => {
    const box = event.target;
    if (box.matches('[role="combobox"]')) setTimeout(() => {
      if (taken && document.activeElement === document.body) {
        box.focus({ preventScroll: true });
        box.dispatchEvent(new FocusEvent("blur")); // the focus would open it again
      } else if (box !== document.activeElement && box.getAttribute("aria-expanded") === "true") {
        box.dispatchEvent(new FocusEvent("blur"));
      }
      taken = false;
    }, 50);
  });

  // Focus does not fall to the body: where the element that had it was hidden, disabled or removed, it goes to whatever
  // took its place, at worst to the status line, or to the view of the other tab.
  const visible = (node) => node && node.isConnected && !node.disabled && node.getClientRects().length;
  const rests = ["sd-status", "sd-lab-view", "sd-pays-view"];
  const stops = (last) => ["sd-measure", "sd-pays"].filter((name) => last.id.startsWith(name)).flatMap((name) => [name + "-stop", name + "-leave", name + "-run"]);
  let last = null, fallen = false;
  listen("focusin", (event) => {
    last = event.target;
    fallen = fallen && rests.includes(last.id);
  });
  const keep = () => {
    const now = document.activeElement;
    const lost = last && (now === document.body || now === last) && !visible(last);
    if (!lost && !(fallen && rests.includes(now.id))) return;
    const next = [...stops(last), "sd-stop", "sd-leave", "sd-run", "sd-lab-stop", "sd-lab-run"].map((id) => document.getElementById(id)).find(visible);
    const status = rests.map((id) => document.getElementById(id)).find(visible);
    if (!next && status) status.tabIndex = -1;
    fallen = !next;
    const to = next || status;
    if (to && to !== now) to.focus({ preventScroll: true });
  };
  listen("focusout", () => setTimeout(keep, 0));
  const page = root.closest(".gradio-container") || document.body;
  new MutationObserver(keep).observe(page, { subtree: true, childList: true, attributeFilter: ["disabled", "hidden", "class", "style"] });

  // Gradio writes the place in the queue over the status line, faint and unexplained; here it is said in words.
  const waits = () => {
    const place = document.querySelector("#sd-status .sd-place"), queue = document.querySelector("#sd-status .progress-text");
    const found = place && queue && queue.textContent.match(/(\d+)\/(\d+)\s*\|\s*([\d.]+)(?:\/([\d.]+))?/);
    if (!found) return;
    const [, rank, size, passed, whole] = found;
    const left = 5 * Math.ceil((whole - passed) / 5);
    const text = ", place " + rank + " of " + size + " in the queue" + (left > 0 ? ", result in about " + left + " s" : "");
    if (place.textContent !== text) place.textContent = text;
  };
  const watchStatus = (tries) => {
    const status = document.getElementById("sd-status");
    if (status) new MutationObserver(waits).observe(status, { subtree: true, childList: true, characterData: true });
    else if (tries) setTimeout(watchStatus, 50, tries - 1);
  };
  watchStatus(100);

  // The settings stand open where there is room beside the race; the panel may be mounted after this component.
  const unfold = (tries) => {
    const panel = document.querySelector("#sd-settings > button");
    if (!panel) return tries && setTimeout(unfold, 50, tries - 1);
    if (window.innerWidth > 960 && !panel.classList.contains("open")) panel.click();
  };
  setTimeout(unfold, 0, 100);
};
