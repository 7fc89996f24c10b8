"""The adapters section: tiers, and what is asked for by its buttons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from experiment_fixture import HOSTILE
from http_support import (
    LIMIT_SECONDS,
    Live,
    live_server,
    make_adapter,
    make_turbo,
    write_medusa,
    write_peft,
)
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
    assert cells(browser, "sql")["Version"] == "2 (1 other)"
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


# --- what changes the store ---------------------------------------------------------------------


@pytest.fixture
def own(browser: Browser, tmp_path: Path) -> Iterator[Live]:
    """A server to change: `sql` with three versions, `fast` with Turbo, and the alias `best`."""
    with live_server(tmp_path / "store") as live:
        for value in (1.0, 2.0, 3.0):
            live.store.add("sql", make_adapter(value))
        live.store.add("fast", make_turbo(4.0, lora=True))
        live.store.alias("best", "sql@1")
        yield live
        browser.leave()


def done(browser: Browser, told: str) -> None:
    """Wait until the open dialog has done its work, which the page then tells."""
    # A process's first upload imports what reads adapters: long on a busy machine.
    browser.wait(lambda: browser.text("#adapters-done") == told, LIMIT_SECONDS)
    browser.wait(lambda: browser.all("dialog.ask") == [])


def submit(browser: Browser) -> None:
    browser.one("dialog.ask [type=submit]").click()


def refused(browser: Browser) -> str:
    """What the dialog says of a refusal."""
    browser.wait(lambda: browser.one("dialog.ask [role=alert]").is_displayed(), LIMIT_SECONDS)
    return browser.text("dialog.ask [role=alert]")


def field(browser: Browser, name: str, value: str) -> None:
    browser.one(f"dialog.ask input[data-field={name}]").send_keys(value)


def upload(browser: Browser, name: str, folder: Path) -> None:
    browser.one("#adapter-add").click()
    field(browser, "name", name)
    files = "\n".join(str(path) for path in sorted(folder.iterdir()))
    browser.one("dialog.ask input[type=file]").send_keys(files)
    submit(browser)


def test_an_adapter_is_uploaded_and_served(browser: Browser, own: Live, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "mine", 7.0)
    (folder / "optimizer.pt").write_bytes(b"x" * 100_000)  # nothing that the server wants
    opened(browser, own)
    upload(browser, "team/mine", folder)
    done(browser, "team/mine: version 1 is served now.")
    browser.wait(lambda: "team/mine" in browser.texts("#adapter-table tbody th"))
    body = {"model": "team/mine", "prompt": "Hello", "max_tokens": 1}
    assert own.post("/v1/completions", body).status_code == 200


def test_turbo_heads_are_uploaded_as_well(browser: Browser, own: Live, tmp_path: Path) -> None:
    opened(browser, own)
    upload(browser, "heads", write_medusa(tmp_path / "heads"))
    done(browser, "heads: version 1 is served now.")
    browser.wait(lambda: "heads" in browser.texts("#adapter-table tbody th"))
    assert cells(browser, "heads")["Turbo"] == "2 tokens ahead, parallel"


def test_who_uploads_under_a_name_that_is_there_is_told_before(
    browser: Browser, own: Live, tmp_path: Path
) -> None:
    opened(browser, own)
    browser.one("#adapter-add").click()
    field(browser, "name", "sql")
    assert "3 versions, and serves version 3" in browser.text("dialog.ask [role=status]")
    browser.keys(Keys.ESCAPE)
    assert browser.all("dialog.ask") == []
    upload(browser, "sql", write_peft(tmp_path / "mine", 7.0))
    done(browser, "sql: version 4 is served now.")


def test_a_refused_upload_says_why_and_keeps_what_was_given(
    browser: Browser, own: Live, tmp_path: Path
) -> None:
    browser.tolerated = ["status of 400"]
    folder = write_peft(tmp_path / "mine")
    (folder / "adapter_model.safetensors").unlink()
    opened(browser, own)
    upload(browser, "mine", folder)
    assert "adapter_model.safetensors" in refused(browser)
    assert browser.one("dialog.ask input[data-field=name]").get_property("value") == "mine"
    browser.wait(lambda: browser.texts("#adapter-table tbody th") == ["fast", "sql also best"])


def test_an_upload_without_files_is_not_sent(browser: Browser, own: Live) -> None:
    opened(browser, own)
    browser.one("#adapter-add").click()
    field(browser, "name", "mine")
    submit(browser)
    assert browser.run("return document.querySelector('dialog.ask :invalid') !== null")
    assert browser.all("dialog.ask form:invalid") != []


def test_an_alias_is_made_for_a_version_with_turbo_heads(browser: Browser, own: Live) -> None:
    opened(browser, own)
    press(browser, "Alias sql")
    browser.wait(lambda: browser.all("dialog.ask"))
    field(browser, "alias", "prod")
    browser.choose("dialog.ask select[data-field=target]", "sql@2")
    browser.choose("dialog.ask select[data-field=turbo]", "fast")
    submit(browser)
    done(browser, "prod points at sql@2 now.")
    browser.wait(
        lambda: browser.texts("#adapter-table tbody th") == ["fast", "sql also best, prod"]
    )
    aliases = {each["id"]: each for each in own.http.get("/v1/aliases").json()["data"]}
    assert (aliases["prod"]["target"], aliases["prod"]["turbo"]) == ("sql@2", "fast")


def test_who_moves_an_alias_is_told_where_it_points(browser: Browser, own: Live) -> None:
    opened(browser, own)
    press(browser, "Alias fast")
    browser.wait(lambda: browser.all("dialog.ask"))
    field(browser, "alias", "best")
    assert "best is there and points at sql@1" in browser.text("dialog.ask [role=status]")
    submit(browser)
    done(browser, "best points at fast now.")


@pytest.mark.parametrize(("name", "words"), [("a b", "is not a valid"), ("sql", "sql")])
def test_an_alias_that_can_not_be_is_refused_in_words(
    browser: Browser, own: Live, name: str, words: str
) -> None:
    browser.tolerated = ["status of 400", "status of 409"]
    opened(browser, own)
    press(browser, "Alias fast")
    browser.wait(lambda: browser.all("dialog.ask"))
    field(browser, "alias", name)
    submit(browser)
    assert words in refused(browser)


def test_rolling_back_serves_the_version_before_unless_another_is_chosen(
    browser: Browser, own: Live
) -> None:
    opened(browser, own)
    press(browser, "Roll back sql")
    assert "sql serves version 3" in browser.text("dialog.ask p")
    submit(browser)
    done(browser, "sql: version 2 is served now.")
    browser.wait(lambda: cells(browser, "sql")["Version"] == "2 (2 others)")
    press(browser, "Roll back sql")
    browser.choose("dialog.ask select[data-field=version]", "3")
    submit(browser)
    done(browser, "sql: version 3 is served now.")
    assert not browser.one('button[aria-label="Roll back fast"]').is_enabled()


def test_an_adapter_is_removed_when_it_was_confirmed_and_not_before(
    browser: Browser, own: Live
) -> None:
    opened(browser, own)
    press(browser, "Remove fast")
    assert "can't be undone" in browser.text("dialog.ask p")
    browser.one("dialog.ask .quiet").click()
    assert "fast" in own.store.names()
    press(browser, "Remove fast")
    submit(browser)
    done(browser, "fast is removed.")
    browser.wait(lambda: browser.texts("#adapter-table tbody th") == ["sql also best"])


def test_what_an_alias_holds_is_removed_after_the_alias(browser: Browser, own: Live) -> None:
    browser.tolerated = ["status of 409"]
    opened(browser, own)
    press(browser, "Remove sql")
    offered = browser.texts("dialog.ask option")
    assert offered == [
        "sql with all 3 versions",
        "version 1 alone",
        "version 2 alone",
        "the alias best alone",
    ]
    browser.choose("dialog.ask select[data-field=what]", "adapters/sql%401")
    submit(browser)
    assert "the alias 'best' points at it" in refused(browser)
    browser.choose("dialog.ask select[data-field=what]", "aliases/best")
    submit(browser)
    done(browser, "best is removed.")
    press(browser, "Remove sql")
    browser.choose("dialog.ask select[data-field=what]", "adapters/sql%401")
    submit(browser)
    done(browser, "sql@1 is removed.")
    browser.wait(lambda: cells(browser, "sql")["Version"] == "3 (1 other)")
