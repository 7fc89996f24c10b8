"""The chat section, over the fake engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import spelling_engine
from chat_template_files import chat_template
from fake_engine import Behaviour
from http_support import BASE, Live, live_server, make_adapter
from page_support import PHONE, WIDE, Browser
from selenium.webdriver.common.keys import Keys
from text_support import END, byte_text

from quickchange_training.demo import DEMO_ADAPTERS, DEMO_ALIASES, DemoAdapter, DemoAlias

PANES = ("#pane-a", "#pane-b")


def say(browser: Browser, prompt: str, tokens: int = 24) -> None:
    for pane in PANES:
        browser.fill(f"{pane} [data-field=max_tokens]", str(tokens))
    browser.send(prompt)


def said(browser: Browser, pane: str) -> list[str]:
    return browser.texts(f"{pane} .turn.model .said")


def figures(browser: Browser, pane: str) -> dict[str, str]:
    """Those of the pane's last answer."""
    last = f"{pane} .turn.model:last-child .figures"
    return dict(zip(browser.texts(f"{last} dt"), browser.texts(f"{last} dd"), strict=True))


def answer_of(live: Live, model: str, messages: list[dict[str, str]], tokens: int = 24) -> str:
    body = {"model": model, "messages": messages, "seed": 1, "temperature": 0, "max_tokens": tokens}
    return str(live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_one_prompt_streams_each_models_answer_into_its_pane(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.choose("#pane-a select[data-field=model]", BASE)
    browser.choose("#pane-b select[data-field=model]", "team/json")
    say(browser, "Hello")
    browser.answered()
    assert said(browser, "#pane-a") == [answer_of(live, BASE, [user("Hello")])]
    assert said(browser, "#pane-b") == [answer_of(live, "team/json", [user("Hello")])]
    assert "differ from character" in browser.text("#same")


def some_said(browser: Browser) -> bool:
    return all(said(browser, pane) and said(browser, pane)[0] for pane in PANES)


def test_text_shows_before_the_answer_is_complete(
    browser: Browser, live: Live, held: Callable[[], None]
) -> None:
    browser.open(live.url)
    browser.choose("#pane-a select[data-field=model]", BASE)
    say(browser, "Hello")
    browser.wait(lambda: some_said(browser))
    assert [len(said(browser, pane)[0]) for pane in PANES] == [1, 1]  # letters, a token each
    assert browser.one("#pane-a .log").get_attribute("aria-busy") == "true"
    held()
    browser.answered()
    assert said(browser, "#pane-a") == [answer_of(live, BASE, [user("Hello")])]


@pytest.mark.usefixtures("held")
def test_stop_ends_both_answers_and_keeps_what_was_said(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.choose("#pane-a select[data-field=model]", BASE)
    say(browser, "Hello")
    browser.wait(lambda: some_said(browser))
    browser.one("#stop").click()
    browser.answered()
    for pane in PANES:
        assert len(said(browser, pane)[0]) == 1
        assert figures(browser, pane)["Ended by"] == "Stop"
    running = "quickchange_requests_running 0.0"
    browser.wait(lambda: running in live.http.get("/metrics").text)


def test_figures_tell_speed_first_token_and_drafts(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.choose("#pane-a select[data-field=model]", "sql")
    browser.choose("#pane-b select[data-field=model]", "fast")
    say(browser, "Hello", tokens=40)
    browser.answered()
    plain, turbo = (figures(browser, pane) for pane in PANES)
    assert plain["Tokens"] == turbo["Tokens"] == "40"
    for each in (plain, turbo):
        assert float(each["Tokens/s"].replace(",", "")) > 0
        assert re.fullmatch(r"\d+ ms|\d+\.\d\d s", each["First token"])
        assert each["Ended by"] == "length"
    assert "Drafted" not in plain
    accepted = int(turbo["Accepted"].split()[0])
    assert 0 < accepted < int(turbo["Drafted"])


def test_turbo_can_be_chosen_for_each_pane(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    for pane, turbo in zip(PANES, ("off", "lookup"), strict=True):
        browser.choose(f"{pane} select[data-field=model]", "fast")
        browser.choose(f"{pane} select[data-field=turbo]", turbo)
    say(browser, "Hello")
    browser.answered()
    assert "Drafted" not in figures(browser, "#pane-a")
    assert "Drafted" in figures(browser, "#pane-b")
    assert browser.text("#same") == "Same text in both panes"  # drafts change no token


def test_each_pane_goes_on_with_its_own_conversation(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.choose("#pane-a select[data-field=model]", "sql")
    browser.choose("#pane-b select[data-field=model]", "fast")
    browser.choose("#pane-b select[data-field=turbo]", "off")
    say(browser, "One")
    browser.answered(1)
    say(browser, "Two")
    browser.answered(2)
    for pane, model in zip(PANES, ("sql", "fast"), strict=True):
        first, second = said(browser, pane)
        before = [user("One"), {"role": "assistant", "content": first}, user("Two")]
        assert second == answer_of(live, model, before)
    browser.one("#fresh").click()
    assert browser.all(".turn") == []


def test_the_selector_groups_what_is_served(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.wait(lambda: browser.all("#pane-a optgroup"))
    labels = [e.get_attribute("label") for e in browser.all("#pane-a optgroup")]
    assert labels == ["Base model", "Aliases", "Adapters", "Versions"]
    versions = browser.texts("#pane-a optgroup[label=Versions] option")
    assert versions == ["sql@1", "sql@2"]  # other names have one version alone


def test_a_refusal_is_told_in_the_pane_and_the_prompt_is_not_lost(
    browser: Browser, live: Live
) -> None:
    browser.tolerated = ["status of 400"]
    browser.open(live.url)
    browser.choose("#pane-a select[data-field=model]", BASE)
    say(browser, "Hello", tokens=5000)
    browser.answered()
    assert "maximum context length" in browser.text("#pane-a [role=alert]")
    assert browser.one("#prompt").get_property("value") == "Hello"


@pytest.mark.parametrize(
    ("status", "words"), [(429, "no room for this now"), (503, "takes no requests now")]
)
def test_a_busy_server_is_told_with_when_to_come_back(
    browser: Browser, live: Live, status: int, words: str
) -> None:
    refusal = {"error": {"message": "the queue is full", "type": "x", "param": None, "code": None}}
    browser.stub({"/v1/chat/completions": [status, refusal, {"Retry-After": "7"}]})
    browser.open(live.url)
    browser.choose("#pane-a select[data-field=model]", BASE)
    say(browser, "Hello")
    browser.answered()
    told = browser.text("#pane-b [role=alert]")
    assert words in told
    assert "the queue is full" in told
    assert told.endswith("Try again in 7 s.")


@pytest.mark.usefixtures("held")
def test_the_chat_needs_no_mouse(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.wait(lambda: browser.all("#pane-a optgroup"))
    browser.run("document.querySelector('#tab-chat').focus()")
    seen = []
    for _ in range(16):
        browser.keys(Keys.TAB)
        active = browser.driver.switch_to.active_element
        seen.append(active.get_attribute("id") or active.get_attribute("data-field"))
    log = None  # it has the focus to be scrolled
    fields = ["model", "turbo", "temperature", "max_tokens", "seed", log]
    assert seen == ["key-button", "prompt", "send", "fresh", *fields, *fields]
    browser.run("document.querySelector('#prompt').focus()")
    browser.keys("Hello", Keys.TAB)
    assert browser.driver.switch_to.active_element.get_attribute("id") == "send"
    browser.keys(Keys.ENTER)
    assert browser.driver.switch_to.active_element.get_attribute("id") == "stop"
    browser.wait(lambda: some_said(browser))
    browser.keys(Keys.ENTER)
    browser.answered()
    assert browser.driver.switch_to.active_element.get_attribute("id") == "prompt"


# --- what it begins with ------------------------------------------------------------------------


def card(name: str, kind: str) -> dict[str, object]:
    return {"id": name, "quickchange": {"kind": kind}}


def begun(browser: Browser, live: Live, *models: tuple[str, str]) -> tuple[str, str]:
    """The model of pane B and the prompt, where the server lists `models` beside the base."""
    cards = [card(BASE, "base"), *(card(*model) for model in models)]
    browser.stub({"/v1/models": [200, {"data": cards}]})
    browser.open(live.url)
    browser.wait(lambda: browser.all("#pane-b option"))
    assert browser.one("#pane-a [data-field=model]").get_property("value") == BASE
    model = browser.one("#pane-b [data-field=model]").get_property("value")
    return str(model), str(browser.one("#prompt").get_property("value"))


@pytest.mark.parametrize("name", [*DEMO_ADAPTERS, *DEMO_ALIASES])
def test_a_demo_adapter_is_shown_with_the_prompt_it_was_made_for(
    browser: Browser, live: Live, name: str
) -> None:
    known: dict[str, DemoAdapter | DemoAlias] = {**DEMO_ADAPTERS, **DEMO_ALIASES}
    others = [("an-experiment", "experiment"), ("aaa", "alias"), (name, "adapter")]
    assert begun(browser, live, *others) == (name, known[name].example_prompt)


def test_of_the_demos_adapters_the_one_with_turbo_comes_first(browser: Browser, live: Live) -> None:
    demo = [(name, "adapter") for name in DEMO_ADAPTERS] + [(n, "alias") for n in DEMO_ALIASES]
    assert begun(browser, live, *demo)[0] == "order-json-turbo"


@pytest.mark.parametrize(
    ("models", "shown"),
    [
        ([("test", "experiment"), ("best", "alias"), ("mine", "adapter")], "mine"),
        ([("test", "experiment"), ("best", "alias")], "best"),
        ([("test", "experiment")], "test"),
        ([], BASE),
    ],
)
def test_without_a_demo_adapter_the_first_there_is_is_shown(
    browser: Browser, live: Live, models: list[tuple[str, str]], shown: str
) -> None:
    model, prompt = begun(browser, live, *models)
    assert (model, prompt != "") == (shown, True)


def test_a_sample_follows_the_chosen_model_until_somebody_types(
    browser: Browser, live: Live
) -> None:
    begun(browser, live, ("sql", "adapter"), ("docstring", "adapter"))
    browser.choose("#pane-b [data-field=model]", "docstring")
    sample = browser.one("#prompt").get_property("value")
    assert sample == DEMO_ADAPTERS["docstring"].example_prompt
    browser.fill("#prompt", "Mine")
    browser.choose("#pane-b [data-field=model]", "sql")
    assert browser.one("#prompt").get_property("value") == "Mine"


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_the_prompt_comes_before_the_panes_and_without_scrolling(
    browser: Browser, live: Live, size: tuple[int, int]
) -> None:
    browser.size(size)
    browser.open(live.url)
    browser.wait(lambda: browser.all("#pane-a optgroup"))
    send, pane = (browser.one(each).rect for each in ("#send", "#pane-a"))
    assert send["y"] + send["height"] <= min(pane["y"], size[1])


# --- thoughts -----------------------------------------------------------------------------------


@pytest.fixture
def thoughtful(browser: Browser, tmp_path: Path) -> Iterator[Live]:
    """Its model thinks, in markup, before it answers; it is reached by a proxy's path too."""
    said = (*b"<think>\nHm, <b>2</b>.\n</think>\n\nTwo.", END)
    text = byte_text(chat_template("thinks_in_field"))
    with live_server(tmp_path, Behaviour(says=said), text, root_path="/llm") as live:
        live.store.add("sql", make_adapter(1.0))
        yield live
        browser.leave()


@pytest.mark.parametrize("path", ["", "llm", "llm/"])
def test_thoughts_stand_folded_above_the_answer(
    browser: Browser, thoughtful: Live, path: str
) -> None:
    browser.open(thoughtful.url, path)
    browser.choose("#pane-a select[data-field=model]", BASE)
    say(browser, "1 + 1?", tokens=100)
    browser.answered()
    for pane in PANES:
        assert said(browser, pane) == ["Two."]
        folded = browser.one(f"{pane} .turn.model .thoughts")
        assert folded.get_attribute("open") is None
        assert folded.rect["y"] < browser.one(f"{pane} .turn.model .said").rect["y"]
        browser.one(f"{pane} .thoughts summary").click()
        assert browser.texts(f"{pane} .thought") == ["Hm, <b>2</b>."]
        assert "First token" in figures(browser, pane)
    assert "Same text" in browser.text("#same")


def test_an_answer_without_thoughts_has_no_fold(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.choose("#pane-a select[data-field=model]", BASE)
    say(browser, "Hello")
    browser.answered()
    assert browser.all(".thoughts") == []


# --- hostile output -----------------------------------------------------------------------------


@pytest.fixture
def hostile(browser: Browser, tmp_path: Path) -> Iterator[Live]:
    with live_server(tmp_path, engine=spelling_engine.main) as live:
        live.store.add("sql", make_adapter(1.0))
        yield live
        browser.leave()


def test_markup_of_a_model_is_text(browser: Browser, hostile: Live) -> None:
    browser.open(hostile.url)
    browser.choose("#pane-a select[data-field=model]", BASE)
    say(browser, "Hello", tokens=len(spelling_engine.SPELLED.encode()))
    browser.answered()
    for pane in PANES:
        assert said(browser, pane) == [spelling_engine.SPELLED]
        assert browser.all(f"{pane} .said *") == []
    assert browser.run("return window.hurt ?? null") is None
