// One outcome of an experiment: what is decided, the differences, and the variants' means.

import { el } from "./dom.js";
import { NONE, count, number, pValue, percent, probability } from "./format.js";
import { axis, intervalStrip, scaleOf } from "./intervals.js";

/** The outcome's part of the page. `level`: of its heading, 3 or 4. `state`: of the experiment. */
export function outcomePart(outcome, level, state) {
  const { name, label, goal, comparisons } = outcome;
  const title = label === null ? name : `${name} = ${label}`;
  const aim = goal === "increase" ? "more is better" : "less is better";
  return el(
    "section",
    { class: "outcome", "data-outcome": title },
    el(`h${level}`, {}, title, el("span", { class: "hint" }, ` ${kindWords(outcome)}, ${aim}`)),
    el(
      "ul",
      { class: "decisions" },
      comparisons.map((each) => decision(each, outcome, state)),
    ),
    differences(outcome, title),
    means(outcome, title),
  );
}

const kindWords = ({ kind }) => (kind === "number" ? "mean" : "share of units");

/** How the outcome's values read; a difference of shares is in points. */
function formats({ kind }) {
  if (kind === "number") return { value: number, difference: signed(number), unit: "" };
  const points = (value) => (value === null ? NONE : number(Math.round(value * 1e4) / 100));
  return { value: percent, difference: signed(points), unit: " points" };
}

const signed = (format) => (value) => `${value > 0 ? "+" : ""}${format(value)}`;

function range(interval, format, unit = "") {
  return interval === null ? NONE : `${format(interval[0])} to ${format(interval[1])}${unit}`;
}

const OPEN = "keep collecting";
const MOODS = { better: "better", worse: "worse" };

function decision(comparison, outcome, state) {
  const { variant, control, decision: now } = comparison;
  const decided = now === OPEN && state === "stopped" ? "left undecided" : now;
  const mood = MOODS[decided] ?? "open";
  return el(
    "li",
    {},
    el("strong", {}, variant),
    ` against ${control}: `,
    el("span", { class: "badge decision", "data-decision": mood }, decided),
    el("span", { class: "hint" }, ` ${sampleWords(comparison, outcome)}`),
  );
}

/** How far the minimum sample is. */
function sampleWords({ variant, control, enough, needed_units: needed, decision }, { variants }) {
  const both = variants.filter((each) => [variant, control].includes(each.variant));
  const least = Math.min(...both.map((each) => each.count));
  if (least < needed) {
    return `${count(least)} of the ${count(needed)} units needed of the smaller variant`;
  }
  if (!enough) return "too few units of one of its two values";
  const reached = `minimum sample of ${count(needed)} reached`;
  return decision === OPEN ? `${reached}, the interval holds 0` : reached;
}

function differences(outcome, title) {
  const { comparisons, margin } = outcome;
  const { difference, unit } = formats(outcome);
  const band = margin === null ? [] : [-margin, margin];
  const ends = comparisons.flatMap((each) => [each.difference, ...(each.interval ?? [])]);
  const scale = scaleOf(ends.some((end) => end !== null) ? [0, ...band, ...ends] : []);
  const rows = comparisons.map((each) => [
    each.variant,
    `${difference(each.difference)}${each.difference === null ? "" : unit}`,
    drawn(scale, {
      point: each.difference,
      interval: each.interval,
      zero: true,
      margin,
      mood: MOODS[each.decision] ?? null,
    }),
    range(each.interval, difference, unit),
    pValue(each.p_value),
  ]);
  const head = ["Variant", "Difference", scaled(scale, difference), "Interval", "p-value"];
  return table(`${title}: difference from ${comparisons[0]?.control ?? "the control"}`, head, rows);
}

function means(outcome, title) {
  const { variants } = outcome;
  const { value } = formats(outcome);
  const scale = scaleOf(variants.flatMap((each) => [each.mean, ...(each.interval ?? [])]));
  const rows = variants.map((each) => [
    each.variant,
    value(each.mean),
    drawn(scale, { point: each.mean, interval: each.interval }),
    range(each.interval, value),
    count(each.count),
    probability(each.probability_best),
  ]);
  const head = [
    "Variant",
    "Mean",
    scaled(scale, value),
    "Interval",
    "Units",
    "Probability of best",
  ];
  return table(`${title}: each variant`, head, rows);
}

const drawn = (scale, what) => (scale === null ? null : intervalStrip(scale, what));
const scaled = (scale, format) => (scale === null ? null : axis(scale, format));

/** A table whose third column is drawn; the figures beside it say the same. */
function table(caption, head, rows) {
  const cells = head.map((name, index) =>
    index === 2
      ? el("td", { role: "cell", class: "drawn" }, name)
      : el("th", { scope: "col", role: "columnheader" }, name),
  );
  return el(
    "table",
    { class: "cards intervals", role: "table" },
    el("caption", {}, caption),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, cells)),
    el(
      "tbody",
      { role: "rowgroup" },
      rows.map((row) => tableRow(row, head)),
    ),
  );
}

function tableRow([name, ...cells], head) {
  const shown = cells.map((cell, index) =>
    index === 1
      ? el("td", { role: "cell", class: "drawn" }, cell)
      : el("td", { role: "cell", "data-label": head[index + 1] }, cell),
  );
  return el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, name), shown);
}
