// Keeps a section current while it is looked at.

/** Calls `refresh` at once when started, and then every `ms` while the page is seen. */
export class Refreshing {
  constructor(refresh, ms) {
    this.refresh = refresh;
    this.ms = ms;
    this.timer = null;
  }

  start() {
    this.stop();
    this.timer = setInterval(() => document.hidden || this.refresh(), this.ms);
    return this.refresh();
  }

  stop() {
    clearInterval(this.timer);
  }
}
