"""Entry point: `python -m quickchange_bench.architectures [TYPE …]`, or `make sweep`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from quickchange_bench.architectures import sweep
from quickchange_bench.architectures.tiny_configs import types


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Types; default: all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = os.cpu_count() or 1,
    write: Annotated[bool, typer.Option(help="Let this be what is expected.")] = False,
) -> None:
    """Serve a tiny random model of each type; 1 where one is not as expected."""
    table = {}
    for name, result in sweep.run_sweep(names or types(), jobs):
        table[name] = result
        typer.echo(f"{name:28} {result.base:9} {result.lora:9} {result.says[:200]}")
    typer.echo(sweep.counts(table))
    if write:
        sweep.write({**(sweep.expected() if names else {}), **table})
        return
    changed = sweep.changes(table, sweep.expected())
    for line in changed:
        typer.echo(f"changed: {line}")
    raise typer.Exit(bool(changed))


if __name__ == "__main__":
    typer.run(main)
