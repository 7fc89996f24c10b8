// Intervals as drawings: strips that share one scale, one under the other in a table's column.
// Places are per cent of the strip's width, so that strokes and text keep their size on any screen.

import { svg } from "./dom.js";

const HEIGHT = 36; // pixels
const MARGIN = 4; // per cent of the width, left free at both ends
const STEPS = [1, 2, 2.5, 5, 10];
const TICKS = 6; // about so many

/** A scale over all finite `values`: {at(value), ticks}. Null where there are none. */
export function scaleOf(values) {
  const finite = values.filter((value) => value !== null && Number.isFinite(value));
  if (!finite.length) return null;
  let [low, high] = [Math.min(...finite), Math.max(...finite)];
  if (low === high) {
    const room = Math.abs(low) / 10 || 1;
    [low, high] = [low - room, high + room];
  }
  const width = 100 - 2 * MARGIN;
  const at = (value) => MARGIN + (width * (value - low)) / (high - low);
  return { at, ticks: ticksOf(low, high) };
}

/** Round numbers from `low` to `high`. */
function ticksOf(low, high) {
  const rough = (high - low) / TICKS;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * STEPS.find((each) => each * power >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high; n += 1) ticks.push(n * step);
  return ticks;
}

/** The scale's numbers, for the column's head. */
export function axis(scale, format) {
  const labels = scale.ticks.map((tick) =>
    svg("text", { x: `${scale.at(tick)}%`, y: 12, "text-anchor": "middle" }, format(tick)),
  );
  return strip("axis", 16, labels);
}

/**
 * One interval with its point. `zero`: a line at 0. `margin`: a band of what doesn't matter.
 * `mood`: "better", "worse" or null, which colours it. The cell beside it says the same in figures.
 */
export function intervalStrip(
  scale,
  { point, interval, zero = false, margin = null, mood = null },
) {
  const x = (value) => `${scale.at(value)}%`;
  const middle = HEIGHT / 2;
  const parts = scale.ticks.map((tick) =>
    svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 0, y2: HEIGHT }),
  );
  if (margin !== null) {
    const width = `${scale.at(margin) - scale.at(-margin)}%`;
    parts.push(svg("rect", { class: "margin", x: x(-margin), width, y: 0, height: HEIGHT }));
  }
  if (zero) parts.push(svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: HEIGHT }));
  if (interval !== null) {
    const [low, high] = interval;
    parts.push(svg("line", { class: "reach", x1: x(low), x2: x(high), y1: middle, y2: middle }));
    for (const end of interval) {
      parts.push(
        svg("line", { class: "reach", x1: x(end), x2: x(end), y1: middle - 5, y2: middle + 5 }),
      );
    }
  }
  if (point !== null) parts.push(svg("circle", { class: "point", cx: x(point), cy: middle, r: 5 }));
  return strip(`interval ${mood ?? ""}`.trim(), HEIGHT, parts);
}

function strip(kind, height, parts) {
  return svg("svg", { class: kind, width: "100%", height, "aria-hidden": "true" }, parts);
}
