"""The adapters section: tiers, and what is asked for by its buttons."""

from __future__ import annotations

from typing import Any

from experiment_fixture import HOSTILE
from http_support import Live
from page_support import Browser
from selenium.webdriver.common.keys import Keys


def cells(browser: Browser, name: str) -> dict[str, str]:
    """An adapter's row, by column."""
    return browser.cells("#adapter-table", name)


def press(browser: Browser, label: str) -> None:
    browser.one(f'button[aria-label="{label}"]').click()


def opened(browser: Browser, live: Live) -> None:
    browser.open(live.url, "#adapters")
    browser.wait(lambda: browser.all("#adapter-table tbody tr"))


def listed(name: str, tier: str = "disk") -> dict[str, Any]:
    residency = {"tier": tier, "bytes": 0 if tier == "disk" else 1000, "pinned": False}
    return {
        "id": name,
        "version": 1,
        "versions": [1],
        "aliases": [],
        "digest": name,
        "turbo": None,
        "residency": residency,
    }


def test_every_adapter_is_listed_with_version_tier_and_turbo(browser: Browser, live: Live) -> None:
    opened(browser, live)
    names = browser.texts("#adapter-table tbody th")
    assert names == ["fast", "sql also best", "team/json"]
    assert cells(browser, "sql")["Version"] == "2 of 2"
    assert cells(browser, "fast")["Turbo"] == "2 tokens ahead, parallel"
    assert cells(browser, "sql")["Turbo"] == "–"


def test_pinning_loads_an_adapter_and_the_row_says_so(browser: Browser, live: Live) -> None:
    opened(browser, live)
    press(browser, "Pin team/json")
    # A list that was asked for before the pin may come after it: the next one says so.
    browser.wait(lambda: cells(browser, "team/json")["Pinned"] == "yes")
    browser.wait(lambda: cells(browser, "team/json")["Tier"] == "device")
    assert cells(browser, "team/json")["Memory"] == "1000 B"
    residency = live.http.get("/v1/adapters/team/json").json()["residency"]
    assert residency["pinned"]
    press(browser, "Unpin team/json")
    browser.wait(lambda: cells(browser, "team/json")["Pinned"] == "no")
    assert "team/json: unpin" in browser.text("#adapters-done")


def test_prefetch_brings_an_adapter_to_the_device(browser: Browser, live: Live) -> None:
    live.services.client.forget(live.store.resolve("fast").digest)
    opened(browser, live)
    press(browser, "Prefetch fast")
    browser.wait(lambda: cells(browser, "fast")["Tier"] == "device")


def test_bars_show_what_the_metrics_say_of_each_tier(browser: Browser, live: Live) -> None:
    live.services.client.prefetch(live.store.resolve("sql").digest, "device")
    opened(browser, live)
    browser.wait(lambda: len(browser.all("#tiers meter")) == 2)
    browser.wait(lambda: browser.run("return document.querySelector('meter').value") >= 1000)
    device = browser.one("#tiers meter")
    assert device.get_property("max") == live.services.engine.adapter_device_bytes
    assert str(device.get_attribute("aria-label")).startswith("Device: ")


def test_the_list_is_kept_current_and_the_focus_stays(browser: Browser, live: Live) -> None:
    opened(browser, live)
    browser.run("document.querySelector('button[aria-label=\"Prefetch sql\"]').focus()")
    live.store.alias("newest", "sql")
    try:
        browser.wait(lambda: "newest" in browser.text("#adapter-table tbody th"))
    finally:
        live.store.unalias("newest")
    active = browser.driver.switch_to.active_element
    assert active.get_attribute("aria-label") == "Prefetch sql"


def test_a_filter_narrows_the_list(browser: Browser, live: Live) -> None:
    opened(browser, live)
    browser.one("#adapter-filter").send_keys("BES")  # an alias of sql
    assert browser.texts("#adapter-table tbody th") == ["sql also best"]
    assert browser.text("#adapters-count") == "1 of 3 adapters"
    browser.one("#adapter-filter").send_keys(Keys.BACKSPACE * 3)
    assert len(browser.all("#adapter-table tbody tr")) == 3


def test_of_thousands_a_part_is_shown_and_the_filter_finds_the_rest(
    browser: Browser, live: Live
) -> None:
    many = [listed(f"adapter-{number:04d}") for number in range(3000)]
    browser.stub({"/v1/adapters": [200, {"data": many}]})
    opened(browser, live)
    assert browser.text("#adapters-count") == "200 of 3,000 adapters"
    browser.one("#adapter-filter").send_keys("2999")
    assert browser.texts("#adapter-table tbody th") == ["adapter-2999"]


def test_markup_in_a_name_is_text(browser: Browser, live: Live) -> None:
    browser.stub({"/v1/adapters": [200, {"data": [listed(HOSTILE)]}]})
    opened(browser, live)
    assert browser.texts("#adapter-table tbody th") == [HOSTILE]
    assert browser.all("#adapter-table img") == []
    assert browser.run("return window.hurt ?? null") is None


def test_without_the_metrics_tiers_are_summed_from_the_list(browser: Browser, live: Live) -> None:
    refusal = {"error": {"message": "needs the scope admin"}}
    adapters = [listed("a", "device"), listed("b")]
    browser.stub({"/v1/adapters": [200, {"data": adapters}], "/metrics": [403, refusal]})
    opened(browser, live)
    browser.wait(lambda: browser.all("#tiers .tier"))
    assert browser.texts("#tiers .tier span")[0] == "1000 B, 1 version"
    assert browser.all("#tiers meter") == []
