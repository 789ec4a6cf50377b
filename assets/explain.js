// What happened at every position of a round, in words and with the numbers of the trace.
// In: a `SpecDecode.Race` and one of its rounds. Out: columns, and sentences as lists of texts and numbers. Touches no
// page. A number that was not recorded is not in a sentence; the two that are worked out here say from which.

// A token as it is quoted: line breaks as signs, an empty text as what it is.
SpecDecode.quoted = (text) => (text ? "“" + text.replaceAll("\n", "↵") + "”" : "(part of a character)");

// The positions of a round: [{place, draft, target, verdict, own}] with the token that was drafted, the one that the
// target's pass gave in its place, and whether that is the target's own; a token that is missing is null.
SpecDecode.columns = (round) => {
  const drafted = round.tokens.filter((t) => t.role === "accepted" || t.role === "rejected");
  const own = round.tokens.find((t) => ["correction", "bonus", "target"].includes(t.role)) || null;
  const first = drafted.findIndex((t) => t.role === "rejected");
  const columns = drafted.map((draft, i) => ({
    place: i + 1, draft, own: i === first,
    target: draft.role === "accepted" ? draft : i === first ? own : null,
    verdict: draft.role === "accepted" ? "accepted" : i === first || draft.compared ? "rejected" : "not judged",
  }));
  if (own && own.role !== "correction") columns.push({ place: drafted.length + 1, draft: null, own: true, target: own, verdict: own.role });
  return columns;
};

SpecDecode.explain = (race, round, column) => {
  const { about } = race, { draft, target, verdict } = column;
  const quoted = (token) => SpecDecode.quoted(token.text);
  const x = (value) => ({ value });
  const rule = about.deciding, sampled = about.temperature > 0;
  const drawn = ["rejection", "block"].includes(rule) || (rule === "threshold" && sampled);
  const oneHot = draft && (draft.q === null || about.undrawn.includes(round.drafter));
  const maker = round.drafter || "the drafter";

  if (round.index === 0) return [["Prefill: the target reads the whole prompt at once, and its last position gives the first token of the text, " + quoted(target) + "."]];
  if (verdict === "target") return [["A plain step, nothing was drafted: one pass of the target gives one token, " + quoted(target) + "."], picked()];
  if (verdict === "bonus") {
    const n = column.place - 1;
    return [[(n === 1 ? "The drafted token was" : "All " + n + " drafted tokens were") + " accepted. The same pass has also computed what follows them, so the target adds one more token at no cost: " + quoted(target) + "."], picked()];
  }
  if (verdict === "not judged" && !draft.compared) {
    return [["Not judged. The token before it was rejected, so this guess stands after a text that is no longer there, and is dropped. What the target says here is given that text, and is not used."]];
  }
  if (!draft.compared) return [[(draft.role === "accepted" ? "Accepted" : "Rejected") + ". The numbers that the rule compared were not recorded."], after()];
  const [value, bound] = draft.compared;
  if (rule === "greedy") return [greedy(value, bound), after()];
  if (rule === "coupled") return [
    ["Drafter and target draw with the same noise, which depends on the seed, the position and the token alone. Each token scores its probability ÷ its noise, and the highest score is drawn."],
    draft.role === "accepted"
      ? ["The target draws " + quoted(draft) + " with the score ", x(bound), ", the very token that was drafted: accepted."]
      : ["The draft " + quoted(draft) + " scores ", x(value), " under the target. The target draws " + named() + " with ", x(bound), ": not the same token, so the draft is rejected."],
    after(),
  ];
  if (rule === "rejection") return [source(), chance(["min(1, p ÷ q)"], value, bound), after()];
  if (rule === "block") return [source(), whole(value, bound), after()];
  if (rule === "threshold" && !sampled) return [
    ["A lossy rule: a draft passes while its probability is at least the lenience, ", x(about.lenience), ", times that of the target’s most likely token. Here p = ", x(value), ", and the bound is ", x(bound), value >= bound ? ": accepted." : ": rejected."],
    value >= bound && value < (1 - 1e-6) * bound / about.lenience ? ["The exact rule would refuse it: it is not the target’s most likely token."] : [],
    after(),
  ];
  if (rule === "threshold") return [
    source(), chance(["min(1, p ÷ (lenience · q)), with the lenience ", x(about.lenience), ",", " a lossy rule:"], value, bound),
    oneHot || draft.p === null ? [] : ["Without lenience, min(1, p ÷ q) would be ", x(Math.min(1, draft.p / draft.q)), "."], after(),
  ];
  return [["The rule compared ", x(value), " with ", x(bound), ": " + draft.role + "."], after()];

  function named() {
    return target ? quoted(target) : "another token";
  }
  function greedy(value, bound) {
    return draft.role === "accepted"
      ? ["The target’s most likely token is " + quoted(draft) + ", with p = ", x(bound), ". It is the very token that was drafted: accepted."]
      : ["The draft is " + quoted(draft) + ", which has p = ", x(value), " under the target. The target’s most likely token is " + named() + ", with p = ", x(bound), ": not the same, so the draft is rejected."];
  }
  function source() {
    if (oneHot) return [maker + " guessed " + quoted(draft) + " outright and drew it from no distribution, which counts as q = 1.", ...given(" The target gives it p = ")];
    return ["The drafter drew " + quoted(draft) + " with q = ", x(draft.q), ".", ...given(" The target gives it p = ")];
  }
  function given(words) {
    return draft.p === null ? [] : [words, x(draft.p), "."];
  }
  function chance(words, value, bound) {
    const passed = draft.role === "accepted";
    return ["Accept with ", ...words, " = ", x(bound), ". Drew the random number ", x(value), passed ? ", which is below: accepted." : ", which is not below: rejected."];
  }
  function whole(value, bound) {
    const passes = value < bound, kept = round.tokens.filter((t) => t.role === "accepted").length;
    const many = (n) => (n === 1 ? "the first token" : "the first " + n + " tokens");
    return ["Block verification judges the draft as a whole. The chance to keep " + many(column.place) + " is ", x(bound), ", which follows from p ÷ q of all of them; drew ", x(value),
      passes ? ", which is below: they are kept." : ", which is not below.",
      passes ? "" : draft.role === "accepted" ? " A later position passes, so this token is kept all the same."
        : kept ? " The draft is kept up to the last position that passes, which is position " + kept + "." : " No position passes, so nothing of the draft is kept."];
  }
  // How the target's own token in place of this draft came about.
  function after() {
    if (!column.own || !target) return [];
    if (rule === "greedy" || rule === "coupled") return [quoted(target) + " is the target’s own token, exactly as without a drafter, and takes its place."];
    if (!drawn) return [quoted(target) + ", the target’s most likely token, takes its place."];
    const { residual } = round;
    if (!residual) return ["In its place the target draws " + quoted(target) + "."];
    if (!residual[0]) return ["Nothing is left of p − q, so the target draws again from p: " + quoted(target) + "."];
    const left = rule === "rejection" ? (oneHot ? "p without the draft" : "max(p − q, 0), what the drafter proposes too rarely")
      : rule === "block" ? "max(r·p − q, 0), where r is the chance to have come so far" : "max(p − lenience · q, 0)";
    return ["Drew again from the residual, " + left + ", which holds ", x(residual[0]), " of the probability: " + quoted(target) + "."];
  }
  function picked() {
    if (target.p === null) return [];
    const how = rule === "greedy" || (rule === "threshold" && !sampled) ? "It is the target’s most likely token, with p = " : "It is drawn from the target’s distribution, where it has p = ";
    return [how, x(target.p), "."];
  }
};
