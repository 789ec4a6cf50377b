// The four figures as plain SVG, for a file that has no network and no Plotly.
// In: the element of assets/figures.html; events sd-figures with the series of spec_decode/session/curves.py. Out: nothing.
// Colours are variables of the style sheet; what a figure says is also its label.
SpecDecode.charts = (root) => {
  const NS = "http://www.w3.org/2000/svg", W = 460, H = 240, LEFT = 46, RIGHT = 12, TOP = 26, BOTTOM = 38;
  const draw = (tag, attributes, text) => {
    const node = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const nice = (span, count) => {
    const raw = span / count || 1, power = 10 ** Math.floor(Math.log10(raw));
    return power * [1, 2, 5, 10].find((n) => n * power >= raw * 0.999);
  };
  const shown = (x) => String(Number(x.toPrecision(4)));

  // An empty plot: its svg, and the places of values on both axes.
  function plane({ x: [x0, x1], y: [y0, y1], names, ticks = 5, whole = false, format = shown }) {
    const svg = draw("svg", { viewBox: "0 0 " + W + " " + H, role: "img", class: "sd-chart" });
    const at = (v) => LEFT + (v - x0) / (x1 - x0 || 1) * (W - LEFT - RIGHT), up = (v) => H - BOTTOM - (v - y0) / (y1 - y0 || 1) * (H - TOP - BOTTOM);
    const step = whole ? Math.max(1, Math.ceil(nice(x1 - x0, 8))) : nice(x1 - x0, ticks), rise = nice(y1 - y0, 4);
    for (let v = Math.ceil(y0 / rise) * rise; v <= y1 + 1e-9; v += rise) {
      svg.append(draw("line", { x1: LEFT, x2: W - RIGHT, y1: up(v), y2: up(v), class: "sd-ch-grid" }), draw("text", { x: LEFT - 6, y: up(v) + 4, "text-anchor": "end" }, format(v)));
    }
    for (let v = Math.ceil(x0 / step) * step; v <= x1 + 1e-9; v += step) svg.append(draw("text", { x: at(v), y: H - BOTTOM + 16, "text-anchor": "middle" }, shown(v)));
    svg.append(draw("text", { x: (LEFT + W - RIGHT) / 2, y: H - 4, "text-anchor": "middle" }, names[0]));
    const legend = (entries) => {
      let x = LEFT;
      for (const [kind, name] of entries) {
        svg.append(draw("rect", { x, y: 7, width: 12, height: 8, class: kind }), draw("text", { x: x + 17, y: 15 }, name));
        x += 34 + 6.4 * name.length;
      }
    };
    const line = (xs, ys, kind) => svg.append(draw("polyline", { points: xs.map((v, i) => at(v).toFixed(1) + "," + up(ys[i]).toFixed(1)).join(" "), class: kind }));
    return { svg, at, up, legend, line };
  }
  const most = (...lists) => Math.max(0, ...lists.flat());

  const DRAWS = {
    rate({ rate: { baseline, speculative } }) {
      if (!baseline[0].length && !speculative[0].length) return null;
      const p = plane({ x: [0, most(baseline[0], speculative[0])], y: [0, 1.08 * most(baseline[1], speculative[1])], names: ["lane time, s"] });
      p.line(baseline[0], baseline[1], "sd-ch-base dotted");
      p.line(speculative[0], speculative[1], "sd-ch-fast");
      p.legend([["fill-base", "baseline"], ["fill-fast", "speculative"]]);
      const last = (list) => (list.length ? shown(list[list.length - 1]) : "–");
      return [p, "Tokens per second over lane time. Baseline " + last(baseline[1]) + ", speculative " + last(speculative[1]) + " at the end."];
    },
    acceptance({ acceptance: [rounds, share, mean] }) {
      if (!rounds.length) return null;
      const p = plane({ x: [0, most(rounds)], y: [0, 1], names: ["round"], format: (v) => Math.round(100 * v) + "%" });
      rounds.forEach((n, i) => p.svg.append(draw("circle", { cx: p.at(n), cy: p.up(share[i]), r: 2.6, class: "fill-base faint" })));
      p.line(rounds, mean, "sd-ch-fast");
      p.legend([["fill-base", "round"], ["fill-fast", "running mean"]]);
      return [p, "Acceptance rate per round. Running mean " + Math.round(100 * mean[mean.length - 1]) + " percent at the end."];
    },
    passes({ final: { passes: [tokens, count] } }) {
      if (!tokens.length) return null;
      const p = plane({ x: [0.4, most(tokens) + 0.6], y: [0, 1.08 * most(count)], names: ["tokens from one target pass"], whole: true });
      const width = Math.min(40, 0.7 * (p.at(2) - p.at(1)));
      tokens.forEach((n, i) => p.svg.append(draw("rect", { x: p.at(n) - width / 2, width, y: p.up(count[i]), height: Math.max(0, p.up(0) - p.up(count[i])), class: "fill-fast" })));
      return [p, "Tokens per target pass: " + tokens.map((n, i) => count[i] + " passes gave " + n).join(", ") + "."];
    },
    model({ final: { model: m } }) {
      if (!m || !m.predicted.length) return null;
      const own = m.measured[0].map((n, i) => [n, m.measured[1][i]]).filter(([n]) => n <= 8);
      const p = plane({ x: [0.5, 8.5], y: [0, 1.08 * most(m.high, own.map((o) => o[1]), m.adaptive || 0, 1)], names: ["draft length γ"], whole: true });
      const there = m.lengths.slice(0, m.predicted.length), back = [...there].reverse();
      const band = [...there.map((n, i) => [n, m.high[i]]), ...back.map((n, i) => [n, m.low[m.low.length - 1 - i]])];
      p.svg.append(draw("polygon", { points: band.map(([n, v]) => p.at(n).toFixed(1) + "," + p.up(v).toFixed(1)).join(" "), class: "sd-ch-band" }));
      p.line([0.5, 8.5], [1, 1], "sd-ch-base dotted");
      p.line(there, m.predicted, "sd-ch-fast");
      const legend = [["fill-fast", "predicted, with its band"]];
      if (m.best) p.svg.append(draw("circle", { cx: p.at(m.best), cy: p.up(m.predicted[m.best - 1]), r: 7, class: "sd-ch-ring" }));
      if (m.adaptive) p.line([0.5, 8.5], [m.adaptive, m.adaptive], "sd-ch-own dashed");
      for (const [n, v] of own) p.svg.append(draw("circle", { cx: p.at(n), cy: p.up(v), r: 5, class: "fill-own" }));
      if (m.adaptive || own.length) legend.push(["fill-own", "this race"]);
      p.legend(legend);
      return [p, "Predicted speedup by draft length, with the 90 percent band: " + m.predicted.map((x, i) => there[i] + ": " + x + ", " + m.low[i] + " to " + m.high[i]).join("; ") + ". " + (m.best ? "Best " + m.best + "." : "No single best.")];
    },
  };

  document.addEventListener("sd-figures", ({ detail }) => {
    for (const box of root.querySelectorAll("[data-plot]")) {
      const made = detail && detail.final ? DRAWS[box.dataset.plot](detail) : null, canvas = box.querySelector(".sd-canvas");
      canvas.replaceChildren(...(made ? [made[0].svg] : []));
      if (made) made[0].svg.setAttribute("aria-label", made[1]);
      box.dataset.state = made ? "drawn" : !detail ? "waiting" : box.dataset.plot === "model" && !detail.final.model ? "untold" : "none";
    }
  });
};
