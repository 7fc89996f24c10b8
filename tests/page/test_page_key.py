"""The API key: asked for, kept in the tab alone, sent, and refused in words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from http_support import Live, make_adapter
from keys_support import created, keyed_server
from page_support import Browser
from selenium.webdriver.common.keys import Keys

REFUSED = ["status of 401", "status of 403", "status of 429"]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with keyed_server(tmp_path_factory.mktemp("page-keys")) as live:
        live.store.add("acme/sql", make_adapter(1.0))
        live.store.add("other/sql", make_adapter(2.0))
        yield live


def give(browser: Browser, secret: str) -> None:
    """Type a key into the dialog that the page has opened."""
    browser.wait(lambda: browser.one("#key-dialog").is_displayed())
    assert browser.driver.switch_to.active_element.get_attribute("id") == "key"
    browser.keys(secret, Keys.ENTER)
    browser.wait(lambda: not browser.one("#key-dialog").is_displayed())


def test_the_page_itself_needs_no_key(keyed: Live) -> None:
    for path in ("/", "/page/main.js", "/page/theme.css"):
        assert keyed.http.get(path, headers={"Authorization": "none"}).status_code == 200


def test_a_key_is_asked_for_and_used_from_then_on(browser: Browser, keyed: Live) -> None:
    browser.tolerated = REFUSED
    _, secret = created(keyed, scope="infer", names=["acme/*"])
    browser.open(keyed.url)
    give(browser, secret)
    browser.choose("#pane-a select[data-field=model]", "acme/sql")
    assert "other/sql" not in browser.texts("#pane-a option")
    browser.send("Hello")
    browser.answered()
    assert browser.text("#pane-a .turn.model .said")


def test_a_wrong_key_is_told_and_asked_for_again(browser: Browser, keyed: Live) -> None:
    browser.tolerated = REFUSED
    browser.open(keyed.url)
    browser.wait(lambda: browser.one("#key-dialog").is_displayed())
    assert browser.text("#key-why").startswith("This server asks for an API key: ")
    browser.keys("nonsense", Keys.ENTER)
    browser.wait(lambda: browser.text("#key-why").startswith("This API key is not valid: "))
    assert browser.one("#key-dialog").is_displayed()
    assert browser.one("#key").get_property("value") == ""


def test_a_key_is_kept_for_the_tab_and_nowhere_else(browser: Browser, keyed: Live) -> None:
    browser.tolerated = REFUSED
    _, secret = created(keyed, scope="infer")
    browser.open(keyed.url)
    give(browser, secret)
    browser.wait(lambda: browser.all("#pane-a optgroup"))
    browser.driver.refresh()
    browser.wait(lambda: browser.all("#pane-a optgroup"))
    assert not browser.one("#key-dialog").is_displayed()
    kept = "return [localStorage.length, document.cookie, Object.values(sessionStorage).length]"
    assert browser.run(kept) == [0, "", 1]
    assert secret not in browser.driver.current_url
    browser.one("#key-button").click()
    browser.one("#key-forget").click()
    browser.wait(lambda: browser.text("#key-why").startswith("This server asks"))
    assert browser.run("return sessionStorage.length") == 0


@pytest.mark.parametrize("section", ["adapters", "experiments"])
def test_a_key_without_the_scope_is_told_in_words(
    browser: Browser, keyed: Live, section: str
) -> None:
    browser.tolerated = REFUSED
    _, secret = created(keyed, scope="infer")
    browser.open(keyed.url, f"#{section}")
    give(browser, secret)
    problem = f"#{section}-problem"
    browser.wait(lambda: "This is not allowed: " in browser.text(problem))
    assert "'manage'" in browser.text(problem)


def test_a_managing_key_sees_its_adapters_and_their_sums(browser: Browser, keyed: Live) -> None:
    browser.tolerated = REFUSED  # the metrics, which are for admins
    _, secret = created(keyed, scope="manage", names=["acme/*"])
    browser.open(keyed.url, "#adapters")
    give(browser, secret)
    browser.wait(lambda: browser.all("#tiers .tier"))
    assert browser.texts("#adapter-table tbody th") == ["acme/sql"]


def test_a_limit_of_the_key_is_told_with_when_to_come_back(browser: Browser, keyed: Live) -> None:
    browser.tolerated = REFUSED
    _, secret = created(keyed, scope="infer", limits={"requests_per_minute": 1})
    browser.open(keyed.url)
    give(browser, secret)
    browser.wait(lambda: browser.all("#pane-a optgroup"))
    browser.send("Hello")
    browser.answered()
    told = browser.text(".turn [role=alert]")  # one of the two panes got the minute's request
    assert "no room for this now" in told
    assert "Try again in" in told
