"""The usage section: what tenants, keys and adapters asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from experiment_fixture import HOSTILE
from http_support import BASE, Live, make_adapter
from keys_support import created, keyed_server
from page_support import Browser, usage_answers, usage_row
from selenium.webdriver.common.keys import Keys

REFUSED = ["status of 401", "status of 403"]


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of two tenants: acme asked three times, other once."""
    with keyed_server(tmp_path_factory.mktemp("page-usage")) as live:
        live.store.add("acme/sql", make_adapter(1.0))
        for tenant, model, times in (
            ("acme", "acme/sql", 2),
            ("acme", BASE, 1),
            ("other", BASE, 1),
        ):
            _, secret = created(live, tenant=tenant, scope="infer", names=["acme/*", BASE])
            for _ in range(times):
                body = {"model": model, "prompt": "Hello", "max_tokens": 5}
                key = {"Authorization": f"Bearer {secret}"}
                live.http.post("/v1/completions", json=body, headers=key).raise_for_status()
        yield live


def opened(browser: Browser, live: Live, secret: str) -> None:
    browser.tolerated = REFUSED
    browser.open(live.url, "#usage")
    browser.wait(lambda: browser.one("#key-dialog").is_displayed())
    browser.keys(secret, Keys.ENTER)
    browser.wait(lambda: browser.all("#usage-table tbody tr"))


def shown(browser: Browser) -> list[str]:
    return browser.texts("#usage-table tbody th")


def test_an_admin_sees_every_tenants_usage_the_largest_first(browser: Browser, used: Live) -> None:
    _, secret = created(used, tenant="ops", scope="admin")
    opened(browser, used, secret)
    assert shown(browser) == ["acme", "other"]
    acme = browser.cells("#usage-table", "acme")
    assert (acme["Requests"], acme["Prompt tokens"], acme["Completion tokens"]) == ("3", "15", "15")
    assert acme["Share of tokens"] == "75 %"
    assert browser.text("#usage-sum") == "4 requests and 40 tokens in all."


def test_usage_is_shown_by_adapter_where_this_is_chosen(browser: Browser, used: Live) -> None:
    _, secret = created(used, tenant="ops", scope="admin")
    opened(browser, used, secret)
    browser.choose("#usage-group", "tenant,adapter")
    browser.wait(lambda: len(shown(browser)) == 3)
    assert shown(browser) == ["acme", "acme", "other"]
    adapters = browser.texts("#usage-table td[data-label=Adapter]")
    assert adapters == ["acme/sql", "base model", "base model"]


def test_another_key_sees_its_own_tenant_alone(browser: Browser, used: Live) -> None:
    _, secret = created(used, tenant="other", scope="infer")
    opened(browser, used, secret)
    assert shown(browser) == ["other"]


def test_a_server_without_keys_says_that_it_counts_nothing(browser: Browser, live: Live) -> None:
    browser.open(live.url, "#usage")
    browser.wait(lambda: browser.text("#usage-sum"))
    assert "where the server asks for API keys" in browser.text("#usage-sum")
    assert browser.all("#usage-table *") == []


def test_of_many_rows_the_largest_are_shown(browser: Browser, live: Live) -> None:
    many = (usage_row(1000 * number, tenant=f"tenant-{number}") for number in range(300))
    browser.stub(usage_answers(*many))
    browser.open(live.url, "#usage")
    browser.wait(lambda: browser.all("#usage-table tbody tr"))
    assert (len(shown(browser)), shown(browser)[0]) == (200, "tenant-299")
    assert "The 200 largest of 300 rows are shown." in browser.text("#usage-sum")


def test_markup_in_a_tenants_name_is_text(browser: Browser, live: Live) -> None:
    browser.stub(usage_answers(usage_row(1000, tenant=HOSTILE)))
    browser.open(live.url, "#usage")
    browser.wait(lambda: browser.all("#usage-table tbody tr"))
    assert shown(browser) == [HOSTILE]
    assert browser.all("#usage-table img") == []
