"""Measured speeds as shares of what was possible: the limit, the fair share of the cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quickchange_bench.bench_results import Load, ServingResult
from quickchange_bench.load.busy_neighbours import fair_fraction
from quickchange_bench.report_tables import number, table
from quickchange_bench.summary_stats import ratio
from quickchange_kernels.roofline.machine import CpuRates, Model
from quickchange_kernels.roofline.workload_limits import PRECISIONS, ClosedLoop, workload_limit


@dataclass(frozen=True, slots=True)
class Share:
    """One median beside what was possible, in tokens/s. None: does not apply, or not measured.

    `fair` is the server's own quiet speed times its share of the cores beside busy processes.
    """

    server: str
    mode: str  # base or distinct
    load: Load
    tokens_per_second: float | None
    limit: float | None
    fair: float | None

    @property
    def of_limit(self) -> float | None:
        return ratio(self.tokens_per_second, self.limit)

    @property
    def of_fair(self) -> float | None:
        return ratio(self.tokens_per_second, self.fair)


def shares(
    results: Sequence[ServingResult],
    weights: Mapping[str, str],
    *,
    rates: CpuRates,
    model: Model,
    rank: int,
    threads: int,
) -> tuple[Share, ...]:
    """The shares of all medians. `weights`: by server, of PRECISIONS; `rank`: of the adapters."""
    found = []
    for result in results:
        spec = result.workload
        measured = {m.load: m.values["tokens_per_second"] for m in result.medians}
        for load, speed in measured.items():
            loop = ClosedLoop(
                concurrent=load.workers or 1,
                prompt=int(spec.prompt_tokens),
                answer=int(spec.output_tokens),
                adapters=spec.adapters if spec.popularity else 0,
                rank=rank,
            )
            precision = PRECISIONS[weights[result.dialect]]
            limit = workload_limit(rates, model, precision, loop).tokens_per_second
            quiet = measured.get(Load(workers=load.workers))
            due = fair_fraction(rates.allowance.usable, threads, load.busy)
            found.append(
                Share(
                    server=result.dialect,
                    mode=spec.popularity or "base",
                    load=load,
                    tokens_per_second=speed,
                    limit=None if load.busy else limit,
                    fair=quiet * due if load.busy and quiet is not None else None,
                )
            )
    return tuple(found)


def shares_table(found: Sequence[Share]) -> str:
    """One line a median."""
    header = ["server", "adapters", "load", "tok/s", "limit", "of it", "fair share", "of it"]
    return table(
        header,
        [
            [
                one.server,
                "none" if one.mode == "base" else one.mode,
                one.load.name,
                number(one.tokens_per_second),
                number(one.limit, 0),
                number(one.of_limit, 2),
                number(one.fair),
                number(one.of_fair, 2),
            ]
            for one in found
        ],
    )
