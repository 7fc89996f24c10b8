// An experiment's result: warnings first, then decisions and intervals.

import { el } from "./dom.js";
import { count, number, pValue, percent } from "./format.js";
import { outcomePart } from "./outcome.js";
import { cardBody, cardTable } from "./table.js";

/** Draw the result in `place`; what was unfolded there stays so. */
export function showResult(place, experiment, result) {
  const open = new Set([...place.querySelectorAll("details[open]")].map((each) => each.id));
  const focused = place.contains(document.activeElement)
    ? document.activeElement.closest("details")?.id
    : undefined;
  place.replaceChildren(
    ...head(experiment, result),
    endPart(experiment, result),
    ratioPart(result.ratio),
    el("p", { class: "hint" }, rules(result)),
    neededPart(experiment, result),
    ...outcomes(result),
    folded("result-automatic", "What the server measured", automatic(result)),
    folded("result-units", "Units by variant", units(experiment, result)),
    folded("result-method", "How it is computed", method(result)),
  );
  for (const details of place.querySelectorAll("details")) details.open = open.has(details.id);
  if (focused) place.querySelector(`#${focused} > summary`)?.focus();
}

function head(experiment, result) {
  const { description, sticky } = experiment.definition;
  const facts = [`version ${result.version}`, `control ${result.control}`, stickyWords(sticky)];
  if (experiment.winner) facts.push(`answered by ${experiment.winner}`);
  if (experiment.promoted) facts.push(`promoted ${experiment.promoted}`);
  const badge = el("span", { class: "badge", "data-state": result.state }, result.state);
  return [
    el("h2", {}, experiment.id, " ", badge),
    description ? el("p", {}, description) : "",
    el("p", { class: "hint" }, facts.join(" · ")),
  ];
}

/** Why nothing is assigned any more, and what requests get instead. */
function endPart({ winner }, { state, control }) {
  if (state === "running") return "";
  const words =
    state === "paused"
      ? ["Paused. ", `Until it is resumed every request gets the control, ${control}.`]
      : [
          "Stopped for good. ",
          `Nobody is assigned any more: every request gets ${winner ?? control}, ` +
            `${winner === null ? "the control, as no winner was named" : "which was named the winner"}` +
            ". The result stays; outcomes of answers from before still count.",
        ];
  return el(
    "p",
    { class: "notice", id: "experiment-end", role: "status" },
    el("strong", {}, words[0]),
    words[1],
  );
}

function stickyWords({ by, name }) {
  if (by === "random") return "drawn for each request";
  return by === "user" ? "sticks to the user" : `sticks to the ${by} ${name}`;
}

/** The warning, above all decisions. */
function ratioPart(ratio) {
  if (!ratio.mismatch) return "";
  return el(
    "div",
    { class: "problem", id: "ratio-warning", role: "alert" },
    el("strong", {}, "Sample ratio mismatch: trust no comparison below. "),
    "The variants did not get the shares that their weights promise ",
    `(p ${pValue(ratio.p_value).replace(/^(?!<)/, "= ")}, threshold ${number(ratio.threshold)}): `,
    Object.keys(ratio.expected)
      .map((each) => shareWords(each, ratio))
      .join("; "),
    ". Some units get lost or get the wrong variant; find out why before you go on.",
  );
}

function shareWords(variant, { observed, expected }) {
  const got = count(observed[variant] ?? 0);
  return `${variant} has ${got} units where ${count(Math.round(expected[variant]))} were expected`;
}

function rules({ alpha, minimum }) {
  return (
    `Intervals hold at all looks together, with ${percent(1 - alpha)}. At least ${count(minimum)} ` +
    "units of each variant before a decision, more where their sizes differ. Probability of best " +
    "describes; it does not decide."
  );
}

/** What "units needed" means, where a decision still waits for units. */
function neededPart({ definition: { sticky } }, { outcomes: told, minimum, minimum_events: events }) {
  if (told.every(({ comparisons }) => comparisons.every(({ enough }) => enough))) return "";
  const unit = { random: "request", user: "user" }[sticky.by] ?? `${sticky.by} ${sticky.name}`;
  return el(
    "p",
    { class: "hint", id: "needed-words" },
    el("strong", {}, "Units needed: "),
    `a unit is one ${unit} with outcomes, and counts once however many it has. Before a decision ` +
      `the smaller of the two variants needs at least ${count(minimum)} of them, and more the ` +
      "further the other outgrows it, because the intervals are only exact enough from there on" +
      (told.some(({ kind }) => kind !== "number")
        ? `; a share also needs ${count(events)} units of each of its two values. `
        : ". ") +
      "It is the least, not a forecast: a small difference takes many more units to show.",
  );
}

function outcomes({ outcomes: told, state }) {
  if (told.length) return told.map((each) => outcomePart(each, 3, state));
  return [el("p", {}, "No metrics are defined: only what the server measured is below.")];
}

function automatic({ automatic: measured, state }) {
  return (measured ?? []).map((each) => outcomePart(each, 3, state));
}

function units({ shares }, { ratio, requests }) {
  const columns = ["Variant", "Share now", "Units", "Expected", "Requests"];
  const rows = Object.keys(ratio.expected).map((name) => [
    name,
    percent(shares[name] ?? 0),
    count(ratio.observed[name] ?? 0),
    count(Math.round(ratio.expected[name])),
    count(sum(requests?.[name])),
  ]);
  return [cardTable("Units by variant", columns, cardBody(columns, rows))];
}

const sum = (byEnding) => Object.values(byEnding ?? {}).reduce((total, each) => total + each, 0);

function method({ method: said }) {
  const entries = Object.entries(said);
  const term = (name) => el("dt", {}, name.replaceAll("_", " "));
  return [
    el(
      "dl",
      {},
      entries.flatMap(([name, text]) => [term(name), el("dd", {}, text)]),
    ),
  ];
}

function folded(id, title, children) {
  return el("details", { id }, el("summary", {}, title), children);
}
