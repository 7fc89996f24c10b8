// Tables that narrow screens show as cards, a row each.
// Roles are said again, because that ends a table for some screen readers.

import { el } from "./dom.js";

/** An empty table over `body`. `columns`: its heads, the row's own first. */
export function cardTable(label, columns, body) {
  const cells = columns.map((name) => el("th", { scope: "col", role: "columnheader" }, name));
  const head = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, cells));
  return el("table", { class: "cards", role: "table", "aria-label": label }, head, body);
}

/** The body that `cardTable` takes, of `rows`: each as many texts as there are columns. */
export function cardBody(columns, rows) {
  return el(
    "tbody",
    { role: "rowgroup" },
    rows.map(([name, ...texts]) => {
      const cells = texts.map((text, index) =>
        el("td", { role: "cell", "data-label": columns[index + 1] }, text),
      );
      return el(
        "tr",
        { role: "row" },
        el("th", { scope: "row", role: "rowheader" }, name),
        cells,
      );
    }),
  );
}
