// An experiment's result: warnings first, then decisions and intervals.

import { el } from "./dom.js";
import { count, number, pValue, percent } from "./format.js";
import { outcomePart } from "./outcome.js";

/** Draw the result in `place`; what was unfolded there stays so. */
export function showResult(place, experiment, result) {
  const open = new Set([...place.querySelectorAll("details[open]")].map((each) => each.id));
  const focused = place.contains(document.activeElement)
    ? document.activeElement.closest("details")?.id
    : undefined;
  place.replaceChildren(
    ...head(experiment, result),
    ratioPart(result.ratio),
    el("p", { class: "hint" }, rules(result)),
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

function outcomes({ outcomes: told }) {
  if (told.length) return told.map((each) => outcomePart(each, 3));
  return [el("p", {}, "No metrics are defined: only what the server measured is below.")];
}

function automatic({ automatic: measured }) {
  return (measured ?? []).map((each) => outcomePart(each, 3));
}

function units({ shares }, { ratio, requests }) {
  const names = Object.keys(ratio.expected);
  const head = ["Variant", "Share now", "Units", "Expected", "Requests"];
  const rows = names.map((name) => [
    percent(shares[name] ?? 0),
    count(ratio.observed[name] ?? 0),
    count(Math.round(ratio.expected[name])),
    count(sum(requests?.[name])),
  ]);
  return [
    el(
      "table",
      { class: "cards", role: "table", "aria-label": "Units by variant" },
      el(
        "thead",
        { role: "rowgroup" },
        el(
          "tr",
          { role: "row" },
          head.map((text) => columnHead(text)),
        ),
      ),
      el(
        "tbody",
        { role: "rowgroup" },
        rows.map((row, index) => unitsRow(names[index], row, head)),
      ),
    ),
  ];
}

const sum = (byEnding) => Object.values(byEnding ?? {}).reduce((total, each) => total + each, 0);
const columnHead = (text) => el("th", { scope: "col", role: "columnheader" }, text);

function unitsRow(name, row, head) {
  return el(
    "tr",
    { role: "row" },
    el("th", { scope: "row", role: "rowheader" }, name),
    row.map((text, index) => el("td", { role: "cell", "data-label": head[index + 1] }, text)),
  );
}

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
