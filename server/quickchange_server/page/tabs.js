// The sections as tabs: arrow keys, Home and End move between them; the address keeps which.

import { byId } from "./dom.js";

/**
 * `sections`: by id, what is shown and left by `show(rest)` and `hide()`. The address's fragment is
 * a section's id, and what follows its first "/", decoded, is the section's own.
 */
export function setUpTabs(sections) {
  const ids = Object.keys(sections);
  let current = null;

  const select = (id, rest = null) => {
    if (current !== null && current !== id) sections[current].hide();
    current = id;
    for (const each of ids) {
      const chosen = each === id;
      const tab = byId(`tab-${each}`);
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      byId(each).hidden = !chosen;
    }
    sections[id].show(rest);
  };
  const fromAddress = () => {
    const [id, ...rest] = location.hash.slice(1).split("/");
    if (ids.includes(id)) select(id, rest.length ? decodeURIComponent(rest.join("/")) : null);
    else select(ids[0]);
  };

  ids.forEach((id) => {
    const tab = byId(`tab-${id}`);
    tab.addEventListener("click", () => setAddress(id));
    tab.addEventListener("keydown", (event) => {
      const there = ids.filter((each) => !byId(`tab-${each}`).hidden);
      const [at, last] = [there.indexOf(id), there.length - 1];
      const targets = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last };
      const target = targets[event.key];
      if (target === undefined) return;
      event.preventDefault();
      const next = there[(target + there.length) % there.length];
      setAddress(next);
      byId(`tab-${next}`).focus();
    });
  });
  addEventListener("hashchange", fromAddress);
  fromAddress();
}

/** Go to a section, and to what it calls `rest`. */
export function setAddress(id, rest = null) {
  location.hash = rest === null ? id : `${id}/${encodeURIComponent(rest)}`;
}
