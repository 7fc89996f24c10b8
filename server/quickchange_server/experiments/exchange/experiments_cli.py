"""The command `quickchange experiments`: a running server's experiments, as gateways have them.

A server is asked, since it alone knows the names that an experiment's variants may have. Errors
go to standard error, with exit status 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from quickchange_server.experiments.exchange.model_rewrite import KIND

app = typer.Typer(
    name="experiments",
    help="Exchange experiments with gateways, as InferenceModelRewrite.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

SECONDS = 60.0  # for an answer; a server that reads its store first takes some
ROUTE = "v1/model-rewrites"

UrlOption = Annotated[str, typer.Option("--url", help="The server's address.")]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="QUICKCHANGE_API_KEY", help="A key of the scope manage."),
]
HERE = "http://127.0.0.1:8000"


@app.command("export")
def export_rewrite(
    name: Annotated[str, typer.Argument(help="The experiment's name.")],
    pool: Annotated[str, typer.Option("--pool", help="The InferencePool that it rewrites for.")],
    url: UrlOption = HERE,
    api_key: KeyOption = None,
) -> None:
    """Print an experiment's present shares as an InferenceModelRewrite, for `kubectl apply -f -`.

    What the resource can't say is named on standard error.
    """
    answer = _ask(url, api_key, "GET", f"{ROUTE}/{quote(name)}", params={"pool": pool})
    _tell(answer["left_out"])
    typer.echo(json.dumps(answer["rewrite"], indent=2))


@app.command("import")
def import_rewrite(
    file: Annotated[
        Path, typer.Argument(help="The resource, YAML or JSON; - reads it from stdin.")
    ],
    url: UrlOption = HERE,
    api_key: KeyOption = None,
) -> None:
    """Define an experiment for each model that an InferenceModelRewrite splits.

    Resources of other kinds in the file are passed over. Prints the experiments' names; what could
    not be taken is named on standard error.
    """
    for resource in _resources(file):
        answer = _ask(url, api_key, "POST", ROUTE, json=resource)
        _tell(answer["left_out"])
        for experiment in answer["data"]:
            typer.echo(experiment["id"])


def _resources(file: Path) -> Iterator[Any]:
    """The rewrites of a file, also of one that lists several. Exits where there are none."""
    import yaml

    text = sys.stdin.read() if str(file) == "-" else file.read_text()
    try:
        documents = [one for one in yaml.safe_load_all(text) if one is not None]
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{file} is neither YAML nor JSON: {error}") from error
    listed = [each for one in documents for each in (_items(one) or [one])]
    rewrites = [one for one in listed if isinstance(one, dict) and one.get("kind") == KIND]
    if not rewrites:
        raise typer.BadParameter(f"{file} has no resource of the kind {KIND}")
    yield from rewrites


def _items(document: Any) -> list[Any]:
    """What a List of Kubernetes' holds; nothing for another resource."""
    items = document.get("items") if isinstance(document, dict) else None
    return items if isinstance(items, list) else []


def _ask(url: str, api_key: str | None, method: str, path: str, **given: Any) -> Any:
    """The server's answer. Exits with its own words where it refuses."""
    import httpx

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    address = f"{url.rstrip('/')}/{path}"
    response = httpx.request(method, address, headers=headers, timeout=SECONDS, **given)
    if response.is_success:
        return response.json()
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = f"{address} answers {response.status_code}; is it a Quickchange server?"
    typer.echo(f"quickchange: {said}", err=True)
    raise typer.Exit(1)


def _tell(left_out: list[str]) -> None:
    for line in left_out:
        typer.echo(f"left out: {line}", err=True)
