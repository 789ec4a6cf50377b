// A view as a guest of any Gradio page: its style sheet, Escape, and its layout by its own width.
// In: the view, and the style sheet, which the page gets once however many views it has.
SpecDecode.guest = (view, sheet) => {
  const { root } = view, TIGHT = 900; // pixels
  if (sheet && !document.querySelector("style[data-sd-view]")) {
    const style = SpecDecode.make("style", "", sheet);
    style.dataset.sdView = "";
    document.head.append(style);
  }
  SpecDecode.listener(root)("keydown", (event) => { if (event.key === "Escape") view.card.dismiss(); });
  new ResizeObserver(() => root.classList.toggle("sd-tight", root.clientWidth < TIGHT)).observe(root);
};
