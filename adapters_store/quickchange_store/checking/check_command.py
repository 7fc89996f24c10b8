"""`quickchange adapters check`: what a folder is, what would be served, and what mends the rest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quickchange_store.errors import StoreError, os_error_line
from quickchange_store.hub_access import look_for_hub

if TYPE_CHECKING:
    from quickchange_store.checking.adapter_report import AdapterReport


def check(
    directory: Annotated[Path, typer.Argument(help="Folder of an adapter, of any trainer.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Base model to check against; default: the one that the adapter names, if it is a "
            "folder or in the hub's cache.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a folder is and what of it would be served, with no store and no server.

    Exit status 1 where it would be refused; the message says what mends it.
    """
    if base is not None:
        look_for_hub(base)  # before what imports the hub's library
    from quickchange_store.checking.adapter_report import report_on  # imports torch: seconds

    try:
        report = report_on(directory, base)
    except StoreError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"error: {os_error_line(error)}", err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(asdict(report), indent=2) if as_json else "\n".join(_lines(report)))
    if report.refused is not None:
        raise typer.Exit(1)


def _lines(report: AdapterReport) -> list[str]:
    lines = [
        f"folder: {report.folder}",
        f"written by: {report.trainer or 'not known'}",
        f"made for: {report.made_for or 'not said'}",
        f"checked against: {report.checked_against or 'no base model'}",
    ]
    served, refused = report.served, report.refused
    if served is not None:
        lines += [
            f"served: {served.kind}, {served.modules} modules ({', '.join(served.targets)})",
            f"ranks: {', '.join(map(str, served.ranks)) or '-'}",
            f"size: {served.parameters:,} parameters, {', '.join(served.dtypes)}, "
            f"{served.bytes:,} bytes",
        ]
    if served is not None and served.invocation:
        tokens = ", ".join(map(str, served.invocation))
        lines.append(f"activated by: the tokens {tokens}, where they stand last in a prompt")
    if served is not None and served.digest is not None:
        lines.append(f"digest: {served.digest}")
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines += [f"not checked: {what}" for what in report.not_checked]
    if refused is not None:
        where = "".join(f"{part}: " for part in (refused.file, refused.key) if part is not None)
        lines += [f"refused: {where}{refused.problem}", f"to mend it: {refused.remedy}"]
    return lines
