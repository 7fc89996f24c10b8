"""Driving the page in a headless Chromium, and hearing what it asks for and complains of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM = Path("/usr/bin/chromium")
CHROMEDRIVER = Path("/usr/bin/chromedriver")
POINTED_HERE = "pointed.example"  # a name that the browser takes for this machine
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-default-browser-check",
    "--no-first-run",
    f"--host-resolver-rules=MAP {POINTED_HERE} 127.0.0.1",
)
WAIT_SECONDS = 15.0
WIDE, PHONE, NARROW = (1280, 900), (390, 844), (360, 740)

# Answers instead of the server: by path, [status, body]. Everything else goes to the server.
STUB = """
(() => {
  const answers = %s;
  const real = window.fetch.bind(window);
  window.fetch = (path, options) => {
    const answer = answers[new URL(path, document.baseURI).pathname];
    if (answer === undefined) return real(path, options);
    const [status, body, headers] = answer;
    return Promise.resolve(new Response(JSON.stringify(body), { status, headers: headers ?? {} }));
  };
})();
"""


def usage_row(tokens: int, **names: str | int) -> dict[str, Any]:
    """The answer of GET /v1/usage: half the tokens are the prompts'."""
    half = tokens // 2
    figures = {
        "prompt_tokens": half,
        "completion_tokens": tokens - half,
        "cached_tokens": half // 4,
    }
    return {**names, "requests": tokens // 100, "failed": tokens // 1000, **figures}


def usage_answers(*rows: dict[str, Any]) -> dict[str, list[Any]]:
    """What GET /v1/usage answers, by path, where rows are by tenant."""
    return {"/v1/usage": [200, {"group": ["tenant"], "data": list(rows)}]}


@dataclass
class Browser:
    """One Chromium with one tab."""

    driver: webdriver.Chrome
    origin: str = ""
    tolerated: list[str] = field(default_factory=list)  # parts of complaints a test expects

    @classmethod
    def start(cls, profile: Path) -> Browser:
        options = Options()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        return cls(webdriver.Chrome(options, Service(str(CHROMEDRIVER))))

    def reset(self) -> None:
        """A tab of its own, as if just started: no key is kept, nothing is stubbed."""
        before = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        here = self.driver.current_window_handle
        self.driver.switch_to.window(before)
        self.driver.close()
        self.driver.switch_to.window(here)
        self.tolerated, self.origin = [], ""
        self.size(WIDE)
        self.scheme("light")
        for kind in ("browser", "performance"):
            self.log(kind)

    def open(self, url: str, fragment: str = "") -> None:
        """Load the page anew and wait until it stands."""
        self.origin = url
        self.driver.get("about:blank")
        self.driver.get(f"{url}/{fragment}")
        self.wait(lambda: self.all("[role=tab][aria-selected=true]"))

    def leave(self) -> None:
        """Go away from the page, so that it asks a server that ends no more."""
        self.driver.get("about:blank")

    def stub(self, answers: dict[str, list[Any]]) -> None:
        """Answer these paths from now on, from the next load."""
        source = STUB % json.dumps(answers)
        self.cdp("Page.addScriptToEvaluateOnNewDocument", source=source)

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def size(self, size: tuple[int, int]) -> None:
        """The viewport, in CSS pixels; a headless window can't be as narrow as a telephone."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=False,
        )

    def scheme(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.cdp("Emulation.setEmulatedMedia", features=features)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """What the elements say, folded or not."""
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        found = self.run(script, selector)
        assert isinstance(found, list)
        return found

    def cells(self, table: str, name: str) -> dict[str, str]:
        """What a table's row says, by column. `name`: how the row's heading begins."""
        script = """
          const row = [...document.querySelectorAll(`${arguments[0]} tbody tr`)]
            .find((each) => each.querySelector("th").firstChild.data === arguments[1]);
          return Object.fromEntries(
            [...row.querySelectorAll("td")].map((each) => [each.dataset.label, each.textContent]));
        """
        found = self.run(script, table, name)
        assert isinstance(found, dict)
        return found

    def text(self, selector: str) -> str:
        return " ".join(self.texts(selector))

    def choose(self, selector: str, value: str) -> None:
        self.wait(lambda: self.all(f"{selector} option"))
        Select(self.one(selector)).select_by_value(value)

    def fill(self, selector: str, value: str) -> None:
        element = self.one(selector)
        element.clear()
        element.send_keys(value)

    def keys(self, *keys: str) -> None:
        """To whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def send(self, prompt: str) -> None:
        """Type a prompt and send it by the keyboard."""
        self.fill("#prompt", prompt)
        self.one("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Any, seconds: float = WAIT_SECONDS) -> None:
        WebDriverWait(self.driver, seconds, 0.02).until(lambda _: condition())

    def answered(self, count: int = 1) -> None:
        """Wait until both panes are done with `count` answers each."""
        self.wait(lambda: self.one("#stop").get_attribute("disabled") is not None)
        for pane in ("#pane-a", "#pane-b"):
            assert len(self.all(f"{pane} .turn.model")) == count

    def outside(self) -> list[str]:
        """Requests since the last reset that did not go to the server."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return [u for u in urls if not (u.startswith(f"{self.origin}/") or u.startswith("about:"))]

    def complaints(self) -> list[str]:
        """What the console has as warnings and errors."""
        said = [entry["message"] for entry in self.log("browser") if entry["level"] != "INFO"]
        return [each for each in said if not any(part in each for part in self.tolerated)]

    def log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return entries
