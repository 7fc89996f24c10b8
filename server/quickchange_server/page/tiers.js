// How full each tier of adapter memory is.

import { el } from "./dom.js";
import { bytes, count, percent } from "./format.js";

const TIERS = [
  ["device", "Device"],
  ["host", "Host"],
];
const SAMPLE =
  /^quickchange_tier_(adapters|used_bytes|capacity_bytes)\{tier="(device|host)"\} (\S+)$/gm;
const FIGURES = ["adapters", "used_bytes", "capacity_bytes"];

/** By tier {adapters, used_bytes, capacity_bytes}, of all replicas of a cluster together. */
export function tiersOfReplicas(replicas) {
  const tiers = {};
  for (const [tier] of TIERS) {
    const there = replicas.filter(({ engine }) => engine !== null).map(({ engine }) => engine[tier]);
    const sum = (figure) => there.reduce((total, each) => total + each[figure], 0);
    tiers[tier] = Object.fromEntries(FIGURES.map((figure) => [figure, sum(figure)]));
  }
  return tiers;
}

/** The same of a single machine, out of its metrics' text. */
export function tiersOf(metrics) {
  const tiers = {};
  for (const [, what, tier, value] of metrics.matchAll(SAMPLE)) {
    tiers[tier] = { ...tiers[tier], [what]: Number(value) };
  }
  return tiers;
}

/** The same without budgets, of the versions that names serve now. */
export function tiersOfAdapters(adapters) {
  const tiers = {};
  for (const [tier] of TIERS) {
    const there = adapters.filter(({ residency }) => residency.tier === tier);
    const used = new Map(there.map(({ digest, residency }) => [digest, residency.bytes]));
    const sum = [...used.values()].reduce((total, size) => total + size, 0);
    tiers[tier] = { adapters: used.size, used_bytes: sum };
  }
  return tiers;
}

/** Show the tiers in `place`. */
export function showTiers(place, tiers) {
  const shown = TIERS.filter(([tier]) => tiers[tier]).map(([tier, label]) =>
    bar(label, tiers[tier]),
  );
  place.replaceChildren(...shown);
}

function bar(label, tier) {
  const { adapters, used_bytes: used, capacity_bytes: capacity } = tier;
  const versions = `${count(adapters)} ${adapters === 1 ? "version" : "versions"}`;
  const heading = el("strong", {}, label);
  if (!capacity) {
    return el("div", { class: "tier" }, heading, el("span", {}, `${bytes(used)}, ${versions}`));
  }
  const told = `${bytes(used)} of ${bytes(capacity)} (${percent(used / capacity)}), ${versions}`;
  const meter = el("meter", {
    min: 0,
    max: capacity,
    value: used,
    "aria-label": `${label}: ${told}`,
  });
  return el("div", { class: "tier" }, heading, el("span", {}, told), meter);
}
