// The experiments, and one's result, kept current while it is looked at.

import { ApiError, get, nameInPath } from "./api.js";
import { byId, el, showProblem } from "./dom.js";
import { Refreshing } from "./refresh.js";
import { showResult } from "./result.js";
import { setAddress } from "./tabs.js";

const REFRESH_MS = 5000;

/** Set up the section; returns what tabs and keys call. */
export function setUpExperiments() {
  const list = byId("experiment-list");
  const place = byId("result");
  let chosen = null; // a name
  let shown = null; // what the result was drawn from, as text: it is drawn again only if it changed

  const showList = (experiments) => {
    const items = experiments.map((experiment) => item(experiment, experiment.id === chosen));
    const focused = document.activeElement?.dataset?.name;
    list.replaceChildren(...items);
    if (focused !== undefined)
      [...list.querySelectorAll("button")].find((b) => b.dataset.name === focused)?.focus();
  };

  const showChosen = async (experiments) => {
    const experiment = experiments.find(({ id }) => id === chosen);
    if (experiment === undefined) {
      shown = null;
      place.replaceChildren(el("p", { class: "hint" }, emptyWords(experiments, chosen)));
      return;
    }
    const result = await get(`v1/experiments/${nameInPath(chosen)}/results`);
    const drawn = JSON.stringify([experiment, result]);
    if (experiment.id !== chosen || drawn === shown) return; // another was chosen meanwhile
    shown = drawn;
    showResult(place, experiment, result);
  };

  let listed = null;
  const refresh = async () => {
    try {
      const experiments = (await get("v1/experiments")).data;
      if (chosen === null && experiments.length) chosen = experiments[0].id;
      const now = JSON.stringify([chosen, experiments.map(({ id, state }) => [id, state])]);
      if (now !== listed) showList(experiments);
      listed = now;
      await showChosen(experiments);
      showProblem(byId("experiments-problem"), null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401 || error.status === 403) refreshing.stop(); // until another key
      showProblem(byId("experiments-problem"), `The experiments can't be shown. ${error.message}`);
    }
  };
  const refreshing = new Refreshing(refresh, REFRESH_MS);

  return {
    show: (name) => {
      chosen = name ?? chosen;
      return refreshing.start();
    },
    hide: () => refreshing.stop(),
    keyChanged: () => byId("experiments").hidden || refreshing.start(),
  };
}

function emptyWords(experiments, chosen) {
  if (chosen !== null) return `There is no experiment ${chosen}.`;
  return experiments.length ? "" : "There are no experiments yet. POST /v1/experiments makes one.";
}

function item({ id, state }, current) {
  const button = el(
    "button",
    { type: "button", "data-name": id, "aria-current": current ? "true" : null },
    el("span", {}, id),
    el("span", { class: "badge", "data-state": state }, state),
  );
  button.addEventListener("click", () => setAddress("experiments", id));
  return el("li", {}, button);
}
