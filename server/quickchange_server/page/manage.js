// What changes the store: adding, aliases, rolling back, removing. Each asks first.

import { get, nameInPath, post, put, remove, upload } from "./api.js";
import { ask } from "./dialog.js";
import { el, field, setText } from "./dom.js";
import { count } from "./format.js";

const KEPT = /\.(json|safetensors)$/; // the server wants no more than the name of other files

/** `adapters()`: as they are listed now. `done(words)` is called after each change. */
export class Management {
  constructor(adapters, done) {
    this.adapters = adapters;
    this.done = done;
  }

  /** A new adapter, or a new version of one, out of files of this machine. */
  add() {
    const name = textInput({ "data-field": "name" });
    const files = el("input", { type: "file", multiple: true, required: true });
    const effect = el("p", { class: "hint", role: "status" });
    name.addEventListener("input", () => {
      const there = this.adapters().find(({ id }) => id === name.value.trim());
      setText(effect, there === undefined ? "" : newVersionWords(there));
    });
    ask({
      title: "Add an adapter",
      words: el(
        "p",
        {},
        "Choose all files of its folder: adapter_config.json and adapter_model.safetensors as PEFT " +
          "saves them, or those of Turbo heads.",
      ),
      fields: [field("Name", name), effect, field("Files", files)],
      button: "Upload",
      act: async (signal) => {
        const added = await upload("v1/adapters", uploadForm(name.value.trim(), files.files), signal);
        const told = [`${added.id}: version ${added.version} is served now.`, ...added.warnings];
        await this.done(told.join(" "));
      },
    });
  }

  /** A name that points at an adapter, new or moved here. */
  async alias(adapter) {
    const aliases = (await get("v1/aliases")).data;
    const name = textInput({ "data-field": "alias" });
    const whole = [adapter.id, `${adapter.id}, whichever version it serves`];
    const versions = adapter.versions.map((n) => [`${adapter.id}@${n}`, `version ${n} for good`]);
    const target = select("target", [whole, ...versions]);
    const drafting = this.adapters().filter(({ turbo }) => turbo !== null);
    const own = ["", "those of the adapter, if it has any"];
    const turbo = select("turbo", [own, ...drafting.map(({ id }) => [id, id])]);
    const effect = el("p", { class: "hint", role: "status" });
    name.addEventListener("input", () => {
      const there = aliases.find(({ id }) => id === name.value.trim());
      setText(effect, there === undefined ? "" : movedWords(there));
    });
    ask({
      title: `An alias of ${adapter.id}`,
      words: el("p", {}, "Requests may then name the alias. One that is there already moves at once."),
      fields: [
        field("Alias", name),
        effect,
        field("Points at", target),
        ...(drafting.length ? [field("Turbo heads that draft for it", turbo)] : []),
      ],
      button: "Point the alias",
      act: async (signal) => {
        const body = { target: target.value, ...(turbo.value && { turbo: turbo.value }) };
        const set = await put(`v1/aliases/${nameInPath(name.value.trim())}`, body, signal);
        await this.done(`${set.id} points at ${set.target} now.`);
      },
    });
  }

  /** Another version under an adapter's name, by default the one before. */
  rollBack({ id, version: current, versions }) {
    const others = versions.filter((each) => each !== current).reverse();
    const before = others.find((each) => each < current) ?? others[0];
    const version = select(
      "version",
      others.map((each) => [each, `version ${each}`]),
    );
    version.value = before;
    ask({
      title: `Roll back ${id}`,
      words: el(
        "p",
        {},
        `${id} serves version ${current}. Requests that name it, or an alias of it, get the chosen ` +
          "version from now on; those that run keep theirs. No version is lost.",
      ),
      fields: [field("Serve", version)],
      button: "Roll back",
      act: async (signal) => {
        const body = { version: Number(version.value) };
        const served = await post(`v1/adapters/${nameInPath(id)}/rollback`, body, signal);
        await this.done(`${id}: version ${served.version} is served now.`);
      },
    });
  }

  /** An adapter, one of its versions, or an alias, for good. */
  remove({ id, version: current, versions, aliases }) {
    const all = versions.length === 1 ? "its version" : `all ${count(versions.length)} versions`;
    const others = versions.filter((each) => each !== current);
    const what = select("what", [
      [`adapters/${nameInPath(id)}`, `${id} with ${all}`],
      ...others.map((each) => [`adapters/${nameInPath(`${id}@${each}`)}`, `version ${each} alone`]),
      ...aliases.map((each) => [`aliases/${nameInPath(each)}`, `the alias ${each} alone`]),
    ]);
    ask({
      title: `Remove ${id}`,
      words: el(
        "p",
        {},
        "Requests that name what is removed are refused from now on; those that run are answered. " +
          "This can't be undone.",
      ),
      fields: [field("Remove", what)],
      button: "Remove",
      danger: true,
      act: async (signal) => {
        const gone = await remove(`v1/${what.value}`, signal);
        await this.done(`${gone.id} is removed.`);
      },
    });
  }
}

function newVersionWords({ id, version, versions }) {
  const has = versions.length === 1 ? "one version" : `${count(versions.length)} versions`;
  return (
    `${id} is there, with ${has}, and serves version ${version}. What you upload becomes its newest ` +
    "version and is served in its place at once."
  );
}

function movedWords({ id, target, turbo }) {
  const heads = turbo === null ? "" : `, with the Turbo heads of ${turbo}`;
  return `${id} is there and points at ${target}${heads}. It will point here instead.`;
}

/** Each file in a field of its name; of those that the server keeps not, the name alone. */
function uploadForm(name, files) {
  const form = new FormData();
  form.append("name", name);
  for (const file of files) form.append(file.name, KEPT.test(file.name) ? file : new Blob(), file.name);
  return form;
}

function textInput(attributes) {
  return el("input", { required: true, autocomplete: "off", spellcheck: "false", ...attributes });
}

function select(name, options) {
  const made = options.map(([value, text]) => el("option", { value }, text));
  return el("select", { "data-field": name }, made);
}
