"""`quickchange bench …`: the commands that measure."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import httpx
import typer

from quickchange_bench import provenance, report_tables
from quickchange_bench.bench_results import Load, Point, ServingResult, WorkloadSpec, medians
from quickchange_bench.load import own_server
from quickchange_bench.load.load_client import (
    DIALECT_NAMES,
    Client,
    DialectName,
    ServedNames,
    check_url,
)
from quickchange_bench.load.load_runner import LoadPlan, run_plan
from quickchange_bench.load.popularity import POPULARITIES, Popularity, PopularityName
from quickchange_bench.load.workload import Workload, parse_length
from quickchange_bench.models.random_adapters import PROJECTIONS, AdapterSpec, write_adapters
from quickchange_bench.models.random_base import SHAPES, write_base
from quickchange_bench.service import ab_test
from quickchange_bench.service import experiments_simulation as simulation
from quickchange_bench.service.adapters_at_scale import ScaleOptions, measure_scale, scale_table
from quickchange_bench.service.overhead import OverheadOptions, measure_overhead, overhead_table
from quickchange_bench.service.overhead_sides import PARTS, Part
from quickchange_store.errors import StoreError, os_error_line
from quickchange_store.store import Store

app = typer.Typer(
    help="Measure a server: ours, or any that speaks OpenAI's completions.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Command = TypeVar("Command", bound=Callable[..., None])


def _refusals(command: Command) -> Command:
    """Turn a benchmark's refusals into one message without a traceback, and exit status 1."""

    @wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except typer.Exit:  # a RuntimeError too
            raise
        except (ValueError, RuntimeError, OSError, StoreError) as error:
            said = os_error_line(error) if isinstance(error, OSError) else str(error)
            typer.echo(f"error: {' '.join(said.split())}", err=True)
            raise typer.Exit(2) from error

    return cast(Command, guarded)


def parse_loads(concurrency: str, rate: float | None) -> tuple[Load, ...]:
    """Parse `1,8,16` to closed loops, or a rate, where given, to one open loop."""
    if rate is not None:
        return (Load(rate=rate),)
    try:
        return tuple(Load(workers=int(part)) for part in concurrency.split(","))
    except ValueError as error:
        raise ValueError(f"--concurrency {concurrency!r}: give numbers, as in 1,8,16") from error


def adapter_names(listed: str, prefix: str, count: int) -> tuple[str, ...]:
    """Names of the adapters: those listed, or PREFIX0, PREFIX1, … up to `count`."""
    if listed and prefix:
        raise ValueError("give --adapters or --adapter-prefix, not both")
    if prefix:
        return tuple(f"{prefix}{k}" for k in range(count))
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _choice(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{option} {value!r} is none of {', '.join(known)}")
    return value


def _folder(model: Path) -> Path:
    if not model.is_dir():
        raise ValueError(
            f"--model {model}: no such folder; give one in transformers' layout, or demo"
        )
    return model


def _base(model: str) -> Path:
    """The folder of a base model, or the demo's for `demo`, made if it is not there."""
    from quickchange_training.demo import ensure_demo_base

    return ensure_demo_base() if model == "demo" else _folder(Path(model))


def _print_point(point: Point) -> None:
    s = point.summary
    typer.echo(
        f"round {point.round + 1}, {point.load.name}: {s.tokens_per_second:.1f} tok/s, "
        f"first token {report_tables.number(s.ttft_p50, 0, report_tables.MILLI)} ms, "
        f"{s.errors} errors",
        err=True,
    )
    for message in s.first_errors:
        typer.echo(f"  {message}", err=True)


@app.command()
@_refusals
def serving(
    url: Annotated[str, typer.Option(help="Where the server answers.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="The base model's name there.")] = "base",
    adapters: Annotated[str, typer.Option(help="Adapter names, with commas.")] = "",
    adapter_prefix: Annotated[str, typer.Option(help="Or their names' common beginning …")] = "",
    adapter_count: Annotated[int, typer.Option(min=1, help="… before 0, 1, 2, …")] = 8,
    popularity: Annotated[str, typer.Option(help=", ".join(POPULARITIES))] = "distinct",
    concurrency: Annotated[str, typer.Option(help="Closed loops of so many workers.")] = "1,8,16",
    rate: Annotated[
        float | None, typer.Option(help="Open loop instead: Poisson arrivals a second.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Requests a round (default: two a worker, at least 4).")
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA.")
    ] = "64",
    output_tokens: Annotated[str, typer.Option(help="Likewise.")] = "64",
    seed: Annotated[int, typer.Option(help="Of prompts, lengths, adapters and arrivals.")] = 0,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Short requests before each round.")] = 8,
    dialect: Annotated[str, typer.Option(help=", ".join(DIALECT_NAMES))] = "openai",
    pid: Annotated[
        int | None, typer.Option(help="The server's process: adds its CPU time and memory.")
    ] = None,
    label: Annotated[str, typer.Option(help="This result's name in tables.")] = "quickchange",
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it here, as PNG.")] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Load a server that isn't on this machine.")
    ] = False,
) -> None:
    """Throughput and latency of a running server. Without adapters: of its base model."""
    target = ServedNames(model, adapter_names(adapters, adapter_prefix, adapter_count))
    drawn = _choice("--popularity", popularity, POPULARITIES)
    chosen = (
        Popularity(cast(PopularityName, drawn), len(target.adapters), seed)
        if target.adapters
        else None
    )
    plan = LoadPlan(
        workload=Workload(parse_length(prompt_tokens), parse_length(output_tokens), chosen, seed),
        loads=parse_loads(concurrency, rate),
        repeat=repeat,
        requests=requests,
        warmup=warmup,
    )
    checked = check_url(url, allow_remote=allow_remote)
    tongue = cast(DialectName, _choice("--dialect", dialect, DIALECT_NAMES))
    httpx.get(checked, timeout=30)  # any answer: else every request of every round would fail
    started = provenance.now()
    points = asyncio.run(_serve_plan(checked, target, tongue, plan, pid))
    result = ServingResult(
        label=label,
        model=model,
        dialect=tongue,
        workload=WorkloadSpec(
            adapters=len(target.adapters),
            popularity=None if chosen is None else chosen.name,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            requests_per_worker=None if requests is not None else plan.requests_per_worker,
            requests=requests,
            warmup=warmup,
            repeat=repeat,
            seed=seed,
        ),
        machine=provenance.machine(),
        commit=provenance.commit(),
        command=provenance.command(),
        started=started,
        points=tuple(points),
        medians=medians(points),
    )
    typer.echo(f"### {label}\n\n{report_tables.describe(result)}\n")
    typer.echo(report_tables.serving_table(result))
    if out is not None:
        report_tables.save(result, out)
    if plot is not None:
        report_tables.plot([result], plot)
    if all(point.summary.errors == point.summary.requests for point in points):
        typer.echo("error: every request failed", err=True)
        raise typer.Exit(1)


async def _serve_plan(
    url: str, target: ServedNames, dialect: DialectName, plan: LoadPlan, pid: int | None
) -> list[Point]:
    # an open loop keeps as many in flight as it must
    connections = max([load.workers or 1024 for load in plan.loads])
    async with Client(url, target, dialect, connections=connections) as client:
        return await run_plan(client, plan, pid=pid, progress=_print_point)


@app.command()
@_refusals
def compare(
    files: Annotated[list[Path], typer.Argument(help="Results of `bench serving`.")],
    metric: Annotated[str, typer.Option(help="Which figure.")] = "tokens_per_second",
    plot: Annotated[Path | None, typer.Option(help="Draw all of them here, as PNG.")] = None,
) -> None:
    """Results side by side, and the first one's ratio to each other."""
    results = [report_tables.load_serving(path) for path in files]
    typer.echo(report_tables.comparison(results, metric))
    if plot is not None:
        report_tables.plot(results, plot)


@app.command("overhead")
@_refusals
def overhead_command(
    model: Annotated[Path, typer.Option(help="Base model: a folder in transformers' layout.")],
    of: Annotated[
        str, typer.Option(help="adapters, or service: keys, limits, usage and an experiment.")
    ] = "adapters",
    concurrency: Annotated[str, typer.Option(help="Closed loops of so many workers.")] = "1,8,16",
    repeat: Annotated[int, typer.Option(min=2, help="Pairs of rounds at each load.")] = 7,
    prompt_tokens: Annotated[str, typer.Option(help="As in `serving`.")] = "64",
    output_tokens: Annotated[str, typer.Option(help="As in `serving`.")] = "64",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the base model.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
) -> None:
    """What a part costs requests that need nothing of it: with it against without, by turns."""
    options = OverheadOptions(
        of=cast(Part, _choice("--of", of, PARTS)),
        model=_folder(model),
        loads=parse_loads(concurrency, None),
        repeat=repeat,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    result = measure_overhead(options, lambda text: typer.echo(text, err=True))
    typer.echo(overhead_table(result))
    if out is not None:
        report_tables.save(result, out)


@app.command("ab")
@_refusals
def ab_command(
    run: Annotated[str, typer.Argument(help="aa: the same twice; ab: the base and the adapter.")],
    url: Annotated[str, typer.Option(help="A server of the demo.")] = "http://127.0.0.1:8000",
    name: Annotated[str, typer.Option(help="Of the experiment; default: orders-RUN.")] = "",
    users: Annotated[int, typer.Option(min=2, help="Each asks once.")] = 640,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    minimum: Annotated[int, typer.Option(min=2, help="Users a variant before a decision.")] = 100,
    base: Annotated[str, typer.Option(help="The base model's name.")] = "SmolLM2-135M-Instruct",
    key: Annotated[
        str | None,
        typer.Option(help="An API key with the scope manage.", envvar="QUICKCHANGE_BENCH_KEY"),
    ] = None,
    allow_remote: Annotated[bool, typer.Option(help="Another machine's server.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
) -> None:
    """Run an experiment on the demo over HTTP, from its definition to a decision."""
    chosen = cast(ab_test.Run, _choice("RUN", run, ab_test.RUNS))
    options = ab_test.AbOptions(
        url=check_url(url, allow_remote=allow_remote),
        run=chosen,
        name=name or f"orders-{chosen}",
        base=base,
        users=users,
        concurrency=concurrency,
        minimum=minimum,
        key=key,
    )
    result = asyncio.run(ab_test.run_ab(options, typer.echo))
    if out is not None:
        report_tables.save(result, out)


@app.command("turbo")
@_refusals
def turbo_command(
    model: Annotated[
        str, typer.Option(help="Base model's folder, or demo for the demo's base.")
    ] = "demo",
    store: Annotated[
        str | None, typer.Option(help="Adapter store (default: a new one with the demo's).")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="With commas: the demo's tasks, and chat.")
    ] = "order-json,sql,docstring,chat",
    base_heads: Annotated[
        str, typer.Option(help="The adapter whose heads draft for the base in chat.")
    ] = "base-heads",
    concurrency: Annotated[
        str, typer.Option(help="Closed loops of so many workers.")
    ] = "1,4,8,16,32",
    repeat: Annotated[int, typer.Option(min=1, help="Pairs of rounds; medians are reported.")] = 3,
    requests_per_worker: Annotated[
        int, typer.Option(min=1, help="In a round; at least 8 requests in all.")
    ] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the base model.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
) -> None:
    """What drafts bring on the demo's held-out prompts and on chat: on against off, by turns."""
    from quickchange_bench.engine.turbo_bench import TurboOptions, measure_turbo, turbo_table

    options = TurboOptions(
        model=_base(model),
        store=None if store is None else Store.at(store).location,
        tasks=tuple(tasks.split(",")),
        base_heads=base_heads,
        loads=parse_loads(concurrency, None),
        repeat=repeat,
        requests_per_worker=requests_per_worker,
        device=device,
        dtype=dtype,
    )
    result = measure_turbo(options, lambda text: typer.echo(text, err=True))
    typer.echo(turbo_table(result))
    if out is not None:
        report_tables.save(result, out)
    if wrong := sum(gain.different for gain in result.gains):
        typer.echo(f"error: {wrong} answers with drafts differ from those without", err=True)
        raise typer.Exit(1)


@app.command("replay")
@_refusals
def replay_command(
    recording: Annotated[Path, typer.Option(help="File; what it lacks is recorded first.")],
    model: Annotated[
        str, typer.Option(help="Base model's folder, or demo for the demo's base.")
    ] = "demo",
    tasks: Annotated[
        str, typer.Option(help="With commas: the demo's tasks, and chat.")
    ] = "order-json,sql,chat",
    dtypes: Annotated[
        str, typer.Option(help="Whose prices: float32, bfloat16, int8.")
    ] = "float32,bfloat16,int8",
    concurrency: Annotated[str, typer.Option(help="Sequences at once.")] = "1,4,8,16,32",
    requests: Annotated[int, typer.Option(min=1, help="Recorded of each task.")] = 64,
) -> None:
    """Judge the purchase of drafts against oracles, on recorded outputs at measured prices."""
    from quickchange_bench.engine.replay_bench import ReplayOptions, replay_drafting, replay_table

    options = ReplayOptions(
        model=_base(model),
        recording=recording,
        tasks=tuple(tasks.split(",")),
        dtypes=tuple(dtypes.split(",")),
        lanes=tuple(map(int, concurrency.split(","))),
        requests=requests,
    )
    typer.echo(replay_table(replay_drafting(options, lambda text: typer.echo(text, err=True))))


@app.command("structured")
@_refusals
def structured_command(
    model: Annotated[
        str, typer.Option(help="Base model's folder, or demo for the demo's base.")
    ] = "demo",
    store: Annotated[
        str | None, typer.Option(help="Adapter store (default: a new one with the demo's).")
    ] = None,
    generations: Annotated[int, typer.Option(min=0, help="To judge, over ten schemas.")] = 200,
    first: Annotated[int, typer.Option(min=0, help="Seed of the first of them.")] = 0,
    concurrency: Annotated[
        str, typer.Option(help="Closed loops of so many workers, timed; empty for none.")
    ] = "1,8,16",
    requests_per_worker: Annotated[int, typer.Option(min=1, help="Of a closed loop.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
) -> None:
    """Answers under JSON schemas: valid, the same with drafts, and how fast beside free text."""
    from quickchange_bench.service.structured_bench import (
        StructuredOptions,
        measure_structured,
        structured_table,
    )

    options = StructuredOptions(
        model=_base(model),
        store=None if store is None else Store.at(store).location,
        generations=generations,
        first=first,
        concurrency=tuple(int(part) for part in concurrency.split(",") if part),
        requests_per_worker=requests_per_worker,
    )
    result = measure_structured(options, lambda text: typer.echo(text, err=True))
    typer.echo(structured_table(result))
    if out is not None:
        report_tables.save(result, out)
    if result.invalid or result.different:
        typer.echo("error: not every answer is valid and the same with drafts", err=True)
        raise typer.Exit(1)


@app.command("adapters-at-scale")
@_refusals
def adapters_at_scale(
    model: Annotated[Path, typer.Option(help="Base model: a folder in transformers' layout.")],
    adapters: Annotated[int, typer.Option(min=2, help="How many to register.")] = 500,
    resident: Annotated[int, typer.Option(min=2, help="How many the device budget holds.")] = 32,
    host_resident: Annotated[int, typer.Option(min=2, help="And the host budget.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Of every adapter.")] = 16,
    minutes: Annotated[float, typer.Option(min=0.1, help="Measured time.")] = 10.0,
    phase_seconds: Annotated[float, typer.Option(min=5, help="Of one phase.")] = 60.0,
    workers: Annotated[int, typer.Option(min=1, help="Background requests at once.")] = 4,
    steady: Annotated[int, typer.Option(min=1, help="Streams whose gaps are measured.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the base model.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of adapters, prompts and popularity.")] = 0,
    work_dir: Annotated[
        Path | None, typer.Option(help="For the adapters and the store (default: temporary).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
) -> None:
    """Many registered adapters, few resident: errors, memory over time, stalls by loads."""
    options = ScaleOptions(
        model=_folder(model),
        adapters=adapters,
        resident=resident,
        host_resident=host_resident,
        rank=rank,
        minutes=minutes,
        phase_seconds=phase_seconds,
        workers=workers,
        steady=steady,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    result = measure_scale(options, work_dir, lambda text: typer.echo(text, err=True))
    typer.echo(scale_table(result))
    if out is not None:
        report_tables.save(result, out)


@app.command("soak")
@_refusals
def soak_command(
    model: Annotated[
        str, typer.Option(help="Base model's folder, or demo for the demo's base.")
    ] = "demo",
    minutes: Annotated[float, typer.Option(min=0.1, help="Of load.")] = 30.0,
    adapters: Annotated[int, typer.Option(min=5, help="That come and go.")] = 500,
    workers: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    pool: Annotated[int, typer.Option(min=9, help="Different requests.")] = 180,
    stall_seconds: Annotated[
        float, typer.Option(min=1, help="After which a silent engine is taken for hung.")
    ] = 20.0,
    seed: Annotated[int, typer.Option(help="Of adapters, requests and their order.")] = 0,
    work_dir: Annotated[
        Path | None, typer.Option(help="For adapters, store and log (default: temporary).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
) -> None:
    """Everything at once for long, the engine killed and stopped: what is lost, what is left."""
    from quickchange_bench.service.soak import SoakOptions, measure_soak, soak_table
    from quickchange_training.demo import ensure_demo_base

    options = SoakOptions(
        model=ensure_demo_base() if model == "demo" else Path(model),
        adapters=adapters,
        pool=pool,
        workers=workers,
        minutes=minutes,
        stall_seconds=stall_seconds,
        seed=seed,
    )
    with own_server.working_folder(work_dir, "soak") as work:
        result = measure_soak(options, work, lambda text: typer.echo(text, err=True))
    typer.echo(soak_table(result))
    if out is not None:
        report_tables.save(result, out)
    if not result.holds:
        raise typer.Exit(1)


@app.command()
@_refusals
def step(
    model: Annotated[Path, typer.Option(help="Base model: a folder in transformers' layout.")],
    rows: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,8,16",
    adapters: Annotated[bool, typer.Option(help="Each row under an adapter of its own.")] = True,
    rank: Annotated[int, typer.Option(min=1, help="Of every adapter.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Context at the start.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Engine threads.")] = 2,
) -> None:
    """Show where a decode step's time goes, against the floor of the bytes it moves."""
    from tempfile import TemporaryDirectory

    from quickchange_bench.engine.step_profile import (
        profile_step,
        step_table,  # needs torch
    )

    for count in map(int, rows.split(",")):
        with TemporaryDirectory() as folder:
            found = profile_step(
                str(_folder(model)),
                Path(folder),
                rows=count,
                adapters=count if adapters else 0,
                rank=rank,
                prompt=prompt_tokens,
                threads=threads,
            )
        typer.echo(step_table([found]))


@app.command()
@_refusals
def host(
    sequences: Annotated[str, typer.Option(help="That decode together.")] = "1,16,64",
    device_ms: Annotated[float, typer.Option(min=0, help="Duration of the device's step.")] = 5.0,
    depths: Annotated[str, typer.Option(help="Steps in flight at once.")] = "1,2",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Measured, of each load.")] = 100,
    wall: Annotated[
        bool, typer.Option("--wall", help="Periods in real time, on a machine without other work.")
    ] = False,
) -> None:
    """Show the host's time in decode steps, on a simulated device, with and without adapters."""
    from quickchange_bench.engine.host_time import (
        HostLoad,
        OwnClock,
        WallClock,
        host_table,
        host_times,  # needs torch
    )

    loads = [
        HostLoad(int(count), adapters, int(depth))
        for count in sequences.split(",")
        for adapters in (False, True)
        for depth in depths.split(",")
    ]
    typer.echo(f"T = {device_ms:g} ms; all columns in ms\n")
    clock = WallClock if wall else OwnClock
    found = host_times(loads, device_ms / 1e3, steps=steps, clock=clock)
    typer.echo(host_table(list(found)))


@app.command("machine")
@_refusals
def machine_command(
    model: Annotated[
        str, typer.Option(help="Base model's folder, or demo for the demo's base.")
    ] = "demo",
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1,4,8,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Of every adapter.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the usable cores.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
) -> None:
    """Measure this machine's CPUs, and say what each workload can reach on them at most."""
    from quickchange_bench.machine_report import (
        closed_loops,
        machine_text,
        measure_machine,  # needs torch
    )
    from quickchange_training.demo import ensure_demo_base

    loads = [load.workers or 1 for load in parse_loads(concurrency, None)]
    report = measure_machine(
        ensure_demo_base() if model == "demo" else Path(model),
        closed_loops(loads, prompt=prompt_tokens, answer=output_tokens, rank=rank),
        threads,
    )
    typer.echo(machine_text(report))
    if out is not None:
        report_tables.save(report, out)


@app.command()
@_refusals
def perplexity(
    model: Annotated[Path, typer.Option(help="Base model: a folder in transformers' layout.")],
    dtype: Annotated[str, typer.Option(help="One or more, with commas.")] = "float32,bfloat16",
    quantization: Annotated[
        str, typer.Option(help="none, int8, int8-exact or int4; one or more, with commas.")
    ] = "none,int8,int8-exact,int4",
    window: Annotated[int, typer.Option(min=2, help="Tokens of one window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
) -> None:
    """What dtypes and quantisations of the base lose on a fixed text."""
    from quickchange_bench.engine.perplexity import BaseVariant, loss_table, measure_perplexity
    from quickchange_server.model.quantized_linear import Quantization  # needs torch

    kept: tuple[Quantization, ...] = get_args(Quantization)
    variants = [
        BaseVariant(
            _choice("--dtype", name, tuple(own_server.VALUE_BYTES)),
            cast("Quantization", _choice("--quantization", how, kept)),
        )
        for how in quantization.split(",")
        for name in dtype.split(",")
    ]
    losses = measure_perplexity(str(_folder(model)), variants, window=window, windows=windows)
    typer.echo(f"{losses[0].tokens} tokens scored\n\n{loss_table(losses)}")


@app.command()
@_refusals
def alora(
    model: Annotated[Path, typer.Option(help="Base model: a folder in transformers' layout.")],
    prefix_tokens: Annotated[int, typer.Option(min=16, help="That all requests share.")] = 4000,
    adapters: Annotated[int, typer.Option(min=1, help="Called one after the other.")] = 3,
    rank: Annotated[int, typer.Option(min=1, help="Of every adapter.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Engine threads.")] = 2,
) -> None:
    """Measure first tokens of activated and of plain LoRAs behind a prefix that the base read."""
    from quickchange_bench.engine.activation_bench import (
        ActivationOptions,
        activation_table,
        measure_activation,  # needs torch
    )

    chosen = _choice("--dtype", dtype, tuple(own_server.VALUE_BYTES))
    options = ActivationOptions(str(_folder(model)), prefix_tokens, adapters, rank, chosen, threads)
    typer.echo(activation_table(measure_activation(options)))


@app.command("experiments")
@_refusals
def experiments_command(
    runs: Annotated[int, typer.Option(min=1, help="Whole experiments of each kind.")] = 1000,
    horizon: Annotated[
        int, typer.Option(min=50, help="Units of the smallest variant in each.")
    ] = 5000,
    every: Annotated[int, typer.Option(min=1, help="Outcomes between looks.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the outcomes.")] = 0,
) -> None:
    """Measure how often the experiments' statistics are wrong, and how soon they are right."""
    design = simulation.Design(runs=runs, horizon=horizon, every=every, seed=seed)
    for line in simulation.report(design):
        typer.echo(line)


@app.command("replica")
@_refusals
def replica_command(
    model: Annotated[str, typer.Option(help="Base model, as of serve.")],
    store: Annotated[str, typer.Option(help="Store whose adapters are loaded to time it.")],
    out: Annotated[Path, typer.Option(help="File for `quickchange plan --measured`.")],
) -> None:
    """Measure one engine for plans: prices of steps, budgets, loads. Settings: QUICKCHANGE_…"""
    from quickchange_bench.service.plan_check import measure_replica
    from quickchange_server.config import Settings

    report_tables.save(asyncio.run(measure_replica(Settings(model=model, store=store))), out)


@app.command("plan-check")
@_refusals
def plan_check_command(
    url: Annotated[str, typer.Option(help="Of the server or the cluster.")],
    base: Annotated[str, typer.Option(help="Name of its base model.")],
    traffic: Annotated[str, typer.Option(help="As of `quickchange plan --traffic`.")],
    measured: Annotated[Path, typer.Option(help="File of `quickchange bench replica`.")],
    replicas: Annotated[int, typer.Option(min=1, help="Engine replicas there.")] = 2,
    ingresses: Annotated[int, typer.Option(min=1, help="Ingresses there.")] = 1,
    allow_remote: Annotated[bool, typer.Option(help="Load another machine.")] = False,
) -> None:
    """Replay traffic on a server and on the plan's models, side by side."""
    from quickchange_bench.service.plan_check import check_plan, cluster_of, replay
    from quickchange_server.cluster.simulation.replica_model import read_model
    from quickchange_server.cluster.simulation.traffic import traffic as read_traffic

    requests = read_traffic(traffic)
    cluster = cluster_of(read_model(measured), replicas, ingresses)
    address = check_url(url, allow_remote=allow_remote)
    typer.echo(check_plan(requests, cluster, asyncio.run(replay(address, base, requests))))


@app.command()
@_refusals
def make_adapters(
    model: Annotated[Path, typer.Option(help="Base model: a folder in transformers' layout.")],
    out: Annotated[Path, typer.Option(help="Where lora-0, lora-1, … go.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Of every adapter.")] = 16,
    targets: Annotated[str, typer.Option(help="Projections.")] = ",".join(PROJECTIONS),
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write random LoRA adapters in PEFT's layout, for load tests."""
    spec = AdapterSpec(rank=rank, targets=tuple(targets.split(",")), seed=seed)
    write_adapters(_folder(model), out, [f"lora-{k}" for k in range(count)], spec)


@app.command()
@_refusals
def make_base(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a base model with random weights, where the real one can't be had."""
    chosen = SHAPES[_choice("--shape", shape, tuple(SHAPES))]
    write_base(
        out, chosen, dtype=_choice("--dtype", dtype, tuple(own_server.VALUE_BYTES)), seed=seed
    )


def main() -> None:
    """Entry point of `python -m quickchange_bench`."""
    sys.exit(app())
