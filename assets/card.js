// One card for all tokens and terms. It shows what the pointer, the focus or the arrow keys are on, and goes with them.
// A press on a term pins it, until another, its button or Escape; a press on a token opens its round in the inspector,
// where the card then stands. Arrow keys walk through the tokens of a lane, and Enter opens the one they are on.
// In: a view. Out: `view.card` with `dismiss()`, which says whether there was something to dismiss, `dock` and `undock`.
SpecDecode.card = (view) => {
  const { root, lanes, terms } = view, make = SpecDecode.make, listen = SpecDecode.listener(root);
  const tip = root.querySelector(".sd-tip");
  let marked = null, pinned = false, byKeys = false, docked = null;
  const known = (x, otherwise) => (x === null ? otherwise : SpecDecode.digits(x));

  function describe({ lane, round, token, drafted }) {
    const { text, role, p, q, draft_position: position } = token;
    const lines = [["p", "sd-tip-head", role + " " + JSON.stringify(text || "…")],
      ["p", "sd-tip-says", text ? SpecDecode.SAYS[role] || "" : "part of a character; the last of its tokens shows it"]];
    const facts = [["target p", known(p, "not known")]];
    if (lane.name === "speculative") {
      if (position !== null) facts.push(["draft q", known(q, "not drawn")]);
      facts.push(["round", round.index ? String(round.index) : "prefill"]);
      facts.push(["in the draft", position === null ? "not drafted" : position + " of " + drafted]);
      if (round.kl !== null && round.kl !== undefined) facts.push(["KL of round", known(round.kl) + " nat"]);
    } else facts.push(["pass", round.index ? String(round.index) : "prefill"]);
    return [lines, facts];
  }
  function show(anchor, keys) {
    if (anchor === marked) return;
    clear();
    marked = anchor;
    byKeys = Boolean(keys);
    tip.replaceChildren();
    if (anchor.about) {
      for (const mate of anchor.about.mates) mate.classList.add("mate");
      anchor.classList.add("cur");
      const [lines, facts] = describe(anchor.about);
      for (const [tag, name, text] of lines) tip.append(make(tag, name, text));
      tip.append(make("dl", "", ...facts.map(([name, text]) =>
        make("div", "", make("dt", "", ...(name.startsWith("KL") ? view.explained(name) : [name])), make("dd", "", text)))));
    } else {
      tip.append(make("p", "sd-tip-head", anchor.textContent), make("p", "sd-tip-text", terms[anchor.textContent]));
    }
    tip.hidden = false;
    if (docked && docked.span === anchor) return docked.place.append(tip);
    root.append(tip);
    place();
  }
  function place() {
    if (!marked.isConnected || docked?.place.contains(tip)) return; // it stood in the card itself, or in a line that was written anew
    const at = marked.getClientRects()[0] || marked.getBoundingClientRect();
    const home = root.getBoundingClientRect();
    const pane = marked.about ? marked.about.lane.box.getBoundingClientRect() : at;
    const top = Math.min(Math.max(at.top, pane.top), pane.bottom), bottom = Math.min(Math.max(at.bottom, pane.top), pane.bottom);
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const above = top - tip.offsetHeight - 8;
    tip.style.left = Math.max(8, Math.min(at.left, room)) - home.left + "px";
    tip.style.top = (above > 4 ? above : bottom + 8) - home.top + "px";
  }
  function pin() {
    pinned = true;
    tip.prepend(SpecDecode.button("sd-tip-close", "Close", hide, "×"));
    tip.setAttribute("role", "dialog");
    tip.setAttribute("aria-label", "Definition");
    place();
  }
  function hide() {
    if (!marked || (docked && marked === docked.span && !pinned)) return;
    const from = tip.contains(document.activeElement) && marked;
    clear();
    if (docked) show(docked.span);
    if (from) from.focus({ preventScroll: true });
  }
  function clear() {
    if (!marked) return;
    if (marked.about && !(docked && docked.span.about.round === marked.about.round)) {
      for (const mate of marked.about.mates) mate.classList.remove("mate");
    }
    marked.classList.remove("cur");
    marked = null;
    pinned = byKeys = false;
    tip.hidden = true;
    tip.setAttribute("role", "tooltip");
    tip.removeAttribute("aria-label");
  }
  // The card of a token at its place in the inspector, where it is back whenever nothing else is shown.
  function dock(place, span) {
    clear();
    docked = { place, span };
    show(span);
  }
  function undock() {
    docked = null;
    clear();
    root.append(tip);
  }
  const anchorOf = (node) => {
    const found = node.closest ? node.closest(".sd-term, .sd-text .t") : null;
    if (!found || (found.about ? !root.contains(found) : !view.explains(found))) return null; // another view's
    return found.about || terms[found.textContent] ? found : null;
  };
  function press(anchor) {
    if (anchor && anchor.about) {
      const { lane, round, token } = anchor.about;
      if (docked && docked.span === anchor) return view.inspector.close();
      return view.inspect(lane.name, round.index, token);
    }
    const again = pinned && anchor === marked;
    if (pinned) hide();
    if (!anchor || again) return;
    show(anchor);
    pin();
  }
  // Closes what is open; false where nothing was.
  function dismiss() {
    const { inspector } = view, open = Boolean(marked) && (pinned || byKeys) && !(docked && marked === docked.span);
    if (!open && inspector.open) {
      inspector.close();
      return true;
    }
    hide();
    return open;
  }

  listen("pointerover", (event) => {
    if (event.pointerType === "touch" || pinned) return;
    const anchor = anchorOf(event.target);
    if (anchor) show(anchor);
    else if (!byKeys) hide();
  });
  let pressed = null;
  listen("pointerdown", (event) => { pressed = event.isPrimary ? [event.clientX, event.clientY] : null; });
  listen("pointerup", (event) => { // a scroll by touch ends in pointercancel instead
    if (!pressed || event.button || Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 8) return;
    const anchor = anchorOf(event.target), { inspector } = view;
    if (anchor && !anchor.about) return; // a button: its click says so
    if (tip.contains(event.target) || inspector.home.contains(event.target)) return;
    if (!anchor && inspector.open && !inspector.wide.matches) inspector.close(); // a sheet goes at a press beside it
    press(anchor);
  });
  listen("click", (event) => {
    const anchor = anchorOf(event.target);
    if (anchor && !anchor.about) press(anchor);
  });
  listen("focusin", (event) => {
    const anchor = anchorOf(event.target);
    if (!anchor || anchor.about) return;
    anchor.setAttribute("aria-description", terms[anchor.textContent]);
    if (!pinned && anchor.matches(":focus-visible")) show(anchor, true);
  });
  listen("focusout", (event) => { if (event.target === marked && !pinned) hide(); });

  const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
  const hidden = ({ about: { token } }) => !token.text || (token.role === "rejected" && root.classList.contains("hide-rejected"));
  // Marks the token at a place of a lane as the one the keys are on.
  function move(lane, place) {
    const before = lane.spans[lane.cursor];
    if (before) before.removeAttribute("id");
    lane.cursor = place;
    const span = lane.spans[place];
    span.id = view.id("sd-cursor-" + lane.name);
    lane.box.setAttribute("aria-activedescendant", span.id);
    return span;
  }
  for (const lane of lanes) {
    lane.box.addEventListener("scroll", () => {
      lane.follow = lane.box.scrollHeight - lane.box.scrollTop - lane.box.clientHeight < 24;
      if (docked && docked.span.about.lane === lane) lane.follow = false;
      if (marked && !pinned && !lane.box.matches(":focus")) hide();
    }, { passive: true });
    lane.box.addEventListener("keydown", (event) => {
      const step = STEPS[event.key], current = lane.spans[lane.cursor];
      if (event.key === "Enter" && current && !event.ctrlKey && !event.metaKey) press(current);
      if (!step || !lane.spans.length || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      let next = Math.min(lane.spans.length - 1, Math.max(0, lane.cursor + step));
      const way = step < 0 && next > 0 ? -1 : 1;
      while (hidden(lane.spans[next]) && lane.spans[next + way]) next += way;
      const span = move(lane, next);
      lane.follow = false;
      span.scrollIntoView({ block: "nearest" });
      if (docked) view.inspect(lane.name, span.about.round.index, span.about.token, false);
      else show(span, true);
      const [lines, facts] = describe(span.about);
      view.say(lines[0][2] + ". " + facts.map((f) => f.join(" ")).join(", "));
    });
    lane.box.addEventListener("blur", () => { if (!pinned) hide(); });
    lane.box.addEventListener("copy", (event) => { // rejected tokens are no part of the text
      const range = getSelection().rangeCount ? getSelection().getRangeAt(0) : null;
      if (!range || range.collapsed || !lane.box.contains(range.commonAncestorContainer)) return;
      const part = range.cloneContents();
      for (const thrown of part.querySelectorAll(".r")) thrown.remove();
      event.clipboardData.setData("text/plain", part.textContent);
      event.preventDefault();
    });
  }
  view.parts.push({ reset: () => { if (marked && marked.about) clear(); } });
  view.card = { dismiss, dock, undock };
};
