"""docs/trainers.md has the layouts that the tests write, and what comes of each."""

from __future__ import annotations

from pathlib import Path

from trainer_layouts import REFUSED, SERVED, TrainerLayout

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


def row(layout: TrainerLayout) -> str:
    if layout.refused is None:
        outcome = "served"
    else:
        outcome = f"refused; the remedy names `{layout.refused}`"
    return f"| {layout.trainer} | {layout.writes} | {outcome} |"


def test_the_page_has_a_row_for_each_layout_and_no_other() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == [row(layout) for layout in (*SERVED, *REFUSED)]
