// Which adapter is on which tier, kept current while it is looked at.

import { ApiError, get, getText, nameInPath, post } from "./api.js";
import { byId, el, setText, showProblem } from "./dom.js";
import { NONE, bytes, count } from "./format.js";
import { Management } from "./manage.js";
import { Refreshing } from "./refresh.js";
import { inCluster } from "./replicas.js";
import { cardTable } from "./table.js";
import { showTiers, tiersOf, tiersOfAdapters, tiersOfReplicas } from "./tiers.js";

const REFRESH_MS = 3000;
const MOST = 200; // rows shown at once
const MOST_REPLICAS = 4; // named beside an adapter
const COLUMNS = ["Name", "Version", "Tier", "Memory", "Pinned", "Turbo", "Actions"];

/** Set up the section; returns what tabs and keys call. */
export function setUpAdapters() {
  const body = el("tbody", { role: "rowgroup" });
  const rows = new Map(); // by name: kept over refreshes, so that the focus stays
  const filter = byId("adapter-filter");
  const resident = byId("adapter-resident");
  let adapters = [];
  let asked = 0; // lists so far
  let withBudgets = true; // false: the key may not read them

  byId("adapter-table").append(cardTable("Adapters", COLUMNS, body));

  const showRows = () => {
    const wanted = filter.value.trim().toLowerCase();
    const matching = adapters.filter(
      ({ id, aliases, residency }) =>
        [id, ...aliases].some((name) => name.toLowerCase().includes(wanted)) &&
        (!resident.checked || residency.tier !== "disk"),
    );
    const shown = matching.slice(0, MOST);
    place(body, rows, shown, actions);
    const all = adapters.length;
    const part = shown.length < all ? `${count(shown.length)} of ${count(all)}` : count(all);
    setText(byId("adapters-count"), all ? `${part} adapters` : "The store has no adapters yet.");
  };

  const refresh = async () => {
    try {
      const turn = (asked += 1);
      const { data } = await get("v1/adapters");
      if (turn !== asked) return; // another was asked for since, and knows more
      adapters = data;
      showRows();
      showTiers(byId("tiers"), await loadTiers());
      showProblem(byId("adapters-problem"), null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401 || error.status === 403) refreshing.stop(); // until another key
      showProblem(byId("adapters-problem"), `The adapters can't be shown. ${error.message}`);
    }
  };

  /** With the budgets, of all replicas or this machine; where they are refused, from the list. */
  async function loadTiers() {
    if (!withBudgets) return tiersOfAdapters(adapters);
    try {
      if (await inCluster()) return tiersOfReplicas((await get("v1/cluster")).data);
      return tiersOf(await getText("metrics"));
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 403) throw error;
      withBudgets = false;
      return tiersOfAdapters(adapters);
    }
  }

  /** Run what a button stands for, and tell what it says or why it was refused. */
  async function act(name, action) {
    try {
      setText(byId("adapters-done"), (await action()) ?? "");
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setText(byId("adapters-done"), `${name}: ${error.message}`);
    }
    await refresh();
  }

  const refreshing = new Refreshing(refresh, REFRESH_MS);
  const management = new Management(
    () => adapters,
    async (words) => {
      setText(byId("adapters-done"), words);
      await refresh();
    },
  );
  const actions = { management, act };

  filter.addEventListener("input", showRows);
  resident.addEventListener("change", showRows);
  byId("adapter-add").addEventListener("click", () => management.add());
  return {
    show: () => refreshing.start(),
    hide: () => refreshing.stop(),
    keyChanged: () => {
      withBudgets = true;
      if (!byId("adapters").hidden) refreshing.start();
    },
  };
}

/** Make the rows those of `shown`, moving none that stay. */
function place(body, rows, shown, actions) {
  const names = new Set(shown.map(({ id }) => id));
  for (const [name, row] of rows) {
    if (names.has(name)) continue;
    row.element.remove();
    rows.delete(name);
  }
  shown.forEach((adapter, index) => {
    let row = rows.get(adapter.id);
    if (row === undefined) {
      row = new Row(adapter.id, actions);
      rows.set(adapter.id, row);
    }
    row.update(adapter);
    if (body.children[index] !== row.element) body.insertBefore(row.element, body.children[index]);
  });
}

class Row {
  constructor(name, { management, act }) {
    this.aliases = el("span", { class: "hint" });
    this.cells = Object.fromEntries(
      COLUMNS.slice(1, -1).map((column) => [
        column,
        el("td", { role: "cell", "data-label": column }),
      ]),
    );
    this.tier = el("span");
    this.replicas = el("span", { class: "hint" });
    this.cells.Tier.append(this.tier, this.replicas);
    const button = (word, action) => {
      const made = el("button", { type: "button", "aria-label": `${word} ${name}` }, word);
      made.addEventListener("click", () => act(name, action));
      return made;
    };
    const ask = async (what) => {
      await post(`v1/adapters/${nameInPath(name)}/${what}`);
      return `${name}: ${what} was asked for.`;
    };
    this.pin = button("Pin", () => ask(this.adapter.residency.pinned ? "unpin" : "pin"));
    this.rollBack = button("Roll back", () => management.rollBack(this.adapter));
    const buttons = [
      this.pin,
      button("Prefetch", () => ask("prefetch")),
      button("Alias", () => management.alias(this.adapter)),
      this.rollBack,
      button("Remove", () => management.remove(this.adapter)),
    ];
    this.element = el(
      "tr",
      { role: "row" },
      el("th", { scope: "row", role: "rowheader" }, name, this.aliases),
      Object.values(this.cells),
      el("td", { role: "cell", "data-label": "Actions" }, el("div", { class: "actions" }, buttons)),
    );
    this.name = name;
  }

  update(adapter) {
    const { version, versions, aliases, residency, turbo } = adapter;
    this.adapter = adapter;
    this.rollBack.disabled = versions.length === 1;
    setText(this.aliases, aliases.length ? ` also ${aliases.join(", ")}` : "");
    const others = versions.length - 1;
    const kept = others ? ` (${count(others)} ${others === 1 ? "other" : "others"})` : "";
    setText(this.cells.Version, `${version}${kept}`);
    setText(this.tier, residency.tier);
    setText(this.replicas, replicasText(residency.replicas ?? {}));
    this.cells.Tier.dataset.tier = residency.tier;
    setText(this.cells.Memory, residency.bytes ? bytes(residency.bytes) : NONE);
    setText(this.cells.Pinned, residency.pinned ? "yes" : "no");
    setText(this.cells.Turbo, turbo === null ? NONE : turboText(turbo));
    setText(this.pin, residency.pinned ? "Unpin" : "Pin");
    this.pin.setAttribute("aria-label", `${residency.pinned ? "Unpin" : "Pin"} ${this.name}`);
  }
}

/** Where an adapter is in memory: " engine-1: device, engine-2: host", some at most. */
function replicasText(replicas) {
  const told = Object.entries(replicas).map(([replica, tier]) => `${replica}: ${tier}`);
  if (told.length === 0) return "";
  const more = told.length > MOST_REPLICAS ? ` and ${count(told.length - MOST_REPLICAS)} more` : "";
  return ` ${told.slice(0, MOST_REPLICAS).join(", ")}${more}`;
}

function turboText({ depth, sequential }) {
  return `${depth} ${depth === 1 ? "token" : "tokens"} ahead, ${sequential ? "sequential" : "parallel"}`;
}
