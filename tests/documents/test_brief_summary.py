"""The last lines of a test run: which test failed and why, and how many were skipped for what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "brief_summary"]
LONG = "x" * 200
TESTS = f"""
import os
import pytest

@pytest.mark.parametrize("name", ["-"], ids=["{LONG}"])
def test_wrong(name):
    print("FAILED nothing")
    assert [1, 2] == [1, 3], "the lists differ"

@pytest.fixture
def broken():
    raise OSError("no such server\\nsecond line")

def test_without_its_server(broken): ...

@pytest.mark.parametrize("level", range(5))
def test_levels(level):
    pytest.skip("this CPU has no AVX-1024" if level else "a compiler is missing")

def test_right(): ...
"""


def last_lines(folder: Path, tests: str, *options: str) -> list[str]:
    """What a run of these tests prints below the heading."""
    (folder / "test_some.py").write_text(tests)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *options, "test_some.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(SUPPORT), "PYTEST_ADDOPTS": "", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = run.stdout.splitlines()
    start = next((n for n, line in enumerate(lines) if line.strip("= ") == "in short"), None)
    return [] if start is None else lines[start + 1 :]


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one process", "workers"])
def test_each_failure_has_its_reason_and_each_reason_to_skip_its_count(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    *lines, total = last_lines(tmp_path, TESTS, *options)
    assert lines == [
        "SKIPPED 4 x this CPU has no AVX-1024",
        "SKIPPED 1 x a compiler is missing",
        f"FAILED test_some.py::test_wrong[{LONG}]: AssertionError: the lists differ",
        "ERROR test_some.py::test_without_its_server: OSError: no such server",
    ]
    assert "1 failed, 1 passed, 5 skipped, 1 error" in total


def test_a_dead_worker_and_a_file_that_is_not_imported_are_told(tmp_path: Path) -> None:
    died = last_lines(tmp_path, "import os\ndef test_end(): os._exit(3)\n", "-n", "1")
    assert any(line.startswith("FAILED test_some.py::test_end: worker") for line in died)
    wrong = last_lines(tmp_path, "import no_such_module\n")
    assert "ERROR test_some.py: ModuleNotFoundError: No module named 'no_such_module'" in wrong


def test_a_run_without_failures_and_skips_adds_nothing(tmp_path: Path) -> None:
    assert last_lines(tmp_path, "def test_right(): ...\n") == []
