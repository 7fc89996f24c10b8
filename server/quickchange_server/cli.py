"""The command `quickchange`: serve, cluster, plan, warm-cache, adapters, keys, experiments, train …

A command's modules are imported only when it runs, so that `quickchange --help` is quick.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typer.main import get_command

from quickchange_server.cli_errors import expected_error, is_help

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

DEMO = "demo"
SUB_APPS = {
    "adapters": ("quickchange_store.cli", "Add, list, alias, verify and remove adapters."),
    "keys": ("quickchange_server.tenants.cli", "Create, list, rotate and revoke API keys."),
    "experiments": (
        "quickchange_server.experiments.exchange.experiments_cli",
        "Exchange experiments with gateways.",
    ),
    "database": ("quickchange_server.storage.cli", "Move what the server keeps elsewhere."),
    "train": ("quickchange_training.cli", "Train adapters."),
    "eval": ("quickchange_training.evaluation.cli", "Compare adapters on a task of your own."),
    "bench": ("quickchange_bench.cli", "Measure servers and kernels."),
}


class Commands(TyperGroup):
    """The commands, of which those of `SUB_APPS` are imported when they are meant."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in SUB_APPS:
            command = get_command(importlib.import_module(SUB_APPS[name][0]).app)
            _tell_whole(command)
        return name, command, rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        _tell_whole(self)
        super().format_commands(ctx, formatter)


def _tell_whole(command: Any) -> None:
    """Have a group's help tell each command's first paragraph, which it would cut to a line."""
    for each in getattr(command, "commands", {}).values():
        each.short_help = each.short_help or " ".join((each.help or "").split("\n\n")[0].split())


PROGRAM = "quickchange"
COMPLETING = "_QUICKCHANGE_COMPLETE"  # the variable by which a shell's script asks what may follow

app = typer.Typer(
    name=PROGRAM,
    cls=Commands,
    help="Multi-adapter inference server: one frozen base model, thousands of small adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def serve_command() -> Callable[..., None]:
    """The function `serve`, with an option for every field of `Settings`."""

    def serve(**given: Any) -> None:
        """Serve the base model and the store's adapters over HTTP.

        Every option can be given in the environment as well: QUICKCHANGE_MODEL, QUICKCHANGE_PORT,
        and so on; an option wins over the environment.
        """
        from quickchange_server.entrypoints.serve import serve as launch

        demo, modules = bool(given.pop("demo")), given.pop("lora_modules")
        settings = {name: value for name, value in given.items() if value is not None}
        launch(settings, demo=demo, modules=modules)

    demo_help = "serve the demo model and its adapters, fetched and made ready once"
    modules_help = "adapters to add to the store first: NAME=FOLDER …, as vLLM has it"
    return _with_settings(
        serve,
        demo=(False, Annotated[bool, typer.Option("--demo", help=demo_help)]),
        lora_modules=([], Annotated[list[str], typer.Option("--lora-modules", help=modules_help)]),
    )


def cluster_command() -> Callable[..., None]:
    """The function `cluster`, with an option for every field of `Settings`, and its own."""
    from quickchange_server.cluster.cluster_settings import ClusterSettings
    from quickchange_server.config import Settings

    def cluster(**given: Any) -> None:
        """Serve on several engines, of one machine or many, with Ray Serve.

        Joins the Ray at RAY_ADDRESS, or starts one on this machine, deploys the application and
        waits until its replicas run. The signal that ends the command removes the application, and
        Ray with it where it was started here. Takes the options and the environment of `serve`.
        """
        from quickchange_server.cluster.start import cluster as launch

        detach = bool(given.pop("detach"))
        launch({name: value for name, value in given.items() if value is not None}, detach=detach)

    detach_help = "with RAY_ADDRESS: return once the application runs, and leave it there"
    return _with_settings(
        cluster,
        (Settings, ClusterSettings),
        detach=(False, Annotated[bool, typer.Option("--detach", help=detach_help)]),
    )


def plan_command() -> Callable[..., None]:
    """The function `plan`, with an option for every field of `Settings`."""

    def plan(**given: Any) -> None:
        """Print what the model would take of a device, and how many adapters fit.

        Takes the options and the environment of `serve`. No GPU is needed, and no weight is read.

        With --traffic: what that traffic would meet on many replicas, under three ways of routing.
        """
        gpu, ranks, trace = given.pop("gpu"), given.pop("ranks"), given.pop("traffic")
        many = {name: given.pop(name) for name in ("replicas", "policy", "measured")}
        settings = {name: value for name, value in given.items() if value is not None}
        if trace is None:
            from quickchange_server.entrypoints.plan_command import plan as run

            run(settings, gpu=gpu, ranks=ranks)
            return
        from quickchange_server.cluster.simulation.plan_traffic import plan_traffic

        typer.echo(plan_traffic(settings, trace=trace, gpu=gpu, ranks=ranks, **many))

    gpu_help = "GPU to plan for: h100, rtx4090, …, or a size such as 24GiB; default: a CPU"
    ranks_help = (
        "ranks of adapters to count, joined by commas; default: 8,16,32,64. With --traffic, the "
        "first is all adapters'"
    )
    traffic_help = (
        "plan for a trace (CSV, or JSON lines: time, adapter, prompt, output), or for traffic that "
        "is drawn: zipf:adapters=1000,alpha=1,rate=10,seconds=60,prompt=256,output=64"
    )
    replicas_help = "with --traffic: engine replicas"
    policy_help = "with --traffic: affinity | random | least-loaded; default: all three"
    measured_help = "with --traffic: file of a replica's prices and budgets, instead of --gpu's"
    return _with_settings(
        plan,
        gpu=(None, Annotated[str | None, typer.Option("--gpu", help=gpu_help)]),
        ranks=(None, Annotated[str | None, typer.Option("--ranks", help=ranks_help)]),
        traffic=(None, Annotated[str | None, typer.Option("--traffic", help=traffic_help)]),
        replicas=(2, Annotated[int, typer.Option("--replicas", help=replicas_help)]),
        policy=(None, Annotated[str | None, typer.Option("--policy", help=policy_help)]),
        measured=(None, Annotated[str | None, typer.Option("--measured", help=measured_help)]),
    )


def warm_cache_command() -> Callable[..., None]:
    """The function `warm-cache`, with an option for every field of `Settings`."""

    def warm_cache(**given: Any) -> None:
        """Compile ahead the kernels that `serve` with the same settings compiles at its start.

        The GPU need not be there, nor the model's weights: of the model only its configuration
        is read.
        """
        from quickchange_server.entrypoints.warm_cache import warm_cache as run

        gpu, out = given.pop("gpu"), given.pop("out")
        settings = {name: value for name, value in given.items() if value is not None}
        typer.echo(run(settings, gpu=gpu, out=out))

    gpu_help = "GPU to compile for: h100, sm_90, …; default: the one in this machine"
    out_help = "folder of the compiled kernels; default: Triton's cache (TRITON_CACHE_DIR)"
    return _with_settings(
        warm_cache,
        gpu=(None, Annotated[str | None, typer.Option("--gpu", help=gpu_help)]),
        out=(None, Annotated[Path | None, typer.Option("--out", help=out_help)]),
    )


def _with_settings(
    command: Callable[..., None],
    kinds: Sequence[type[BaseSettings]] = (),
    /,
    **own: tuple[object, object],
) -> Callable[..., None]:
    """The command with an option for every field of `kinds`, by default of `Settings`, then its
    own: each a default and an annotation."""
    from quickchange_server.config import Settings

    options = {
        name: (None, Annotated[_option_type(field.annotation), _option(name, field)])
        for kind in kinds or (Settings,)
        for name, field in kind.model_fields.items()
    } | own
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        for name, (default, annotation) in options.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _option_type(annotation: Any) -> Any:
    """The type that typer parses; pydantic checks the value again, with the setting's bounds."""
    for known in (bool, int, float):
        if annotation is known or annotation == known | None:
            return known | None
    return str | None


def _option(name: str, field: Any) -> Any:
    flag = "--" + name.replace("_", "-")
    if field.annotation in (bool, bool | None):
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    default = "" if field.is_required() or field.default is None else f" (default {field.default})"
    choices = _choices(field.annotation)
    told = "; ".join(part for part in (field.description or "", " | ".join(choices)) if part)
    complete = (lambda: choices) if choices else None
    return typer.Option(flag, help=told + default, show_default=False, autocompletion=complete)


def _choices(annotation: Any) -> list[str]:
    literal = "Literal" in str(annotation)
    return [str(choice) for choice in getattr(annotation, "__args__", ()) if literal]


def completion(
    shell: Annotated[
        Literal["bash", "zsh", "fish"], typer.Argument(help="The shell to complete in.")
    ],
) -> None:
    """Print a script that completes commands and options in a shell.

    Write it to the file where the shell looks for it; DIR is a folder of zsh's $fpath:

    \b
    bash  ~/.local/share/bash-completion/completions/quickchange
    zsh   DIR/_quickchange
    fish  ~/.config/fish/completions/quickchange.fish
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    script = get_completion_script(prog_name=PROGRAM, complete_var=COMPLETING, shell=shell)
    typer.echo(script)


def with_vllm_flags(arguments: list[str]) -> list[str]:
    """The arguments with vLLM's flags of `serve` as Quickchange's options."""
    if arguments[:1] != ["serve"]:
        return arguments
    from quickchange_server.config import Settings
    from quickchange_server.entrypoints.flags.vllm_flags import translated

    switches = {"--demo", "--help"}
    for name, field in Settings.model_fields.items():
        if field.annotation in (bool, bool | None):
            flag = name.replace("_", "-")
            switches |= {f"--{flag}", f"--no-{flag}"}
    made = translated(arguments[1:], switches)
    for line in made.lines:
        print(f"quickchange: {line}", file=sys.stderr)
    return ["serve", *made.arguments]


def with_demo_paths(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with `--model demo` and `--store demo` as the demo's own folders.

    The environment's QUICKCHANGE_MODEL and QUICKCHANGE_STORE are replaced likewise. Training and
    evaluation know the demo's base themselves, by its own name. `./demo` is a folder of that name.
    """
    places = {"--store": _demo_store}
    if command not in ("train", "eval"):
        places["--model"] = _demo_model
    given = list(arguments)
    for option, place in places.items():
        for number, argument in enumerate(given):
            if argument == f"{option}={DEMO}":
                given[number] = f"{option}={place()}"
            elif argument == DEMO and number and given[number - 1] == option:
                given[number] = place()
        variable = f"QUICKCHANGE_{option.removeprefix('--').upper()}"
        if os.environ.get(variable) == DEMO:
            os.environ[variable] = place()
    return given


def _demo_store() -> str:
    from quickchange_training.demo import demo_store_folder

    return str(demo_store_folder())


def _demo_model() -> str:
    from quickchange_training.demo import ensure_demo_base

    return str(ensure_demo_base())


app.command("serve")(serve_command())
app.command("cluster")(cluster_command())
app.command("plan")(plan_command())
app.command("warm-cache")(warm_cache_command())
for _name, (_, _summary) in SUB_APPS.items():
    app.command(_name, help=_summary)(lambda: None)  # stands for it until `resolve_command`
app.command("completion")(completion)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"quickchange {version_of('quickchange')}")
        raise typer.Exit


class Interrupted(SystemExit):
    """SIGINT or SIGTERM: ends the process with the shell's status for it, through all clean-up."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(128 + received)
        self.signal = received


def main() -> None:
    """Entry point of the console script: what is expected to go wrong is one line of error."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's and the like stay
            signal.signal(number, _interrupt)
    for library in ("torchao", "torch.utils._pytree"):  # they warn of GPU parts while imported
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        if COMPLETING in os.environ:
            from typer.completion import completion_init  # type: ignore[attr-defined]

            completion_init()  # typer knows the shells of its own scripts from then on
        given = with_demo_paths(*_command_of(with_vllm_flags(sys.argv[1:])))
        raise SystemExit(app(args=given, prog_name=PROGRAM, standalone_mode=False))
    except Interrupted as interrupted:
        print(f"quickchange: ended by {interrupted.signal.name}", file=sys.stderr)
        raise
    except BrokenPipeError:  # `quickchange … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        line = expected_error(error)
        if line is None:
            raise
        print(line if is_help(error) else f"error: {' '.join(line.split())}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", 1)) from None


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise Interrupted(signal.Signals(number))


def _command_of(arguments: list[str]) -> tuple[str, list[str]]:
    return next((a for a in arguments if not a.startswith("-")), ""), arguments
