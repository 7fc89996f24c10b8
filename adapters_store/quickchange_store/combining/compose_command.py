"""`quickchange adapters compose`: a weighted sum of adapters under a name."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from quickchange_store.combining.composing import GivenTerm, compose
from quickchange_store.errors import InvalidAdapterError, StoreError
from quickchange_store.store import Store


def compose_command(
    name: Annotated[str, typer.Argument(help="The composition's name.")],
    terms: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER=WEIGHT …",
            help="Adapters of the store and their weights; without one the weight is 1.",
        ),
    ],
    store: Annotated[
        str,
        typer.Option("--store", envvar="QUICKCHANGE_STORE", help="The store: a folder, or a URL."),
    ],
    scale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADAPTER:MODULES=FACTOR",
            help="Factor of single modules, by a pattern of their paths such as *.mlp.*; "
            "repeatable, the first that fits counts.",
        ),
    ] = None,
    span: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADAPTER:BEGIN:END",
            help="Positions of the text (tokens, from 0) that an adapter serves; an END left out "
            "is the text's.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Publish a weighted sum of adapters as the version that NAME serves, exactly."""
    try:
        given = _given(terms, scale or [], span or [])
        version = compose(Store.at(store), name, given)
    except StoreError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        told = {"name": version.name, "version": version.number, "digest": version.digest}
        typer.echo(json.dumps(told, indent=2))
    else:
        typer.echo(f"{version}  {version.digest}")


def _given(terms: Sequence[str], scales: Sequence[str], spans: Sequence[str]) -> list[GivenTerm]:
    """The terms as options give them. Raises InvalidAdapterError."""
    given: dict[str, GivenTerm] = {}
    for term in terms:
        reference, _, weight = term.partition("=")
        if reference in given:
            raise _bad(term, "name each adapter once")
        given[reference] = GivenTerm(reference, _number(term, weight or "1"))
    for scale in scales:
        left, _, factor = scale.rpartition("=")
        reference, _, pattern = left.partition(":")
        if reference not in given or not pattern:
            raise _bad(scale, "give ADAPTER:MODULES=FACTOR, of an adapter that is composed")
        factors = {**given[reference].scales, pattern: _number(scale, factor)}
        given[reference] = replace(given[reference], scales=factors)
    for span in spans:
        reference, _, place = span.partition(":")
        begin, _, end = place.partition(":")
        numbers = (begin or "0", end or "0")
        if reference not in given or not all(map(str.isdecimal, numbers)):
            raise _bad(span, "give ADAPTER:BEGIN:END, of an adapter that is composed")
        bounds = int(numbers[0]), int(end) if end else None
        given[reference] = replace(given[reference], begin=bounds[0], end=bounds[1])
    return list(given.values())


def _number(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _bad(option, "give a number behind the =")
    return number


def _bad(option: str, remedy: str) -> InvalidAdapterError:
    return InvalidAdapterError("this term can't be read", key=option, remedy=remedy)
