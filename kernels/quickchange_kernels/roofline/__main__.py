"""Command that prints the tables, or puts them into a document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quickchange_kernels.roofline import roofline_tables


def main(
    write: Annotated[Path | None, typer.Option(help="a document with places for them")] = None,
    compiled: Annotated[bool, typer.Option(help="also those that need the compiler")] = True,
) -> None:
    """Print the tables of what the kernels must take on an H100, or write them to a document."""
    chosen = {**roofline_tables.FLOORS, **(roofline_tables.COMPILED if compiled else {})}
    if write is not None:
        write.write_text(roofline_tables.written(write.read_text(), chosen))
        return
    for name, make in chosen.items():
        typer.echo(f"{name}: {make.__doc__}\n\n{make()}\n")


if __name__ == "__main__":
    typer.run(main)
