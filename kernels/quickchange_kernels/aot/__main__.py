"""Command that compiles every Triton kernel that ships, and fails where one is unfit."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from quickchange_kernels import gpu_targets
from quickchange_kernels.aot import compiling, gate, gate_report
from quickchange_kernels.gpu_targets import TARGETS


def main(
    names: Annotated[str, typer.Option("--targets", help="comma-separated")] = ",".join(TARGETS),
    only: Annotated[str, typer.Option(help="configurations whose name contains this")] = "",
    module: Annotated[list[str] | None, typer.Option(help="instead of the package's own")] = None,
    json: Annotated[Path | None, typer.Option(help="also write everything known here")] = None,
    jobs: Annotated[int, typer.Option(help="processes", min=1)] = os.cpu_count() or 1,
) -> None:
    """Compile the Triton kernels that ship, print what each takes; status 1 if one is unfit."""
    started = time.perf_counter()
    work = list(gate.jobs(module or compiling.kernel_modules(), gpu_targets.named(names), only))
    typer.echo(gate_report.line(gate_report.HEADER))
    outcomes = []
    for outcome in gate.run(work, jobs):
        outcomes.append(outcome)
        typer.echo(gate_report.line(gate_report.cells(outcome)))
    if json is not None:
        json.write_text(gate_report.as_json(outcomes))
    reasons = gate_report.failures(outcomes) + ([] if only else gate.stale_marks(outcomes))
    if not outcomes:
        reasons.append("no configuration was found")
    for reason in reasons:
        typer.echo(f"UNFIT  {reason}")
    unfit = sum(1 for outcome in outcomes if outcome.reasons)
    seconds = time.perf_counter() - started
    typer.echo(f"aot: {len(outcomes) - unfit} fit, {unfit} unfit, {seconds:.0f} s")
    sys.exit(1 if reasons else 0)


if __name__ == "__main__":
    typer.run(main)
