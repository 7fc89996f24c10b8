"""The experiments section: a result as drawings and as tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from experiment_fixture import HOSTILE, amount, answers, experiment, flag, results
from http_support import Live
from page_support import Browser

INTERVALS = """
  const table = document.querySelectorAll("#result table.intervals")[arguments[0]];
  return [...table.querySelectorAll("td[data-label=Interval]")].map((each) => each.textContent);
"""
LIKED = flag("liked", (0.50, 0.62, 0.41), 1900)


def opened(browser: Browser, live: Live, *named: tuple[dict[str, Any], dict[str, Any]]) -> None:
    browser.stub(answers(*named))
    browser.open(live.url, "#experiments")
    browser.wait(lambda: browser.all("#result .outcome") or browser.all("#result .hint"))


def drawn(browser: Browser, table: int, part: str, attribute: str) -> list[float]:
    """Places of one part of each row's drawing, in per cent of the strip."""
    script = """
      const table = document.querySelectorAll("#result table.intervals")[arguments[0]];
      return [...table.querySelectorAll(`tbody ${arguments[1]}`)]
        .map((each) => parseFloat(each.getAttribute(arguments[2])));
    """
    found = browser.run(script, table, part, attribute)
    assert isinstance(found, list)
    return found


def test_decisions_are_told_of_each_variant(browser: Browser, live: Live) -> None:
    opened(browser, live, (experiment("greeting"), results("greeting", LIKED)))
    better, worse = browser.texts("#result .decisions li")
    assert better.startswith("tuned against base: better")
    assert worse.startswith("bold against base: worse")
    assert "minimum sample of 100 reached" in better


def test_differences_are_drawn_where_their_figures_say(browser: Browser, live: Live) -> None:
    result = results("greeting", LIKED)
    opened(browser, live, (experiment("greeting"), result))
    zero = drawn(browser, 0, ".zero", "x1")
    points = drawn(browser, 0, ".point", "cx")
    # Of each row's three strokes the first is the interval, the others are its ends.
    reach = drawn(browser, 0, ".reach", "x1")[::3], drawn(browser, 0, ".reach", "x2")[::3]
    assert zero[0] == zero[1]  # one scale for all rows
    assert points[1] < zero[0] < points[0]
    comparisons = result["outcomes"][0]["comparisons"]
    width = (points[0] - zero[0]) / comparisons[0]["difference"]  # per cent of the strip a unit
    for row, each in enumerate(comparisons):
        assert abs(points[row] - zero[0] - width * each["difference"]) < 0.01
        for side in range(2):
            assert abs(reach[side][row] - zero[0] - width * each["interval"][side]) < 0.01


def test_the_zero_line_stands_at_the_scales_zero(browser: Browser, live: Live) -> None:
    near = flag("liked", (0.50, 0.62, 0.54), 1900)  # the scale begins just below 0
    opened(browser, live, (experiment("greeting"), results("greeting", near)))
    script = """
      const labels = document.querySelectorAll("#result table.intervals:nth-of-type(1) .axis text");
      return [...labels].filter((each) => each.textContent === "0")
        .map((each) => each.getAttribute("x"));
    """
    places = [float(place.removesuffix("%")) for place in browser.run(script)]
    assert places == drawn(browser, 0, ".zero", "x1")[:1]


def test_means_have_their_intervals_counts_and_probabilities(browser: Browser, live: Live) -> None:
    opened(browser, live, (experiment("greeting"), results("greeting", LIKED)))
    rows = browser.texts("#result table.intervals:nth-of-type(2) tbody tr")
    assert [row.split("%")[0].strip() for row in rows] == ["base50", "tuned62", "bold41"]
    assert "1,900" in rows[0]
    assert rows[1].endswith("> 99.9 %")
    points = drawn(browser, 1, ".point", "cx")
    assert points[2] < points[0] < points[1]


def test_a_number_shows_its_margin_and_that_less_is_better(browser: Browser, live: Live) -> None:
    slow = amount("seconds", (2.0, 1.7, 2.01), 1500)
    opened(browser, live, (experiment("greeting"), results("greeting", slow)))
    assert "less is better" in browser.text("#result .outcome h3")
    assert browser.texts("#result .decision") == ["better", "keep collecting"]
    assert "−0.3" in browser.text("#result table.intervals:nth-of-type(1) tbody tr:first-child")
    assert len(drawn(browser, 0, ".margin", "width")) == 2


def test_a_sample_ratio_mismatch_stands_above_the_decisions(browser: Browser, live: Live) -> None:
    uneven = results("greeting", LIKED, units=(2600, 1900, 1500))
    opened(browser, live, (experiment("greeting"), uneven))
    warning, first = browser.one("#ratio-warning"), browser.one("#result .decisions")
    assert "trust no comparison" in warning.text
    assert "base has 2,600 units where 2,000 were expected" in warning.text
    assert warning.location["y"] < first.location["y"]


def test_without_a_mismatch_nothing_warns(browser: Browser, live: Live) -> None:
    opened(browser, live, (experiment("greeting"), results("greeting", LIKED)))
    assert browser.all("#ratio-warning") == []


def test_few_units_are_told_as_how_many_are_needed(browser: Browser, live: Live) -> None:
    few = results("greeting", flag("liked", (0.5, 1.0, 0.0), 2), units=(2, 2, 2))
    opened(browser, live, (experiment("greeting"), few))
    assert "keep collecting 2 of the 100 units needed" in browser.texts("#result .decisions li")[0]


def test_no_units_at_all_draw_nothing_and_break_nothing(browser: Browser, live: Live) -> None:
    none = results("greeting", flag("liked", (0, 0, 0), 0), units=(0, 0, 0))
    opened(browser, live, (experiment("greeting"), none))
    assert browser.all("#result svg.interval .point") == []
    assert browser.texts("#result .decision") == ["keep collecting"] * 2


def test_measures_of_the_server_unfold_and_stay_so(browser: Browser, live: Live) -> None:
    measured = amount("latency", (2.0, 1.7, 2.0), 1500)
    told = results("greeting", LIKED, automatic=(measured,))
    opened(browser, live, (experiment("greeting"), told))
    assert not browser.one("#result-automatic .outcome").is_displayed()
    browser.one("#result-automatic > summary").click()
    assert browser.one("#result-automatic .outcome").is_displayed()
    assert "latency" in browser.text("#result-automatic h3")


def test_another_experiment_is_chosen_by_its_button_and_by_the_address(
    browser: Browser, live: Live
) -> None:
    first = (experiment("greeting"), results("greeting", LIKED))
    second = (experiment("team/tone", "paused"), results("team/tone", LIKED))
    opened(browser, live, first, second)
    assert browser.text("#result h2") == "greeting running"
    browser.one('[data-name="team/tone"]').click()
    browser.wait(lambda: browser.text("#result h2") == "team/tone running")
    assert browser.driver.current_url.endswith("#experiments/team%2Ftone")
    browser.open(live.url, "#experiments/team%2Ftone")
    browser.wait(lambda: browser.text("#result h2") == "team/tone running")


def test_markup_in_a_description_is_text(browser: Browser, live: Live) -> None:
    hostile = experiment("greeting", description=HOSTILE)
    opened(browser, live, (hostile, results("greeting", LIKED)))
    assert HOSTILE in browser.texts("#result > p")
    assert browser.all("#result img") == []


def test_a_server_without_experiments_says_how_to_make_one(browser: Browser, live: Live) -> None:
    opened(browser, live)
    assert "POST /v1/experiments" in browser.text("#result")


@pytest.mark.parametrize(
    ("winner", "words"),
    [
        ("tuned", "every request gets tuned, which was named the winner"),
        (None, "every request gets base, the control, as no winner was named"),
    ],
)
def test_a_stopped_experiment_says_so_and_who_answers(
    browser: Browser, live: Live, winner: str | None, words: str
) -> None:
    open_still = flag("liked", (0.50, 0.51, 0.41), 1900)
    stopped = {**experiment("greeting", "stopped"), "winner": winner}
    opened(browser, live, (stopped, {**results("greeting", open_still), "state": "stopped"}))
    assert browser.text("#experiment-end").startswith("Stopped for good. ")
    assert words in browser.text("#experiment-end")
    assert browser.texts("#result .decision") == ["left undecided", "worse"]  # none collects on


def test_a_paused_experiment_says_so_and_a_running_one_nothing(
    browser: Browser, live: Live
) -> None:
    paused = {**results("greeting", LIKED), "state": "paused"}
    opened(browser, live, (experiment("greeting", "paused"), paused))
    assert "every request gets the control, base" in browser.text("#experiment-end")
    opened(browser, live, (experiment("greeting"), results("greeting", LIKED)))
    assert browser.all("#experiment-end") == []


def test_units_needed_are_explained_where_some_are_missing(browser: Browser, live: Live) -> None:
    few = results("greeting", flag("liked", (0.5, 1.0, 0.0), 2), units=(2, 2, 2))
    opened(browser, live, (experiment("greeting"), few))
    words = browser.text("#needed-words")
    assert "a unit is one user" in words
    assert "at least 100 of them" in words
    assert "20 units of each of its two values" in words
    opened(browser, live, (experiment("greeting"), results("greeting", LIKED)))
    assert browser.all("#needed-words") == []


def test_no_interval_reaches_beyond_what_can_be(browser: Browser, live: Live) -> None:
    few = flag("liked", (0.0, 1.0, 0.5), 3)
    seconds = amount("latency", (0.1, 0.2, 0.3), 4)
    told = results("greeting", few, units=(3, 3, 3), automatic=(replace(seconds, least=0.0),))
    opened(browser, live, (experiment("greeting"), told))
    differences, shares, _, latencies = (browser.run(INTERVALS, number) for number in range(4))
    assert differences[0].endswith(" to +100 points")
    assert all(not each.startswith("−") for each in (*shares, *latencies))
    assert latencies[0].startswith("0 to ")
