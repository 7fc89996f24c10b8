// The names that a request's `model` may hold, grouped for a select.

import { get } from "./api.js";
import { el } from "./dom.js";

const GROUPS = [
  ["base", "Base model"],
  ["experiment", "Experiments"],
  ["alias", "Aliases"],
  ["adapter", "Adapters"],
  ["version", "Versions"],
];

/** The server's models, by group: [[label, [{id, kind}, …]], …]. */
export async function loadModels() {
  const { data } = await get("v1/models");
  const models = data.map((card) => ({ id: card.id, kind: card.quickchange.kind }));
  return withoutTwins(models);
}

/** Versions are told apart only where a name has several. */
function withoutTwins(models) {
  const versions = new Map();
  for (const { id, kind } of models) {
    if (kind === "version") versions.set(nameOf(id), (versions.get(nameOf(id)) ?? 0) + 1);
  }
  return models.filter(({ id, kind }) => kind !== "version" || versions.get(nameOf(id)) > 1);
}

const nameOf = (reference) => reference.slice(0, reference.lastIndexOf("@"));

/** Fill a select with the models, keeping what is chosen if it is still there. */
export function fillSelect(select, models, preferred) {
  const chosen = select.value || preferred;
  const groups = GROUPS.map(([kind, label]) => {
    const options = models.filter((model) => model.kind === kind).map(({ id }) => option(id, kind));
    return options.length ? el("optgroup", { label }, options) : null;
  });
  select.replaceChildren(...groups.filter((group) => group !== null));
  if (models.some(({ id }) => id === chosen)) select.value = chosen;
}

function option(id, kind) {
  return el("option", { value: id, "data-kind": kind }, id);
}
