// Requests and tokens of tenants, their keys and adapters.

import { ApiError, get } from "./api.js";
import { byId, setText, showProblem } from "./dom.js";
import { count, percent } from "./format.js";
import { Refreshing } from "./refresh.js";
import { cardBody, cardTable } from "./table.js";

const REFRESH_MS = 10000;
const MOST = 200; // rows shown at once
const HEADS = { tenant: "Tenant", key: "Key", adapter: "Adapter", hour: "Hour" };
const NAMES = { base: "base model", "+": "mix of adapters", "-": "adapters this key can't see" };
const FIGURES = [
  ["Requests", ({ requests }) => count(requests)],
  ["Failed", ({ failed }) => count(failed)],
  ["Prompt tokens", ({ prompt_tokens: tokens }) => count(tokens)],
  ["Found in the cache", ({ cached_tokens: tokens }) => count(tokens)],
  ["Completion tokens", ({ completion_tokens: tokens }) => count(tokens)],
  ["Share of tokens", (row, all) => percent(all ? tokensOf(row) / all : 0)],
];

const tokensOf = (row) => row.prompt_tokens + row.completion_tokens;

/** Set up the section; returns what tabs and keys call. */
export function setUpUsage() {
  const period = byId("usage-period");
  const group = byId("usage-group");

  const refresh = async () => {
    const hours = Number(period.value);
    const asked = { from: Math.floor(Date.now() / 1000) - hours * 3600, group: group.value };
    try {
      const report = await get(`v1/usage?${new URLSearchParams(asked)}`);
      if (asked.group === group.value && hours === Number(period.value)) show(report);
      showProblem(byId("usage-problem"), null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401 || error.status === 403) refreshing.stop(); // until another key
      byId("usage-table").replaceChildren();
      setText(byId("usage-sum"), "");
      showProblem(byId("usage-problem"), `The usage can't be shown. ${error.message}`);
    }
  };
  const refreshing = new Refreshing(refresh, REFRESH_MS);

  period.addEventListener("change", refresh);
  group.addEventListener("change", refresh);
  return {
    show: () => refreshing.start(),
    hide: () => refreshing.stop(),
    keyChanged: () => byId("usage").hidden || refreshing.start(),
  };
}

let drawn = null; // what the table was drawn from: it is drawn again only if it changed

function show({ group, data }) {
  const told = JSON.stringify([group, data]);
  if (told === drawn && byId("usage-table").hasChildNodes()) return;
  drawn = told;
  const all = data.reduce((total, row) => total + tokensOf(row), 0);
  const requests = data.reduce((total, row) => total + row.requests, 0);
  setText(byId("usage-sum"), data.length ? sumWords(requests, all, data.length) : EMPTY);
  const rows = data
    .toSorted((a, b) => (group.includes("hour") ? b.hour - a.hour : 0) || tokensOf(b) - tokensOf(a))
    .slice(0, MOST)
    .map((row) => [
      ...group.map((name) => nameIn(name, row)),
      ...FIGURES.map(([, figure]) => figure(row, all)),
    ]);
  const columns = [...group.map((name) => HEADS[name]), ...FIGURES.map(([name]) => name)];
  const table = cardTable("Usage", columns, cardBody(columns, rows));
  byId("usage-table").replaceChildren(...(data.length ? [table] : []));
}

const EMPTY =
  "Nothing is counted for this time. Usage is counted where the server asks for API keys.";

function sumWords(requests, tokens, rows) {
  const part = rows > MOST ? ` The ${count(MOST)} largest of ${count(rows)} rows are shown.` : "";
  return `${count(requests)} requests and ${count(tokens)} tokens in all.${part}`;
}

function nameIn(name, row) {
  if (name === "hour") return `${new Date(row.hour * 1000).toISOString().slice(0, 16)}Z`;
  return name === "adapter" ? (NAMES[row.adapter] ?? row.adapter) : row[name];
}
