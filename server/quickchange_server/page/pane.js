// One of the two panes: what answers, how, and the conversation with it.

import { ApiError, stream } from "./api.js";
import { el, field } from "./dom.js";
import { AnswerTurn, promptTurn } from "./message.js";
import { fillSelect } from "./models.js";

const TURBO = ["auto", "lookup", "off"];
const NEAR_END = 40; // pixels from the end within which the log follows what comes

export class Pane {
  constructor(letter) {
    this.history = [];
    this.model = el("select", { "data-field": "model" });
    const turbo = TURBO.map((value) => el("option", { value }, value));
    this.turbo = el("select", { "data-field": "turbo" }, turbo);
    this.temperature = numberInput("temperature", { min: 0, max: 2, step: 0.1, value: 0 });
    this.maxTokens = numberInput("max_tokens", { min: 1, step: 1, value: 256, required: true });
    this.seed = numberInput("seed", { step: 1, value: 1, placeholder: "drawn" });
    this.user = el("input", { "data-field": "user", placeholder: "nobody", autocomplete: "off" });
    this.userField = field("User (sticks to a variant)", this.user);
    this.userField.hidden = true;
    this.model.addEventListener("change", () => this.showUser());
    this.log = el("div", {
      class: "log",
      role: "log",
      tabindex: 0,
      "aria-label": `Conversation ${letter}`,
    });
    this.element = this.assemble(letter);
  }

  assemble(letter) {
    const id = `pane-${letter.toLowerCase()}`;
    return el(
      "section",
      { class: "pane", id, "aria-labelledby": `${id}-heading` },
      el("h2", { id: `${id}-heading` }, `Pane ${letter}`),
      el("div", { class: "fields two" }, field("Model", this.model), field("Turbo", this.turbo)),
      el(
        "div",
        { class: "fields three" },
        field("Temperature", this.temperature),
        field("Max tokens", this.maxTokens),
        field("Seed", this.seed),
      ),
      this.userField,
      this.log,
    );
  }

  /** The names to choose from; `preferred` is chosen where nothing is yet. */
  offer(models, preferred) {
    fillSelect(this.model, models, preferred);
    this.showUser();
  }

  /** A user matters to experiments alone. */
  showUser() {
    this.userField.hidden = this.model.selectedOptions[0]?.dataset.kind !== "experiment";
  }

  /** Whether the fields hold what can be sent; the browser points at the first that doesn't. */
  ready() {
    const inputs = [this.temperature, this.maxTokens, this.seed];
    return this.model.value !== "" && inputs.every((input) => input.reportValidity());
  }

  clear() {
    this.history = [];
    this.log.replaceChildren();
  }

  /** Answer a prompt. Returns the text, or null where none came. */
  async answer(prompt, signal) {
    const turn = new AnswerTurn(this.model.value);
    const messages = [...this.history, { role: "user", content: prompt }];
    this.log.append(promptTurn(prompt), turn.element);
    this.log.setAttribute("aria-busy", "true");
    this.follow(true);
    try {
      for await (const event of stream("v1/chat/completions", this.body(messages), signal)) {
        const follows = this.atEnd();
        turn.take(event);
        this.follow(follows);
      }
    } catch (error) {
      if (error.name === "AbortError") turn.stopped();
      else if (error instanceof ApiError) turn.failed(error.message);
      else throw error;
    } finally {
      this.log.setAttribute("aria-busy", "false");
      this.follow(true);
    }
    if (turn.text === "") return null;
    this.history = [...messages, { role: "assistant", content: turn.text }];
    return turn.text;
  }

  body(messages) {
    const body = {
      model: this.model.value,
      messages,
      turbo: this.turbo.value,
      max_tokens: Number(this.maxTokens.value),
      stream: true,
      stream_options: { include_usage: true },
    };
    if (this.temperature.value !== "") body.temperature = Number(this.temperature.value);
    if (this.seed.value !== "") body.seed = Number(this.seed.value);
    const user = this.user.value.trim();
    if (!this.userField.hidden && user !== "") body.user = user;
    return body;
  }

  atEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR_END;
  }

  follow(follows) {
    if (follows) this.log.scrollTop = this.log.scrollHeight;
  }
}

function numberInput(name, attributes) {
  return el("input", { type: "number", "data-field": name, inputmode: "decimal", ...attributes });
}
