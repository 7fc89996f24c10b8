// Asks before something is done: what will happen, what is needed for it, and what went wrong.

import { ApiError } from "./api.js";
import { el, showProblem } from "./dom.js";

/**
 * Show a dialog over the page. `words` and `fields`: elements or texts. `act(signal)` does it: the
 * dialog closes when it is done, and tells its refusal otherwise; Cancel gives it up.
 */
export function ask({ title, words, fields = [], button, danger = false, act }) {
  const heading = el("h2", { id: "ask-heading" }, title);
  const problem = el("p", { class: "problem", role: "alert", hidden: true });
  const go = el("button", { type: "submit", class: danger ? "danger" : "main" }, button);
  const cancel = el("button", { type: "button", class: "quiet" }, "Cancel");
  const form = el(
    "form",
    { method: "dialog" },
    heading,
    words,
    fields,
    problem,
    el("div", { class: "row" }, go, cancel),
  );
  const dialog = el("dialog", { class: "ask", "aria-labelledby": heading.id }, form);
  const controller = new AbortController();

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (go.disabled) return;
    go.disabled = true;
    showProblem(problem, null);
    try {
      await act(controller.signal);
      dialog.close();
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof ApiError)) throw error;
      showProblem(problem, error.message);
    } finally {
      go.disabled = false;
    }
  });
  cancel.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    controller.abort();
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
}
