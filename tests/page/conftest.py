"""A headless Chromium, and a live server over the fake engine for it to look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import Behaviour
from http_support import Live, live_server, make_adapter, make_turbo
from page_support import CHROMEDRIVER, CHROMIUM, Browser

STEP_SECONDS = 0.004


@pytest.fixture(scope="session")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that holds the answers of `live` after their first tokens while it is there."""
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture
def held(hold: Path) -> Iterator[Callable[[], None]]:
    """Answers stand still after their first tokens, until this is called or the test ends."""
    hold.touch()
    yield hold.unlink
    hold.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    missing = [str(path) for path in (CHROMIUM, CHROMEDRIVER) if not path.exists()]
    if missing:
        reason = f"no {' and no '.join(missing)}: install chromium and chromium-driver"
        if os.environ.get("QUICKCHANGE_REQUIRE_SERVICES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    browser = Browser.start(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A wide, light, empty tab. Fails where it asked another server, or complained."""
    chromium.reset()
    yield chromium
    assert chromium.outside() == []
    assert chromium.complaints() == []


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, hold: Path) -> Iterator[Live]:
    """Adapters `sql` (two versions), `team/json` and `fast` (with Turbo), an alias `best`."""
    behaviour = Behaviour(step_seconds=STEP_SECONDS, hold=hold)
    with live_server(tmp_path_factory.mktemp("page-store"), behaviour) as server:
        server.store.add("sql", make_adapter(1.0))
        server.store.add("sql", make_adapter(2.0))
        server.store.add("team/json", make_adapter(3.0))
        server.store.add("fast", make_turbo(4.0, lora=True))
        server.store.alias("best", "sql")
        yield server
