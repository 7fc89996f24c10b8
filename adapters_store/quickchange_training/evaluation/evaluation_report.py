"""An evaluation as a table and as plots of quality against size and speed."""

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
    header += ["values", "stored, KiB", "device, KiB"]
    for lane in lanes:
        header += [f"tok/s at {lane}", f"tok/step at {lane}", f"first token at {lane}, ms"]
    header.append("accepted by depth")
    return _aligned([header, *(_cells(row) for row in evaluation.rows)])


def mixed_line(evaluation: Evaluation) -> str:
    """What came of all rows in one batch, as a sentence."""
    mixed = evaluation.mixed
    if mixed is None:
        return ""
    speed = mixed.speed
    return (
        f"All {len(evaluation.rows)} in turn, {speed.concurrency} at a time: "
        f"{speed.tokens_per_second:.1f} tok/s; {mixed.same_answers} of {speed.requests} answers "
        "as when alone"
    )


def _cells(row: Row) -> list[str]:
    cells = [row.label, *(_number(_VALUES[measure](row)) for measure in MEASURES)]
    size = row.size
    cells += [str(size.parameters), _kib(size.stored_bytes), _kib(size.device_bytes)]
    for speed in row.speeds:
        cells += [
            f"{speed.tokens_per_second:.1f}",
            f"{speed.tokens_per_step:.2f}",
            f"{speed.first_token_seconds * 1e3:.0f}",
        ]
    return [*cells, _acceptance(row.acceptance)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _kib(count: int) -> str:
    return f"{count / 1024:.0f}"


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
    """Draw `measure` over stored size and tokens/s: a panel for the size and each concurrency.

    What stores nothing, as the base, is a line across the first panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    lanes = [speed.concurrency for speed in evaluation.rows[0].speeds]
    figure = Figure(figsize=(1.5 + 4.5 * (1 + len(lanes)), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    sizes, *panels = figure.subplots(1, 1 + len(lanes), sharey=True, squeeze=False)[0]
    for number, row in enumerate(evaluation.rows):
        quality = _VALUES[measure](row)
        if quality is None:
            continue
        look = {"color": f"C{number % 10}", "label": row.label}
        if row.size.stored_bytes:
            sizes.plot(row.size.stored_bytes / 1024, quality, "o", markersize=8, **look)
        else:
            sizes.axhline(quality, linestyle="--", **look)
        for axis, speed in zip(panels, row.speeds, strict=True):
            axis.plot(speed.tokens_per_second, quality, "o", markersize=8, **look)
    sizes.set_title("size")
    sizes.set_xscale("log", base=2)
    sizes.xaxis.set_major_formatter(ScalarFormatter())
    sizes.set_xlabel("stored, KiB")
    sizes.set_ylabel(measure.replace("-", " "))
    sizes.legend()
    for axis, lane in zip(panels, lanes, strict=True):
        axis.set_title(f"{lane} at a time")
        axis.set_xlabel("tokens/s")
        axis.set_xlim(left=0)
    for axis in (sizes, *panels):
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
