"""Pytest plugin: a run's last lines name each failed test with its reason, and count what it skips.

Pytest's own list drops the reason where the line is as long as the terminal is wide, and has a line
for each place of a skip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import pytest

TITLE = "in short"


class _Terminal(Protocol):
    """What of pytest's reporter is used here."""

    stats: dict[str, list[pytest.TestReport]]

    def write_sep(self, sep: str, title: str) -> None: ...

    def write_line(self, line: str) -> None: ...


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that it is below pytest's own list
def pytest_terminal_summary(terminalreporter: _Terminal) -> Iterator[None]:
    yield
    stats = terminalreporter.stats
    lines = skips(stats.get("skipped", []))
    for outcome, word in (("failed", "FAILED"), ("error", "ERROR")):
        lines += [f"{word} {each.nodeid}: {reason(each)}" for each in stats.get(outcome, [])]
    if lines:
        terminalreporter.write_sep("=", TITLE)
        for line in lines:
            terminalreporter.write_line(line)


def skips(reports: list[pytest.TestReport]) -> list[str]:
    """A line for each reason to skip, the most frequent first."""
    reasons = Counter(
        each.longrepr[2].removeprefix("Skipped: ") if isinstance(each.longrepr, tuple) else "?"
        for each in reports
    )
    return [f"SKIPPED {count} x {text}" for text, count in reasons.most_common()]


def reason(report: pytest.TestReport) -> str:
    """The first line of what was raised; for a dead worker, of what is said."""
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash is not None else report.longreprtext
    lines = [line.removeprefix("E ").strip() for line in said.splitlines() if line.strip()]
    if crash is None:  # an import that failed: its last line has the exception
        return lines[-1] if lines else "no reason"
    return lines[0] if lines else "no reason"
