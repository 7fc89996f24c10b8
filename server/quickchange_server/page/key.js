// The dialog for the API key.

import { storedKey, storeKey, whenUnauthenticated } from "./api.js";
import { byId, setText } from "./dom.js";

/** Ask for a key when the server does. `changed` is called when another key is to be used. */
export function setUpKey(changed) {
  const dialog = byId("key-dialog");
  const input = byId("key");

  const open = (why) => {
    setText(byId("key-why"), why);
    byId("key-forget").hidden = storedKey() === null;
    if (dialog.open) return;
    input.value = "";
    dialog.showModal();
    input.focus();
  };
  const use = (key) => {
    storeKey(key);
    dialog.close();
    changed();
  };

  whenUnauthenticated(open);
  byId("key-button").addEventListener("click", () => {
    open(storedKey() === null ? "No key is kept." : "A key is kept.");
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (key) use(key);
    else setText(byId("key-why"), "The key is empty. Paste it, or cancel.");
  });
  byId("key-forget").addEventListener("click", () => use(null));
  byId("key-cancel").addEventListener("click", () => dialog.close());
}
