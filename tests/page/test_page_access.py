"""Keyboard, screen readers, narrow and dark screens, and what the policy forbids."""

from __future__ import annotations

from itertools import pairwise

import pytest
from cluster_support import cluster_answers
from experiment_fixture import answers, experiment, flag, results
from http_support import Live
from page_support import NARROW, Browser, usage_answers, usage_row
from selenium.webdriver.common.keys import Keys

SECTIONS = ("chat", "adapters", "experiments", "usage", "replicas")
LONG = "a" * 120

# By the role's computed name, as assistive technology gets it.
NAMELESS = """
  const wanted = "button, input, select, textarea, summary, meter, table, dialog, [role=log]";
  const hidden = (e) => !e.checkVisibility();
  return [...document.querySelectorAll(wanted)].filter((e) => !hidden(e)).map((e) => {
    const by = (e.getAttribute("aria-labelledby") ?? "").split(" ").filter(Boolean);
    const name = e.getAttribute("aria-label")
      ?? (by.map((id) => document.getElementById(id)?.textContent).join(" ")
      || [...(e.labels ?? [])].map((l) => l.textContent).join(" ")
      || e.caption?.textContent
      || (/^(BUTTON|SUMMARY)$/.test(e.tagName) ? e.textContent : ""));
    return name.trim() ? null : e.outerHTML.slice(0, 120);
  }).filter((each) => each !== null);
"""

# WCAG's contrast of each visible text with what is behind it.
POOR_CONTRAST = """
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const rgba = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if ((colour[3] ?? 1) > 0) return colour;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const poor = [];
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest(":disabled")) continue;
    const style = getComputedStyle(e);
    const svg = e instanceof SVGElement;
    const [a, b] = [light(rgba(svg ? style.fill : style.color)), light(ground(e))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) poor.push([e.textContent.slice(0, 40), contrast]);
  }
  return poor;
"""


@pytest.fixture
def stubbed(browser: Browser) -> Browser:
    """Experiments and replicas to show, one of each with a name as long as it may be."""
    liked = flag("liked", (0.50, 0.62, 0.41), 1900)
    uneven = results(LONG, liked, units=(2600, 1900, 1500), automatic=(liked,))
    browser.stub(
        answers((experiment(LONG, description=LONG), uneven))
        | cluster_answers("engine-1", LONG)
        | usage_answers(usage_row(2_000_000, tenant=LONG))
    )
    return browser


def shown(browser: Browser, live: Live, section: str) -> None:
    browser.open(live.url, f"#{section}")
    parts = {
        "chat": "#pane-a optgroup",
        "adapters": "#tiers meter",
        "experiments": "#result .outcome",
        "usage": "#usage-table tbody tr",
        "replicas": "#replica-table tbody tr",
    }
    browser.wait(lambda: browser.all(parts[section]))


@pytest.mark.parametrize("section", SECTIONS)
def test_a_narrow_screen_scrolls_in_one_direction(
    stubbed: Browser, live: Live, section: str
) -> None:
    stubbed.size(NARROW)
    shown(stubbed, live, section)
    if section == "chat":
        stubbed.send("x" * 300)
        stubbed.answered()
    for details in stubbed.all("details > summary"):
        details.click()
    width = stubbed.run("return document.documentElement.scrollWidth")
    assert width <= NARROW[0]
    beyond = """
      return [...document.querySelectorAll("main *, header *")].filter((each) =>
        each.checkVisibility() && each.getBoundingClientRect().right > innerWidth + 0.5
        && !each.closest("thead, svg")).map((each) => each.outerHTML.slice(0, 99));
    """
    assert stubbed.run(beyond) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("section", SECTIONS)
def test_text_stands_out_from_its_ground(
    stubbed: Browser, live: Live, section: str, scheme: str
) -> None:
    stubbed.scheme(scheme)
    shown(stubbed, live, section)
    if section == "chat":
        stubbed.send("Hello")
        stubbed.answered()
    assert stubbed.run(POOR_CONTRAST) == []


def test_dark_is_dark(browser: Browser, live: Live) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.open(live.url)
        grounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(245, 246, 248)", "rgb(20, 22, 26)"]


@pytest.mark.parametrize("section", SECTIONS)
def test_everything_to_use_or_read_has_a_name(stubbed: Browser, live: Live, section: str) -> None:
    shown(stubbed, live, section)
    for details in stubbed.all("details > summary"):
        details.click()
    assert stubbed.run(NAMELESS) == []


@pytest.mark.parametrize("section", SECTIONS)
def test_headings_go_down_one_level_at_a_time(stubbed: Browser, live: Live, section: str) -> None:
    shown(stubbed, live, section)
    script = """
      return [...document.querySelectorAll("h1, h2, h3, h4")].filter((e) => e.checkVisibility())
        .map((e) => Number(e.tagName[1]));
    """
    levels = stubbed.run(script)
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_tabs_are_moved_over_by_arrow_keys(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.one("#tab-chat").send_keys(Keys.ARROW_RIGHT)
    assert browser.one("#adapters").is_displayed()
    assert not browser.one("#chat").is_displayed()
    assert browser.driver.switch_to.active_element.get_attribute("id") == "tab-adapters"
    browser.keys(Keys.END)
    assert browser.one("#usage").is_displayed()
    browser.keys(Keys.ARROW_RIGHT)
    assert browser.one("#chat").is_displayed()
    selected = [e.get_attribute("id") for e in browser.all("[role=tab][aria-selected=true]")]
    assert selected == ["tab-chat"]
    assert [e.get_attribute("id") for e in browser.all("[role=tab][tabindex='0']")] == selected


@pytest.mark.parametrize(
    "script",
    [
        "document.body.innerHTML = '<b>x</b>'",
        "const s = document.createElement('script'); s.textContent = 'window.hurt = 1';"
        "document.body.append(s)",
    ],
)
def test_text_can_not_become_markup_or_a_script(browser: Browser, live: Live, script: str) -> None:
    browser.tolerated = ["TrustedScript", "TrustedHTML", "Content Security Policy"]
    browser.open(live.url)
    refused = browser.run(f"try {{ {script} }} catch (error) {{ return error.name }} return null")
    assert refused == "TypeError"
    assert browser.run("return window.hurt ?? null") is None


def test_the_page_can_not_be_made_to_talk_to_another_server(browser: Browser, live: Live) -> None:
    browser.tolerated = ["Content Security Policy", "Fetch API cannot load"]
    browser.open(live.url)
    script = "return fetch('http://127.0.0.2:9/').then(() => 'sent', (error) => error.name)"
    assert browser.run(script) == "TypeError"
    assert any("Content Security Policy" in e["message"] for e in browser.log("browser"))
