"""An experiment from its definition to its drawing, with nothing stubbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from http_support import BASE, Live
from page_support import Browser

USERS = 40


@pytest.fixture(scope="module")
def orders(live: Live) -> Iterator[dict[str, Any]]:
    """An experiment that each of some users has used, and half of them liked."""
    variants = [{"name": "now", "model": BASE}, {"name": "tuned", "model": "sql"}]
    metrics = [{"name": "accepted", "kind": "flag"}]
    body = {"name": "orders", "variants": variants, "metrics": metrics}
    response = live.post("/v1/experiments", body)
    assert response.status_code == 201, response.text
    for number in range(USERS):
        prompt = {"model": "orders", "user": f"user-{number}", "prompt": "Hello", "max_tokens": 1}
        answer = live.post("/v1/completions", prompt).json()
        told = {"completion": answer["id"], "name": "accepted", "value": number % 2 == 0}
        assert live.post("/v1/experiments/orders/outcomes", told).status_code == 201
    yield live.http.get("/v1/experiments/orders/results").json()
    live.http.delete("/v1/experiments/orders").raise_for_status()


def test_what_the_server_counted_is_what_the_page_shows(
    browser: Browser, live: Live, orders: dict[str, Any]
) -> None:
    browser.open(live.url, "#experiments")
    browser.wait(lambda: browser.all("#result .outcome"))
    means = "#result > .outcome table.intervals:last-child"
    variants = orders["outcomes"][0]["variants"]
    assert sum(each["count"] for each in variants) == USERS
    units = browser.texts(f"{means} td[data-label=Units]")
    assert units == [str(each["count"]) for each in variants]
    assert len(browser.all(f"{means} svg.interval .point")) == 2
    decision = browser.text("#result > .outcome .decisions")
    assert decision.startswith("tuned against now: keep collecting")
    assert "units needed of the smaller variant" in decision
    measured = browser.texts("#result-automatic h3")
    assert any(each.startswith("latency") for each in measured)


def test_a_chat_with_an_experiment_tells_the_variant_that_its_user_sticks_to(
    browser: Browser, live: Live, orders: dict[str, Any]
) -> None:
    assert orders["state"] == "running"
    browser.open(live.url)
    assert not browser.one("#pane-a [data-field=user]").is_displayed()
    for pane in ("#pane-a", "#pane-b"):
        browser.choose(f"{pane} select[data-field=model]", "orders")
        browser.fill(f"{pane} [data-field=user]", "ana")
        browser.fill(f"{pane} [data-field=max_tokens]", "8")
    browser.send("Hello")
    browser.answered()
    body = {"model": "orders", "user": "ana", "prompt": "Hello", "max_tokens": 1}
    variant = live.post("/v1/completions", body).json()["quickchange"]["variant"]
    for pane in ("#pane-a", "#pane-b"):
        names, values = (browser.texts(f"{pane} .figures {part}") for part in ("dt", "dd"))
        assert dict(zip(names, values, strict=True))["Variant"] == variant
    assert browser.text("#same") == "Same text in both panes"
