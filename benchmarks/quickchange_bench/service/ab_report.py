"""Table of an experiment's results, from GET /v1/experiments/{name}/results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quickchange_bench.report_tables import number, table

MEASURED = ("latency", "tokens")  # outcomes that the server measures by itself
Result = Mapping[str, Any]


def results_text(results: Result) -> str:
    """Variants and comparisons of each outcome, and the check of the shares."""
    shown = [o for o in results["automatic"] if o["name"] in MEASURED]
    outcomes = [*results["outcomes"], *shown]
    header = ("outcome", "variant", "units", "mean", "interval", "p(best)")
    variants = [row for outcome in outcomes for row in _variants(outcome)]
    compared = ("outcome", "less the control", "difference", "interval", "p", "decision")
    comparisons = [row for outcome in outcomes for row in _comparisons(outcome)]
    ratio = results["ratio"]
    counts = ", ".join(f"{name} {count}" for name, count in ratio["observed"].items())
    verdict = "MISMATCH: trust no comparison" if ratio["mismatch"] else "as the weights say"
    return "\n".join(
        [
            f"{results['id']}: {results['state']}, version {results['version']}",
            table(header, variants),
            table(compared, comparisons),
            f"units: {counts}; {verdict} (p {number(ratio['p_value'], 3)})",
        ]
    )


def _variants(outcome: Result) -> Iterator[Sequence[str]]:
    for variant in outcome["variants"]:
        yield (
            outcome["name"],
            variant["variant"],
            str(variant["count"]),
            number(variant["mean"], 3),
            _interval(variant["interval"]),
            number(variant["probability_best"], 3),
        )


def _comparisons(outcome: Result) -> Iterator[Sequence[str]]:
    for comparison in outcome["comparisons"]:
        yield (
            outcome["name"],
            comparison["variant"],
            number(comparison["difference"], 3),
            _interval(comparison["interval"]),
            number(comparison["p_value"], 4),
            comparison["decision"],
        )


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"
