// The chat: one prompt for two panes, side by side.

import { ApiError } from "./api.js";
import { byId, setText, showProblem } from "./dom.js";
import { loadModels } from "./models.js";
import { Pane } from "./pane.js";
import { modelToShow, sampleFor } from "./samples.js";

/** Set up the section; returns what tabs and keys call. */
export function setUpChat() {
  const panes = [new Pane("A"), new Pane("B")];
  const prompt = byId("prompt");
  const [send, stop] = [byId("send"), byId("stop")];
  let running = null; // the AbortController of what is being answered
  let sample = ""; // what stands in the prompt until somebody types another

  byId("panes").append(...panes.map((pane) => pane.element));

  const setRunning = (controller) => {
    running = controller;
    const focused = document.activeElement;
    send.disabled = controller !== null;
    stop.disabled = controller === null;
    // A disabled button can't keep the focus.
    if (focused === send && send.disabled) stop.focus();
    if (focused === stop && stop.disabled) prompt.focus();
  };

  const offerSample = (model) => {
    if (prompt.value !== sample) return;
    sample = sampleFor(model);
    prompt.value = sample;
  };

  const ask = async () => {
    const text = prompt.value.trim();
    if (running !== null || !panes.every((pane) => pane.ready())) return;
    if (text === "") {
      prompt.focus();
      return;
    }
    const controller = new AbortController();
    setRunning(controller);
    setText(byId("same"), "");
    prompt.value = "";
    sample = null; // nothing is put there any more
    try {
      const texts = await Promise.all(panes.map((pane) => pane.answer(text, controller.signal)));
      if (texts.every((each) => each === null) && prompt.value === "") prompt.value = text;
      setText(byId("same"), compared(texts));
    } finally {
      setRunning(null);
    }
  };

  const showModels = async () => {
    try {
      const models = await loadModels();
      const base = models.find(({ kind }) => kind === "base").id;
      panes[0].offer(models, base);
      panes[1].offer(models, modelToShow(models));
      offerSample(panes[1].model.value);
      showProblem(byId("models-problem"), null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      showProblem(byId("models-problem"), `The models can't be listed. ${error.message}`);
    }
  };

  for (const { model } of panes) {
    model.addEventListener("change", () => offerSample(model.value));
  }
  byId("prompt-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      ask();
    }
  });
  stop.addEventListener("click", () => running?.abort());
  byId("fresh").addEventListener("click", () => {
    running?.abort();
    panes.forEach((pane) => pane.clear());
    setText(byId("same"), "");
    prompt.focus();
  });

  return { show: showModels, hide: () => {}, keyChanged: showModels };
}

/** What to say of the two texts. */
function compared([left, right]) {
  if (left === null || right === null) return "";
  if (left === right) return "Same text in both panes";
  let at = 0;
  while (left[at] === right[at]) at += 1;
  return `The texts differ from character ${at + 1} on`;
}
