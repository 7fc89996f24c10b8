"""The command `quickchange keys`, which manages API keys directly in the database.

The first key can thus be made before any server runs; running servers notice a change within a
second or two. Errors go to standard error, with exit status 1.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, TypeVar

import typer
from sqlalchemy import Connection

from quickchange_server.config import default_database
from quickchange_server.errors import QuickchangeError
from quickchange_server.frontend.caller import SCOPES, Scope
from quickchange_server.storage.database import Database
from quickchange_server.tenants import key_records
from quickchange_server.tenants.key import MAX_LIMIT, Key, Limits, Terms, names_of

T = TypeVar("T")

DAY = 86_400.0  # seconds

app = typer.Typer(
    name="keys",
    help="Create, list, rotate and revoke API keys.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

DatabaseOption = Annotated[
    str | None,
    typer.Option("--database", envvar="QUICKCHANGE_DATABASE", help="As of `quickchange serve`."),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="QUICKCHANGE_STORE",
        help="Store whose local folder holds the database where --database is not given.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyArgument = Annotated[str, typer.Argument(help="The key's public id.")]


def _limit(name: str, what: str) -> Any:
    return typer.Option(f"--{name}", min=1, max=MAX_LIMIT, help=f"{what}; default: no limit.")


@app.command()
def create(
    tenant: Annotated[str, typer.Option("--tenant", help="Whose key it is.")],
    scope: Annotated[
        str, typer.Option("--scope", help=" | ".join(SCOPES), autocompletion=lambda: [*SCOPES])
    ] = "infer",
    names: Annotated[
        list[str] | None,
        typer.Option("--names", help="Glob of names that exist for it; may be given again."),
    ] = None,
    label: Annotated[str, typer.Option("--label", help="What it is for.")] = "",
    days: Annotated[
        float | None, typer.Option("--days", min=0, help="Until it expires; default: never.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, _limit("requests-per-minute", "Requests of any minute")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, _limit("tokens-per-minute", "Tokens of any minute, prompts and answers")
    ] = None,
    concurrent_requests: Annotated[
        int | None, _limit("concurrent-requests", "Requests at once")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, _limit("max-prompt-tokens", "Prompt tokens of a request")
    ] = None,
    max_new_tokens: Annotated[
        int | None, _limit("max-new-tokens", "New tokens of a request")
    ] = None,
    database: DatabaseOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print its secret, which is shown this once."""
    now = time.time()
    with_scope = _scope(scope)
    limits = Limits(
        requests_per_minute,
        tokens_per_minute,
        concurrent_requests,
        max_prompt_tokens,
        max_new_tokens,
    )
    expires = None if days is None else now + days * DAY

    with _errors_shown():  # before a database is made
        terms = Terms(tenant, with_scope, names_of(with_scope, names), label, limits, expires)
    change = partial(key_records.create, terms=terms, now=now)
    _print_secret(*_in_database(database, store, change, create=True), as_json)


@app.command("list")
def list_keys(
    database: DatabaseOption = None, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """List the keys, revoked and expired ones too."""
    keys = _in_database(database, store, key_records.every)
    if as_json:
        typer.echo(json.dumps([_shown(key) for key in keys], indent=2))
        return
    rows = [("ID", "TENANT", "SCOPE", "STATE", "EXPIRES", "NAMES", "LABEL")]
    for key in keys:
        terms = key.terms
        names = ",".join(terms.names)
        state, expires = key.state(time.time()), _date(terms.expires)
        rows.append((key.id, terms.tenant, terms.scope, state, expires, names, terms.label))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


@app.command()
def revoke(key: KeyArgument, database: DatabaseOption = None, store: StoreOption = None) -> None:
    """End a key for good."""
    revoked = _in_database(
        database, store, partial(key_records.revoke, key_id=key, now=time.time())
    )
    typer.echo(f"revoked {revoked.id} of {revoked.terms.tenant}")


@app.command()
def rotate(
    key: KeyArgument,
    overlap: Annotated[
        float, typer.Option("--overlap", min=0, help="Seconds that the old secret works on.")
    ] = DAY,
    database: DatabaseOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a key a new secret and print it, this once."""
    change = partial(key_records.rotate, key_id=key, overlap=overlap, now=time.time())
    _print_secret(*_in_database(database, store, change), as_json)


def _scope(text: str) -> Scope:
    for scope in SCOPES:
        if text == scope:
            return scope
    raise typer.BadParameter(f"must be one of {', '.join(SCOPES)}", param_hint="--scope")


def _in_database(
    url: str | None, store: str | None, change: Callable[[Connection], T], *, create: bool = False
) -> T:
    if url is None:
        if store is None:
            raise typer.BadParameter("give --database or --store", param_hint="--database")
        url = default_database(store)
    opened = url

    async def work() -> T:
        database = await asyncio.to_thread(partial(Database.open, opened, create=create))
        try:
            return await database.write(change)
        finally:
            await database.close()

    with _errors_shown():
        return asyncio.run(work())


@contextmanager
def _errors_shown() -> Iterator[None]:
    try:
        yield
    except QuickchangeError as error:
        typer.echo(f"quickchange: {error}", err=True)
        raise typer.Exit(1) from error


def _print_secret(key: Key, secret: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**_shown(key), "secret": secret}, indent=2))
        return
    typer.echo(f"key {key.id} of {key.terms.tenant}; its secret is shown this once:", err=True)
    typer.echo(secret)


def _shown(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        **asdict(key.terms),
        "state": key.state(time.time()),
        "created": key.created,
        "revoked": key.revoked,
    }


def _date(seconds: float | None) -> str:
    return (
        "never"
        if seconds is None
        else datetime.fromtimestamp(seconds, UTC).isoformat("T", "minutes")
    )
