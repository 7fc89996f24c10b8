"""`quickchange adapters …`: the store on the command line.

Every command prints a table, or JSON with `--json`; errors go to standard error with exit status 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from quickchange_store.checking.check_command import check
from quickchange_store.combining.compose_command import compose_command
from quickchange_store.errors import StoreError, os_error_line
from quickchange_store.exporting import ExportLayout, export_adapter
from quickchange_store.hub_access import look_for_hub
from quickchange_store.index import Version
from quickchange_store.info import AdapterInfo
from quickchange_store.sources.adapter_url import adapter_url, is_url
from quickchange_store.store import GC_MIN_AGE, Store

app = typer.Typer(
    name="adapters",
    help="Add, list, version and remove adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(check)
app.command("compose")(compose_command)

StoreOption = Annotated[
    str,
    typer.Option("--store", envvar="QUICKCHANGE_STORE", help="The store: a folder, or a URL."),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", envvar="QUICKCHANGE_MODEL", help="Base model to check against."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


_SHOWN_LABELS = 20
_COLUMNS = (
    *("NAME", "VERSION", "DIGEST", "KIND", "RANK"),
    *("TARGETS", "PARAMETERS", "SIZE", "CREATED"),
)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    place: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|URL",
            help="The adapter: a folder (PEFT, AdapterHub, Medusa heads), or where it lies: "
            "hf://OWNER/NAME[@REVISION], s3://BUCKET/PREFIX, gs://…, oci://REGISTRY/NAME:TAG.",
        ),
    ],
    store: StoreOption,
    model: ModelOption,
    approximate_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Serve what has no low rank by the nearest update of this rank; `show` states "
            "its error.",
        ),
    ] = None,
    exact_rank: Annotated[
        int,
        typer.Option(min=1, help="Highest rank of a module up to which an update is exact."),
    ] = 256,
    as_json: JsonOption = False,
) -> None:
    """Check an adapter against the base model and publish it as the version that NAME serves."""
    from quickchange_store.base_model.base_spec import base_spec  # imports torch: seconds
    from quickchange_store.formats.rank_limits import RankLimits
    from quickchange_store.importing import add_adapter, add_from_url

    with _errors_shown():
        look_for_hub(model)
        url = adapter_url(place) if is_url(place) else None
        opened, base = Store(store), base_spec(model)
        limits = RankLimits(exact_rank, approximate_rank)
        if url is None:
            added = add_adapter(opened, name, Path(place), base, limits)
        else:
            added = add_from_url(opened, name, url, base, limits)
        for warning in added.warnings:
            typer.echo(f"warning: {warning}", err=True)
        if as_json:
            _print_json({**_version(added.version), "warnings": list(added.warnings)})
        else:
            typer.echo(f"{added.version}  {added.version.digest}")


@app.command("list")
def list_adapters(store: StoreOption, as_json: JsonOption = False) -> None:
    """List the adapters with the version that each serves, and the aliases."""
    with _errors_shown():
        opened = Store.at(store)
        index = opened.snapshot()
        serving = [e.versions[e.current] for _, e in sorted(index.entries.items())]
        aliases = {alias: str(target) for alias, target in sorted(index.aliases.items())}
        turbo = {a: t.turbo for a, t in sorted(index.aliases.items()) if t.turbo is not None}
        described = [_described(opened, version) for version in serving]
        if as_json:
            _print_json({"adapters": described, "aliases": aliases, "turbo": turbo})
            return
        _print_table(
            _COLUMNS,
            [_row(entry) for entry in described],
        )
        if aliases:
            typer.echo()
            rows = [(alias, target, turbo.get(alias, "-")) for alias, target in aliases.items()]
            _print_table(("ALIAS", "TARGET", "TURBO"), rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or an alias.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Show one adapter: what NAME serves, and every version of it."""
    with _errors_shown():
        opened = Store.at(store)
        resolved = opened.resolve(name)
        versions = opened.versions(resolved.name)
        found = next(version for version in versions if version.number == resolved.version)
        detail = {
            **_described(opened, found),
            "path": opened.address(resolved.digest),
            "versions": [_version(version) for version in versions],
            "aliases": {
                alias: str(target)
                for alias, target in opened.aliases().items()
                if target.name == resolved.name
            },
            "drafts_with": resolved.turbo,
        }
        if as_json:
            _print_json(detail)
            return
        detail["approximation"] = _approximation_line(detail["approximation"])
        detail["turbo"] = _turbo_line(detail["turbo"])
        detail["classifier"] = _classifier_line(detail["classifier"])
        detail["tokenizer"] = _tokenizer_line(detail["tokenizer"])
        detail["terms"] = _terms_line(detail["terms"])
        _print_table(("FIELD", "VALUE"), [(key, _cell(value)) for key, value in detail.items()])


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or an alias.")],
    directory: Annotated[Path, typer.Argument(help="Folder to write, which must not exist yet.")],
    store: StoreOption,
    model: ModelOption,
    layout: Annotated[
        ExportLayout,
        typer.Option(
            "--format",
            help="lorax: LoRA and Medusa heads; vllm: the heads alone, as vLLM's Medusa; peft: the "
            "LoRA alone; turbo: LoRA, and heads of any kind.",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as a folder that other tools, or `add`, read."""
    from quickchange_store.base_model.base_spec import base_spec  # imports torch: seconds

    with _errors_shown():
        opened = Store.at(store)
        look_for_hub(model)
        adapter = opened.load(opened.resolve(name).digest)
        written = export_adapter(adapter, directory, layout, base_spec(model))
        if as_json:
            _print_json({"directory": str(directory), "parts": list(written)})
        else:
            typer.echo(f"wrote {' and '.join(written)} to {directory}")


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="NAME, or NAME@VERSION.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Remove an adapter, or one version of it; `gc` frees the space."""
    with _errors_shown():
        removed = Store.at(store).remove(name)
        _report([_version(version) for version in removed], as_json, "removed")


@app.command()
def alias(
    alias: Annotated[str, typer.Argument(help="The alias.")],
    target: Annotated[str, typer.Argument(help="NAME (what it serves) or NAME@VERSION.")],
    store: StoreOption,
    turbo: Annotated[
        str | None,
        typer.Option("--turbo", help="NAME or NAME@VERSION of the heads that draft for it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at an adapter and at the Turbo that drafts for it, in one step."""
    with _errors_shown():
        pointer = Store.at(store).alias(alias, target, turbo)
        if as_json:
            _print_json({"alias": alias, "target": str(pointer), "turbo": pointer.turbo})
        else:
            drafts = "" if pointer.turbo is None else f", drafts with {pointer.turbo}"
            typer.echo(f"{alias} -> {pointer}{drafts}")


@app.command()
def unalias(
    alias: Annotated[str, typer.Argument(help="The alias.")],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Remove an alias."""
    with _errors_shown():
        Store.at(store).unalias(alias)
        if as_json:
            _print_json({"alias": alias, "target": None})
        else:
            typer.echo(f"removed {alias}")


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    store: StoreOption,
    version: Annotated[
        int | None, typer.Argument(help="The version to serve; default: the one before.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let NAME serve an earlier version, or any of its versions."""
    with _errors_shown():
        served = Store.at(store).rollback(name, version)
        _report([_version(served)], as_json, "serving")


@app.command()
def verify(store: StoreOption, as_json: JsonOption = False) -> None:
    """Recompute every digest; exit status 1 where something is wrong."""
    with _errors_shown():
        problems = Store.at(store).verify()
        if as_json:
            _print_json([{"subject": p.subject, "what": p.what} for p in problems])
        else:
            for problem in problems:
                typer.echo(str(problem), err=True)
            typer.echo("all versions are intact" if not problems else f"{len(problems)} problems")
    if problems:
        raise typer.Exit(1)


@app.command()
def gc(
    store: StoreOption,
    min_age: Annotated[
        float, typer.Option("--min-age", min=0, help="Seconds since a version was removed.")
    ] = GC_MIN_AGE,
    as_json: JsonOption = False,
) -> None:
    """Free the space of removed versions and of interrupted writes."""
    with _errors_shown():
        done = Store.at(store).gc(min_age)
        if as_json:
            _print_json(
                {
                    "versions": list(done.versions),
                    "temporaries": done.temporaries,
                    "bytes": done.bytes,
                    "waiting": asdict(done.waiting),
                }
            )
            return
        typer.echo(
            f"removed {len(done.versions)} versions and {done.temporaries} temporary entries, "
            f"{_size(done.bytes)}"
        )
        waiting = done.waiting
        if waiting.until is not None:
            typer.echo(
                f"kept {waiting.versions} removed versions, {_size(waiting.bytes)}: requests that "
                f"found them before may load them; `gc` frees them from {_time(waiting.until)} on, "
                "or now with --min-age 0 where no server runs"
            )


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Turn an expected error into one line on standard error and exit status 1."""
    try:
        yield
    except StoreError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"error: {os_error_line(error)}", err=True)
        raise typer.Exit(1) from None


def _version(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.number,
        "digest": version.digest,
        "created": _time(version.created),
    }


def _described(store: Store, version: Version) -> dict[str, Any]:
    info = store.info(version.digest)
    return {
        **_version(version),
        "kind": info.kind,
        "architecture": info.architecture,
        "base_name": info.base_name,
        "ranks": list(info.ranks),
        "targets": list(info.targets),
        "modules": info.modules,
        "parameters": info.parameters,
        "dtypes": list(info.dtypes),
        "bytes": info.size,
        "approximation": info.source.get("approximation"),
        "turbo": _turbo(info),
        "classifier": None if info.classifier is None else asdict(info.classifier),
        "tokenizer": None if info.tokenizer is None else asdict(info.tokenizer),
        "terms": info.source.get("terms") if info.composition else None,
        "invocation": list(info.invocation),
        "virtual_tokens": 0 if info.prompt is None else info.prompt.tokens,
    }


def _approximation_line(stated: dict[str, Any] | None) -> str:
    """What an update that could not be served exactly differs by, relative to its own size."""
    if stated is None:
        return "-"
    return (
        f"rank {stated['rank']} at most, relative error {stated['relative_error']:.2%}; at worst "
        f"{stated['worst_relative_error']:.2%} ({stated['worst_module'] or 'no module'})"
    )


def _turbo(info: AdapterInfo) -> dict[str, Any] | None:
    """The Turbo part in figures, beside what as many Medusa-1 heads would need."""
    if info.turbo is None:
        return None
    known = info.base_vocabulary
    medusa = None if known is None else info.turbo.medusa_parameters(known)
    return {
        "heads": info.turbo.depth,
        "sequential": info.turbo.sequential,
        "vocabulary": info.turbo.vocabulary,
        "own_lm_heads": info.turbo.own_outputs,
        "tenant": info.turbo.tenant,
        "hidden": info.turbo.hidden,
        "parameters": info.turbo.parameters,
        "medusa_parameters": medusa,
        "fewer_than_medusa": None if medusa is None else medusa / info.turbo.parameters,
    }


def _turbo_line(turbo: dict[str, Any] | None) -> str:
    if turbo is None:
        return "-"
    drafted = "all" if turbo["vocabulary"] is None else f"{turbo['vocabulary']:,}"
    line = (
        f"{turbo['heads']} {'sequential' if turbo['sequential'] else 'parallel'} heads, "
        f"{drafted} tokens, {'own LM heads' if turbo['own_lm_heads'] else 'shared LM head'}, "
        f"{turbo['parameters']:,} parameters"
        f"{'' if turbo['tenant'] is None else ', for the tenant ' + turbo['tenant'] + ' alone'}"
    )
    if turbo["medusa_parameters"] is None:
        return line
    return (
        f"{line}; Medusa-1 has {turbo['medusa_parameters']:,} for as many heads, "
        f"{turbo['fewer_than_medusa']:.1f}x"
    )


def _terms_line(terms: list[dict[str, Any]] | None) -> str:
    """The terms of a composition as they were given."""
    if terms is None:
        return "-"
    return ", ".join(
        f"{term['weight']:g} {term['adapter']}"
        + (f" from {term['begin']} to {term['end'] or 'the end'}" if "begin" in term else "")
        + (f" with {len(term['scales'])} scales" if "scales" in term else "")
        for term in terms
    )


def _tokenizer_line(tokenizer: dict[str, Any] | None) -> str:
    """What the adapter's tokenizer adds to the base's."""
    if tokenizer is None:
        return "-"
    template = " and a chat template" if tokenizer["template"] else ""
    return f"{tokenizer['tokens']} tokens of its own{template}, {tokenizer['rows']:,} rows in all"


def _classifier_line(classifier: dict[str, Any] | None) -> str:
    """The classification head in words: how many classes, and what they are called."""
    if classifier is None:
        return "-"
    labels = classifier["labels"]
    more = f", … {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
    return (
        f"classes by {classifier['activation']}: {', '.join(labels[:_SHOWN_LABELS])}{more} "
        f"({len(labels)} in all)"
    )


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        entry["name"],
        str(entry["version"]),
        entry["digest"][:12],
        entry["kind"] or "-",
        ",".join(str(rank) for rank in entry["ranks"]) or "-",
        ",".join(entry["targets"]) or "-",
        f"{entry['parameters']:,}",
        _size(entry["bytes"]),
        entry["created"],
    )


def _report(versions: Sequence[dict[str, Any]], as_json: bool, verb: str) -> None:
    if as_json:
        _print_json(list(versions))
        return
    for version in versions:
        typer.echo(f"{verb} {version['name']}@{version['version']}  {version['digest']}")


def _cell(value: Any) -> str:
    if value in (None, "", [], {}):
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} -> {target}" for key, target in value.items())
    if isinstance(value, list):
        parts = [
            f"{v['version']} ({v['digest'][:12]})" if isinstance(v, dict) else v for v in value
        ]
        return ", ".join(str(part) for part in parts)
    return str(value)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _size(count: int) -> str:
    """Bytes for people, in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
