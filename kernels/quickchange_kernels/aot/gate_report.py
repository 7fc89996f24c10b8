"""Table of the compiled configurations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from quickchange_kernels.aot.gate import CompileOutcome

HEADER = (
    "kernel",
    "target",
    "registers",
    "spilled",
    "shared",
    "products",
    "stream",
    "occupancy",
    "instructions",
    "seconds",
)


def line(cells: Sequence[str]) -> str:
    """One line of the table; the kernel's name first."""
    name, target, *numbers = cells
    return f"{name:58s} {target:7s}" + "".join(f"{number:>13s}" for number in numbers)


def cells(outcome: CompileOutcome) -> list[str]:
    """Cells of one outcome, in the order of HEADER."""
    name, taken = [outcome.job.name, outcome.job.target], outcome.resources
    if taken is None:
        return [*name, *["-"] * 7, f"{outcome.seconds:.1f}"]
    stream = outcome.narrowest_stream
    return [
        *name,
        str(taken.registers),
        str(taken.spilled),
        str(taken.shared),
        str(taken.products),
        "-" if stream is None else str(stream),
        f"{taken.occupancy:.0%}",
        str(taken.instructions),
        f"{outcome.seconds:.1f}",
    ]


def failures(outcomes: Sequence[CompileOutcome]) -> list[str]:
    """Reasons why kernels are unfit, one a line."""
    return [
        f"{outcome.job.name} on {outcome.job.target}: {reason}"
        for outcome in outcomes
        for reason in outcome.reasons
    ]


def as_json(outcomes: Sequence[CompileOutcome]) -> str:
    """The outcomes as JSON."""
    return json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1)
