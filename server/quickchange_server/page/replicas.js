// The replicas of a cluster, kept current while they are looked at; a single machine has none.

import { ApiError, get } from "./api.js";
import { byId, el, setText, showProblem } from "./dom.js";
import { NONE, bytes, count, percent, seconds } from "./format.js";
import { Refreshing } from "./refresh.js";
import { cardTable } from "./table.js";

const REFRESH_MS = 2000;
const COLUMNS = [
  ["Replica", null],
  ["Kind", ({ kind }) => kind],
  ["Node", ({ node }) => (node.length > LONG ? `${node.slice(0, SHORT)}…` : node)],
  ["State", ({ state }) => state],
  ["Queue", ({ engine }) => count(engine.waiting)],
  ["Running", ({ engine }) => count(engine.running)],
  ["KV cache", ({ engine }) => percent(engine.kv_share)],
  ["Step", ({ engine }) => (engine.step_seconds ? seconds(engine.step_seconds) : NONE)],
  ["On device", ({ engine }) => adapters(engine.device)],
  ["On host", ({ engine }) => adapters(engine.host)],
];
const OF_ALL = 4; // columns that ingresses have too
const [LONG, SHORT] = [16, 8]; // characters of a node's id: most as it is, and of a longer one

let told = null;
let tell;
const first = new Promise((resolve) => (tell = resolve));

/** Take what the server's health says: is it part of a cluster? */
export function showCluster(is) {
  told = is;
  tell();
  byId("tab-replicas").hidden = !is;
}

/** True in a cluster, once the server's health has been heard of. */
export async function inCluster() {
  if (told === null) await first;
  return told;
}

/** Set up the section; returns what tabs and keys call. */
export function setUpReplicas() {
  const body = el("tbody", { role: "rowgroup" });
  const rows = new Map(); // by replica: kept over refreshes

  byId("replica-table").append(
    cardTable(
      "Replicas",
      COLUMNS.map(([name]) => name),
      body,
    ),
  );

  const refresh = async () => {
    try {
      const { data, engines } = await get("v1/cluster");
      place(body, rows, data);
      const ingresses = data.filter(({ kind }) => kind === "ingress").length;
      setText(
        byId("replicas-count"),
        `${count(engines.ready)} of ${count(engines.wanted)} engine replicas are ready, behind ` +
          `${count(ingresses)} ${ingresses === 1 ? "ingress" : "ingresses"}.`,
      );
      showProblem(byId("replicas-problem"), null);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if ([401, 403, 404].includes(error.status)) refreshing.stop(); // until another key
      showProblem(byId("replicas-problem"), `The replicas can't be shown. ${error.message}`);
    }
  };
  const refreshing = new Refreshing(refresh, REFRESH_MS);
  return {
    show: () => refreshing.start(),
    hide: () => refreshing.stop(),
    keyChanged: () => byId("replicas").hidden || refreshing.start(),
  };
}

/** Make the rows those of `replicas`, in their order. */
function place(body, rows, replicas) {
  const ids = new Set(replicas.map(({ id }) => id));
  for (const [id, row] of rows) {
    if (ids.has(id)) continue;
    row.element.remove();
    rows.delete(id);
  }
  replicas.forEach((replica, index) => {
    let row = rows.get(replica.id);
    if (row === undefined) {
      row = newRow(replica.id);
      rows.set(replica.id, row);
    }
    row.cells.forEach((cell, at) => {
      const [name, figure] = COLUMNS[at + 1];
      const has = at + 1 < OF_ALL || replica.engine !== null;
      setText(cell, has ? figure(replica) : NONE);
      if (name === "Node") cell.title = replica.node;
    });
    row.element.dataset.state = replica.state;
    if (body.children[index] !== row.element) body.insertBefore(row.element, body.children[index]);
  });
}

function newRow(id) {
  const cells = COLUMNS.slice(1).map(([name]) =>
    el("td", { role: "cell", "data-label": name }),
  );
  const heading = el("th", { scope: "row", role: "rowheader" }, id);
  return { cells, element: el("tr", { role: "row" }, heading, cells) };
}

function adapters({ adapters: versions, used_bytes: used, capacity_bytes: capacity }) {
  const share = capacity ? ` of ${bytes(capacity)}` : "";
  return versions ? `${count(versions)} (${bytes(used)}${share})` : "0";
}
