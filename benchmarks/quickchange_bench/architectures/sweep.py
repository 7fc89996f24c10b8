"""The sweep: every type and variant, each in a process of its own, and the table of what came out.

A type that dies or hangs is one line of the table. `expected_sweep.json` holds the table as it is
to be; docs/model-types.md and the README's line are made from it.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from textwrap import shorten

from quickchange_bench import report_tables
from quickchange_bench.architectures.sweep_case import SweepResult, run_case
from quickchange_bench.architectures.tiny_configs import VARIANTS, types

EXPECTED = Path(__file__).with_name("expected_sweep.json")
DOCUMENT = Path(__file__).parents[3] / "docs" / "model-types.md"

Table = Mapping[str, SweepResult]

_MARK = "<!-- made by `make sweep`; what stands below is written anew -->"
_WIDEST = 160  # characters
_SECONDS = 180.0
_BYTES = 12 << 30  # address space of one type's process
_PRELOADED = [
    "quickchange_bench.architectures.sweep_case",
    "transformers.models.auto.modeling_auto",
]


def run_sweep(
    names: Sequence[str], jobs: int, seconds: float = _SECONDS
) -> Iterator[tuple[str, SweepResult]]:
    """Each name's result, in order, as it is known. seconds: a type that takes longer hangs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)

    def one(name: str) -> SweepResult:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(name, theirs))
        process.start()
        theirs.close()
        try:
            if not mine.poll(seconds):
                return SweepResult("crash", says=f"no result after {seconds:.0f} s")
            result: SweepResult = mine.recv()
            return result
        except EOFError:
            process.join()
            return SweepResult("crash", says=f"the process died ({process.exitcode})")
        finally:
            process.kill()
            process.join()

    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(names, pool.map(one, names), strict=True)


def _run(name: str, out: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    out.send(run_case(name))


def expected() -> dict[str, SweepResult]:
    """The table as it is to be."""
    rows = json.loads(EXPECTED.read_text())
    return {name: SweepResult(**row) for name, row in rows.items()}


def write(table: Table) -> None:
    """Let `table` be what is expected, and what the document shows."""
    ordered = {name: table[name] for name in types() if name in table}
    rows = {name: asdict(result) for name, result in ordered.items()}
    EXPECTED.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    head = DOCUMENT.read_text().partition(_MARK)[0]
    DOCUMENT.write_text(f"{head}{_MARK}\n{counts(ordered)}.\n\n{as_markdown(ordered)}\n")


def changes(table: Table, known: Table) -> list[str]:
    """One line for each result whose outcome differs from what is expected."""
    lines = []
    for name, found in table.items():
        was = known.get(name)
        if was is None or (was.base, was.lora) != (found.base, found.lora):
            before = "not expected at all" if was is None else f"was {was.base} / {was.lora}"
            lines.append(f"{name}: {found.base} / {found.lora}, {before}. {found.says}")
    return lines


def counts(table: Table) -> str:
    """Numbers of types by outcome, in one line; variants are not counted."""
    kinds = {name: result for name, result in table.items() if name not in VARIANTS}
    base = Counter(result.base for result in kinds.values())
    both = sum(result.base == result.lora == "equal" for result in kinds.values())
    parts = [f"{count} {outcome}" for outcome, count in base.most_common()]
    return f"{len(kinds)} types: {', '.join(parts)}; {both} equal with a LoRA too"


def as_markdown(table: Table) -> str:
    """The table for people, with the first words of what was said."""
    header = ["type", "base", "LoRA", "says"]
    return report_tables.table(
        header,
        [
            [name, result.base, result.lora, shorten(result.says, _WIDEST).replace("|", "/")]
            for name, result in table.items()
        ],
    )
