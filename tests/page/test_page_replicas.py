"""The replicas of a cluster: a section that a single machine does not have."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cluster_support import FakeCluster, Replica, cluster_answers
from experiment_fixture import HOSTILE
from http_support import Live, live_server, make_adapter
from page_support import Browser
from selenium.webdriver.common.keys import Keys

from quickchange_store.store import Store

HEADS = ["Kind", "Node", "State", "Queue", "Running", "KV cache", "Step", "On device", "On host"]


@pytest.fixture(scope="module")
def cluster() -> FakeCluster:
    starting = Replica("engine-c", state="starting")
    return FakeCluster(
        Replica("engine-a"),
        Replica("engine-b"),
        starting,
        Replica("ingress-2", "ingress"),
        wanted=3,
    )


@pytest.fixture(scope="module")
def ingress(cluster: FakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("ingress")
    for number, name in enumerate(("orders", "tickets")):
        digest = Store(folder).add(name, make_adapter(1.0 + number)).digest
        for replica in cluster.replicas[: number + 1]:
            replica.hold(digest, name, 700)
    with live_server(folder, cluster=cluster.seen) as live:
        yield live


def opened(browser: Browser, ingress: Live, section: str = "replicas") -> None:
    browser.open(ingress.url, f"#{section}")
    browser.wait(lambda: browser.all("#replica-table tbody tr") or section != "replicas")


def row(browser: Browser, name: str) -> dict[str, str]:
    """A replica's figures, by column."""
    return browser.cells("#replica-table", name)


def tier(browser: Browser, name: str) -> str:
    """Where an adapter is."""
    return browser.cells("#adapter-table", name)["Tier"]


def test_every_replica_is_shown_with_its_figures(browser: Browser, ingress: Live) -> None:
    opened(browser, ingress)
    names = browser.texts("#replica-table tbody th")
    assert names == ["engine-a", "engine-b", "engine-c", "ingress-2"]
    figures = [
        "engine",
        "node-1",
        "ready",
        "2",
        "8",
        "31.3 %",
        "20 ms",
        "1 (700 B of 9.8 KiB)",
        "0",
    ]
    assert row(browser, "engine-b") == dict(zip(HEADS, figures, strict=True))
    assert row(browser, "engine-c")["State"] == "starting"
    assert browser.text("#replicas-count") == (
        "2 of 3 engine replicas are ready, behind 1 ingress."
    )


def test_a_long_id_of_a_node_is_shortened_and_told_on_hovering(
    browser: Browser, live: Live
) -> None:
    told = cluster_answers("engine-1")
    told["/v1/cluster"][1]["data"][0]["node"] = "7f" * 28
    browser.stub(told)
    browser.open(live.url, "#replicas")
    browser.wait(lambda: browser.all("#replica-table tbody tr"))
    assert row(browser, "engine-1")["Node"] == "7f7f7f7f…"
    node = browser.one('#replica-table td[data-label="Node"]')
    assert node.get_attribute("title") == "7f" * 28


def test_an_ingress_has_no_engines_figures(browser: Browser, ingress: Live) -> None:
    opened(browser, ingress)
    told = row(browser, "ingress-2")
    assert {told[head] for head in HEADS[3:]} == {"–"}


def test_the_section_is_kept_current(browser: Browser, ingress: Live, cluster: FakeCluster) -> None:
    opened(browser, ingress)
    gone = cluster.replicas.pop(0)
    try:
        browser.wait(lambda: browser.texts("#replica-table tbody th")[0] == "engine-b")
    finally:
        cluster.replicas.insert(0, gone)
    browser.wait(lambda: browser.texts("#replica-table tbody th")[0] == "engine-a")


def test_the_state_counts_the_engines_and_leads_to_the_section(
    browser: Browser, ingress: Live
) -> None:
    opened(browser, ingress, "chat")
    browser.wait(lambda: browser.text("#state") == "Server: ready, 2 of 3 engines")
    browser.one("#tab-chat").send_keys(Keys.END)
    assert browser.one("#replicas").is_displayed()


def test_a_single_machine_has_no_such_section(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.wait(lambda: browser.text("#state") == "Server: ready")
    assert not browser.one("#tab-replicas").is_displayed()


def test_who_asks_a_single_machine_for_the_section_is_told(browser: Browser, live: Live) -> None:
    browser.tolerated = ["404"]
    browser.open(live.url, "#replicas")
    browser.wait(lambda: browser.one("#replicas-problem").is_displayed())
    assert "single machine" in browser.text("#replicas-problem")


def test_an_adapter_is_shown_with_its_tier_on_each_replica(browser: Browser, ingress: Live) -> None:
    opened(browser, ingress, "adapters")
    browser.wait(lambda: browser.all("#adapter-table tbody tr"))
    assert tier(browser, "tickets").endswith(" engine-a: device, engine-b: device")
    assert tier(browser, "orders").endswith(" engine-a: device")


def test_of_many_replicas_that_have_an_adapter_some_are_named(
    browser: Browser, ingress: Live
) -> None:
    there = ingress.http.get("/v1/adapters").json()
    there["data"][0]["residency"]["replicas"] = {f"engine-{n}": "host" for n in range(12)}
    browser.stub({"/v1/adapters": [200, there]})
    opened(browser, ingress, "adapters")
    browser.wait(lambda: browser.all("#adapter-table tbody tr"))
    assert tier(browser, "orders").endswith("engine-3: host and 8 more")


def test_tiers_are_those_of_all_replicas_together(browser: Browser, ingress: Live) -> None:
    opened(browser, ingress, "adapters")
    browser.wait(lambda: len(browser.all("#tiers meter")) == 2)
    assert browser.texts("#tiers .tier span") == [
        "2.1 KiB of 29.3 KiB (7 %), 3 versions",
        "0 B of 58.6 KiB (0 %), 0 versions",
    ]


def test_a_key_that_may_not_see_replicas_is_told_so(browser: Browser, ingress: Live) -> None:
    refusal = {"error": {"message": "needs the scope admin"}}
    browser.stub({"/v1/cluster": [403, refusal]})
    browser.open(ingress.url, "#replicas")
    browser.wait(lambda: browser.one("#replicas-problem").is_displayed())
    assert "needs the scope admin" in browser.text("#replicas-problem")


def test_markup_in_a_replicas_name_is_text(browser: Browser, live: Live) -> None:
    told = json.loads(json.dumps(cluster_answers(HOSTILE)))
    browser.stub(told)
    browser.open(live.url, "#replicas")
    browser.wait(lambda: browser.all("#replica-table tbody tr"))
    assert browser.texts("#replica-table tbody th")[0] == HOSTILE
    assert browser.all("#replica-table img") == []
