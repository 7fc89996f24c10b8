// Puts the page together: its sections, the key, and the server's state.

import { setUpAdapters } from "./adapters.js";
import { setUpChat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { setUpExperiments } from "./experiments.js";
import { setUpKey } from "./key.js";
import { setUpReplicas, showCluster } from "./replicas.js";
import { setUpTabs } from "./tabs.js";
import { setUpUsage } from "./usage.js";

const STATE_MS = 5000;

const sections = {
  chat: setUpChat(),
  adapters: setUpAdapters(),
  experiments: setUpExperiments(),
  usage: setUpUsage(),
  replicas: setUpReplicas(),
};

async function showState() {
  if (document.hidden) return;
  let state = "no answer";
  let replicas = null;
  try {
    ({ state, replicas = null } = await (await fetch("health")).json());
    showCluster(replicas !== null);
  } catch {
    // The word says it; the next look may find the server again.
  }
  const place = byId("state");
  place.dataset.state = state;
  const engines = replicas === null ? "" : `, ${replicas.ready} of ${replicas.wanted} engines`;
  setText(place, `Server: ${state}${engines}`);
}

setUpKey(() => Object.values(sections).forEach((section) => section.keyChanged()));
setUpTabs(sections);
setInterval(showState, STATE_MS);
showState();
