"""A page of another origin in the same browser: unless allowed, it changes and reads nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from http_support import BASE, Live, live_server, make_adapter
from page_support import POINTED_HERE, Browser
from selenium.webdriver.common.by import By

# What the page can do without asking first, and what it must ask for.
ATTACK = """
const [url, done] = arguments;
const tried = async (path, options) => {
  try {
    const answer = await fetch(url + path, options);
    return `${answer.type} ${answer.status}`;
  } catch (error) { return "failed"; }
};
(async () => done({
  read: await tried("/v1/models", {}),
  rolled: await tried("/v1/adapters/sql/rollback", {method: "POST", mode: "no-cors"}),
  text: await tried("/v1/adapters/sql/rollback", {
    method: "POST", mode: "no-cors", body: "{}", headers: {"Content-Type": "text/plain"}}),
  json: await tried("/v1/completions", {
    method: "POST", body: JSON.stringify({model: "%s", prompt: "Hi", max_tokens: 1}),
    headers: {"Content-Type": "application/json", Authorization: "Bearer x"}}),
  removed: await tried("/v1/adapters/sql@1", {method: "DELETE"}),
}))();
"""
FORM = """
const form = document.createElement("form");
form.method = "post"; form.enctype = "multipart/form-data"; form.action = arguments[0];
document.body.append(form); form.submit();
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a page on another port."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "index.html").write_text("<!doctype html><title>Elsewhere</title><body>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def with_versions(store: Path, **settings: Any) -> Iterator[Live]:
    with live_server(store, **settings) as live:
        live.store.add("sql", make_adapter(1.0))
        live.store.add("sql", make_adapter(2.0))
        yield live


def current(live: Live) -> int:
    return live.store.snapshot().entries["sql"].current


def attack(browser: Browser, elsewhere: str, live: Live) -> dict[str, str]:
    browser.reset()
    browser.driver.get(elsewhere)
    found: dict[str, str] = browser.driver.execute_async_script(ATTACK % BASE, live.url)
    return found


def test_a_page_elsewhere_changes_and_reads_nothing(
    chromium: Browser, elsewhere: str, tmp_path: Path
) -> None:
    with with_versions(tmp_path) as live:
        found = attack(chromium, elsewhere, live)
        assert {found["read"], found["json"], found["removed"]} == {"failed"}
        assert {found["rolled"], found["text"]} == {"opaque 0"}  # sent, and refused
        assert current(live) == 2
        assert sorted(live.store.snapshot().entries["sql"].versions) == [1, 2]


def test_a_form_elsewhere_changes_nothing(
    chromium: Browser, elsewhere: str, tmp_path: Path
) -> None:
    with with_versions(tmp_path) as live:
        chromium.reset()
        chromium.driver.get(elsewhere)
        chromium.run(FORM, f"{live.url}/v1/adapters/sql/rollback")
        chromium.wait(lambda: "allowed_origin" in chromium.driver.page_source)
        assert current(live) == 2


def test_a_page_of_an_allowed_origin_reads_and_writes(
    chromium: Browser, elsewhere: str, tmp_path: Path
) -> None:
    with with_versions(tmp_path, allowed_origin=elsewhere) as live:
        found = attack(chromium, elsewhere, live)
        assert {found["read"], found["json"]} == {"cors 200"}
        assert current(live) == 1


def test_a_name_that_was_pointed_here_gets_no_page(chromium: Browser, tmp_path: Path) -> None:
    with with_versions(tmp_path) as live:
        port = live.url.rpartition(":")[2]
        chromium.reset()
        chromium.driver.get(f"http://{POINTED_HERE}:{port}/v1/models")
        said = chromium.driver.find_element(By.TAG_NAME, "body").text
        assert "allowed_host" in said
        assert BASE not in said
