"""An evaluation as a table and as a plot of quality against speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from quickchange_training.errors import OutputError
from quickchange_training.evaluation.evaluation_results import DepthAcceptance, Evaluation, Row

Measure = Literal["exact-match", "json-valid", "token-f1", "loss"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

_VALUES: dict[Measure, Callable[[Row], float | None]] = {
    "exact-match": lambda row: row.scores.exact_match,
    "json-valid": lambda row: row.scores.json_valid,
    "token-f1": lambda row: row.scores.token_f1,
    "loss": lambda row: row.loss,
}
_PLOT_FORMATS = (".png", ".svg", ".pdf")


def as_table(evaluation: Evaluation) -> str:
    """Markdown table with aligned columns."""
    lanes = [speed.concurrency for speed in evaluation.rows[0].speeds]
    header = ["adapter", "exact match", "JSON valid", "token F1", "loss"]
    for lane in lanes:
        header += [f"tok/s at {lane}", f"tok/step at {lane}", f"first token at {lane}, ms"]
    header.append("accepted by depth")
    return _aligned([header, *(_cells(row) for row in evaluation.rows)])


def _cells(row: Row) -> list[str]:
    cells = [row.label, *(_number(_VALUES[measure](row)) for measure in MEASURES)]
    for speed in row.speeds:
        cells += [
            f"{speed.tokens_per_second:.1f}",
            f"{speed.tokens_per_step:.2f}",
            f"{speed.first_token_seconds * 1e3:.0f}",
        ]
    return [*cells, _acceptance(row.acceptance)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _acceptance(depths: tuple[DepthAcceptance, ...]) -> str:
    return " ".join(f"{depth.rate:.2f}" for depth in depths) or "-"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def check_plot(path: Path) -> None:
    """Raise OutputError where `plot` could not write to `path`."""
    if path.suffix not in _PLOT_FORMATS:
        raise OutputError(f"--plot {path}: end its name with {', '.join(_PLOT_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OutputError(
            "--plot needs matplotlib: pip install 'quickchange[eval]', or leave it out"
        ) from error


def plot(evaluation: Evaluation, measure: Measure, path: Path) -> None:
    """Draw `measure` over tokens/s: a panel for each concurrency, a point for each adapter."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = [speed.concurrency for speed in evaluation.rows[0].speeds]
    figure = Figure(figsize=(1.5 + 4.5 * len(lanes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(lanes), sharey=True, squeeze=False)[0]
    for place, (axis, lane) in enumerate(zip(panels, lanes, strict=True)):
        for row in evaluation.rows:
            quality = _VALUES[measure](row)
            if quality is not None:
                axis.plot(
                    row.speeds[place].tokens_per_second, quality, "o", markersize=8, label=row.label
                )
        axis.set_title(f"{lane} at a time")
        axis.set_xlabel("tokens/s")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel(measure.replace("-", " "))
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
