"""What the command line says of errors that are no fault of the program.

Libraries' errors are known by name, so that no library is imported for them.
"""

from __future__ import annotations

from typing import Any

from quickchange_store.errors import os_error_line


def expected_error(error: BaseException) -> str | None:
    """What to print of an error that is no fault of the program; None for any other."""
    if isinstance(error, BaseExceptionGroup):
        lines = [expected_error(each) for each in error.exceptions]
        return None if None in lines else lines[0]
    if isinstance(error, ModuleNotFoundError):
        return _missing_module(error)
    kinds = _kinds(error)
    if "typer.UsageError" in kinds:
        return _misused(error)
    if "httpx.RequestError" in kinds:
        return _unanswered(error)
    if isinstance(error, OSError):
        return os_error_line(error)
    if kinds & _SAYING_ALL:
        return str(error)
    return None


def is_help(error: BaseException) -> bool:
    """True for a command that was given nothing: it is told all that it takes."""
    return "typer.NoArgsIsHelpError" in _kinds(error)


def _kinds(error: BaseException) -> set[str]:
    """The names of an error's classes, each after its distribution's."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).mro()}


# Errors whose message names the fault and the remedy.
_SAYING_ALL = {
    "httpx.InvalidURL",
    "pydantic_core.ValidationError",
    "quickchange_server.QuickchangeError",
    "quickchange_store.StoreError",
    "quickchange_training.DemoBaseError",
    "quickchange_training.TrainingError",
    "sqlalchemy.DBAPIError",
}
_EXTRAS = {
    "faker": "train",
    "jsonschema": "bench",
    "matplotlib": "eval",
    "opentelemetry": "traces",
    "psutil": "bench",
    "psycopg": "postgres",
    "ray": "ray",
}


def _misused(error: Any) -> str:
    """What to say of a typer.UsageError: the fault, what may have been meant, where it is told."""
    if is_help(error):
        return str(error.format_message())
    near = getattr(error, "possibilities", None)  # the likeliest option first
    said = f"{error.message}; did you mean {near[0]}?" if near else error.format_message()
    said = said.rstrip(".").replace("Value error, ", "")
    if error.ctx is None:
        return said
    mark = "" if said.endswith("?") else ";"
    return f"{said}{mark} `{error.ctx.command_path} --help` tells what it takes"


def _missing_module(error: ModuleNotFoundError) -> str | None:
    module = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(module)
    if extra is None:
        return None
    return f"this needs {module}, which is not installed: pip install 'quickchange[{extra}]'"


def _unanswered(error: BaseException) -> str:
    """What to say of an httpx.RequestError."""
    try:
        url = str(error.request.url)  # type: ignore[attr-defined]
    except RuntimeError:  # no request was made
        return f"{error}; give an address as http://HOST:PORT with --url"
    return (
        f"no answer from {url} ({error or type(error).__name__}); start a server with "
        "`quickchange serve`, or say with --url where it is"
    )
