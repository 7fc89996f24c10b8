// One turn of a conversation as it stands in a pane: who speaks, the text, and its figures.

import { el, setText } from "./dom.js";
import { count, number, percent, seconds } from "./format.js";

/** What somebody typed. */
export function promptTurn(text) {
  return el(
    "article",
    { class: "turn user" },
    el("h3", {}, "You"),
    el("p", { class: "said" }, text),
  );
}

/** An answer as it comes. Times are milliseconds of performance.now(). */
export class AnswerTurn {
  constructor(model) {
    this.text = "";
    this.sent = performance.now();
    this.first = null; // when its first text came, or its first thought's
    this.last = null;
    this.thought = null; // the text of its thoughts, where the model has any
    this.said = el("p", { class: "said" });
    this.said.append(document.createTextNode(""));
    this.figures = el("dl", { class: "figures" });
    const heading = el("h3", {}, model);
    this.element = el("article", { class: "turn model" }, heading, this.said, this.figures);
  }

  /** Take one event of the stream. */
  take(event) {
    const told = event.quickchange;
    if (told && !this.variant) {
      this.variant = told.variant;
      this.figure("Variant", told.variant);
    }
    for (const choice of event.choices) {
      if (choice.delta.reasoning) this.think(choice.delta.reasoning);
      if (choice.delta.content) this.add(choice.delta.content);
      if (choice.finish_reason) this.figure("Ended by", choice.finish_reason);
    }
    if (event.usage) this.count(event.usage);
  }

  /** Something came: a thought's text, or the answer's. */
  came() {
    this.last = performance.now();
    if (this.first !== null) return;
    this.first = this.last;
    this.figure("First token", seconds((this.first - this.sent) / 1000));
  }

  /** A piece of a thought, which stands folded above the answer. */
  think(piece) {
    this.came();
    if (this.thought === null) {
      this.thought = document.createTextNode("");
      const text = el("p", { class: "thought" }, this.thought);
      this.said.before(el("details", { class: "thoughts" }, el("summary", {}, "Thoughts"), text));
    }
    this.thought.appendData(piece);
  }

  add(piece) {
    this.came();
    this.text += piece;
    this.said.firstChild.appendData(piece);
  }

  count(usage) {
    const tokens = usage.completion_tokens;
    this.figure("Tokens", count(tokens));
    const span = (this.last - this.first) / 1000;
    if (tokens > 1 && span > 0) this.figure("Tokens/s", number((tokens - 1) / span));
    const details = usage.completion_tokens_details;
    if (!details) return;
    const accepted = details.accepted_prediction_tokens;
    const drafted = accepted + details.rejected_prediction_tokens;
    this.figure("Drafted", count(drafted));
    const share = drafted ? ` (${percent(accepted / drafted)})` : "";
    this.figure("Accepted", `${count(accepted)}${share}`);
  }

  figure(name, value) {
    this.figures.append(el("div", {}, el("dt", {}, name), el("dd", {}, value)));
  }

  /** It ended before its end. */
  stopped() {
    this.figure("Ended by", "Stop");
  }

  failed(words) {
    const problem = el("p", { class: "problem", role: "alert" });
    this.element.append(problem);
    setText(problem, words);
  }
}
