"""Comparison of Quickchange and its peers in one session, by turns.

Prompts, adapters and client are the same. Each round starts every server in turn, waits for its
first token, runs `bench serving`'s workload for the base model and for distinct adapters, and ends
the server by its process id; the next round goes in the other order. Figures are medians over the
rounds. The machine's own rates are measured too; each figure is shown beside the limit that
follows, and beside busy processes as a share of its due. The model and the adapters come from
BASE_MODEL and ADAPTERS_DIR, the peers from PEERS_DIR (see README.md beside this file).

    python benchmarks/peers/compare.py --out results/peers.json
    python benchmarks/peers/compare.py --only float32,busy --out results/cpu.json  # named parts
    python benchmarks/peers/compare.py --check        # are their answers the same? no timing
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from quickchange_bench import provenance, report_tables
from quickchange_bench.bench_results import (
    SCHEMA_VERSION,
    Load,
    Point,
    ServingResult,
    WorkloadSpec,
    medians,
)
from quickchange_bench.load.peer_servers import (
    MODES,
    Peer,
    PeftStatic,
    Setup,
    quickchange,
    scripted,
)
from quickchange_bench.load.peer_shares import Share, shares, shares_table
from quickchange_bench.machine_report import (
    MachineReport,
    machine_text,
    measure_machine,
    read_model,
)
from quickchange_bench.summary_stats import ratio

HERE = Path(__file__).resolve().parent
PEERS: dict[str, Callable[[], Peer]] = {
    "quickchange": quickchange,
    "vllm": lambda: scripted("vllm", "openai"),
    "peft": PeftStatic,
    "mistralrs": lambda: scripted("mistralrs", "mistralrs"),
    "llamacpp": lambda: scripted("llamacpp", "llamacpp"),
    "openvino": lambda: scripted("openvino", "openai", modes=("base",)),
    # narrower weights
    "quickchange-bf16": lambda: quickchange("quickchange-bf16", dtype="bfloat16"),
    "quickchange-int8": lambda: quickchange("quickchange-int8", quantization="int8"),
    "quickchange-int4": lambda: quickchange("quickchange-int4", quantization="int4"),
    "llamacpp-f16": lambda: _llamacpp("f16", "bfloat16"),
    "llamacpp-q8_0": lambda: _llamacpp("q8_0", "int8"),
    "llamacpp-q4_k_m": lambda: _llamacpp("q4_k_m", "int4"),
    "openvino-bf16": lambda: scripted(
        "openvino-bf16", "openai", weights="bfloat16", modes=("base",), OPENVINO_PRECISION="bf16"
    ),
}
IN_FLOAT32 = "quickchange,vllm,peft,mistralrs,llamacpp"


def _llamacpp(stored: str, weights: str) -> Peer:
    return scripted(f"llamacpp-{stored}", "llamacpp", weights=weights, LLAMACPP_TYPE=stored)


@dataclass(frozen=True, slots=True)
class Part:
    """Servers and loads that are measured by turns."""

    peers: str
    modes: str
    concurrency: str
    busy: str = "0"
    output_tokens: int = 64

    def loads(self) -> tuple[Load, ...]:
        return tuple(
            Load(workers=int(workers), busy=int(busy))
            for workers in self.concurrency.split(",")
            for busy in self.busy.split(",")
        )


# what RESULTS.md shows of a CPU, each part in minutes
PARTS = {
    "float32": Part("quickchange,mistralrs,llamacpp,openvino", "base,distinct", "1,8,16"),
    "bf16": Part("quickchange-bf16,llamacpp-f16,openvino-bf16", "base", "1,4,16"),
    "int8": Part("quickchange-int8,llamacpp-q8_0", "base", "1,4,16"),
    "int4": Part("quickchange-int4,llamacpp-q4_k_m", "base", "1"),
    "busy": Part("quickchange,mistralrs,llamacpp,openvino", "base", "1", "0,1,3", 32),
}

# by mode, load and peer: the first peer's median tokens/s over this one's
Ratios = dict[str, dict[str, dict[str, float | None]]]


@dataclass(frozen=True, slots=True)
class Session:
    """All peers' results of one session; the first peer is the one that ratios are of."""

    machine: MachineReport
    results: tuple[ServingResult, ...]
    ratios: Ratios
    shares: tuple[Share, ...]
    kind: str = "peers"
    version: int = SCHEMA_VERSION


def say(name: str, mode: str, point: Point) -> None:
    s = point.summary
    typer.echo(
        f"round {point.round + 1}, {name}, {mode}, {point.load.name}: {s.tokens_per_second:.1f} "
        f"tok/s, first token {report_tables.number(s.ttft_p50, 0, report_tables.MILLI)} ms, "
        f"{s.errors} errors, others {report_tables.number(s.other_cores, 2)} cores",
        err=True,
    )
    for message in s.first_errors:
        typer.echo(f"  {message}", err=True)


def session(
    setup: Setup,
    peers: Sequence[Peer],
    points: dict[tuple[str, str], list[Point]],
    report: MachineReport,
) -> Session:
    """Result file content with all measurements so far."""
    machine, commit, command = provenance.machine(), provenance.commit(), provenance.command()
    results = tuple(
        ServingResult(
            label=name if mode == "distinct" else f"{name}, no adapter",
            model=setup.base.name,
            dialect=name,
            workload=WorkloadSpec(
                adapters=setup.adapters,
                popularity="distinct" if mode == "distinct" else None,
                prompt_tokens=str(setup.prompt_tokens),
                output_tokens=str(setup.output_tokens),
                requests_per_worker=setup.requests_per_worker,
                requests=None,
                warmup=max(setup.adapters, 2),
                repeat=setup.repeat,
                seed=setup.seed,
            ),
            machine=machine,
            commit=commit,
            command=command,
            started=report.started,
            points=tuple(found),
            medians=medians(found),
        )
        for (name, mode), found in points.items()
        if found
    )
    return Session(
        machine=report,
        results=results,
        ratios=ratios(results),
        shares=shares(
            results,
            {peer.name: peer.weights for peer in peers},
            rates=report.rates,
            model=read_model(setup.base),
            rank=adapter_rank(setup.adapters_dir / setup.target.adapters[0]),
            threads=setup.threads,
        ),
    )


def adapter_rank(folder: Path) -> int:
    """Rank of a PEFT folder's adapter."""
    return int(json.loads((folder / "adapter_config.json").read_text())["r"])


def ratios(results: Sequence[ServingResult]) -> Ratios:
    """The first peer's median tokens/s over each other's, by mode and load."""
    found: Ratios = {}
    for mode in MODES:
        own_mode = [r for r in results if (r.workload.popularity or "base") == mode]
        if not own_mode:
            continue
        first = {m.load.name: m.values["tokens_per_second"] for m in own_mode[0].medians}
        found[mode] = {load: {} for load in first}
        for result in own_mode[1:]:
            for median in result.medians:
                found[mode][median.load.name][result.dialect] = ratio(
                    first[median.load.name], median.values["tokens_per_second"]
                )
    return found


def print_session(found: Session) -> None:
    typer.echo(report_tables.describe(found.results[-1]))
    typer.echo(f"\n{machine_text(found.machine)}")
    for mode in MODES:
        chosen = [r for r in found.results if (r.workload.popularity or "base") == mode]
        if not chosen:
            continue
        typer.echo(f"\n### {'no adapter' if mode == 'base' else 'distinct adapters'}\n")
        rows = [
            [result.dialect, *report_tables.serving_row(median)]
            for result in chosen
            for median in result.medians
        ]
        typer.echo(report_tables.table(["server", *report_tables.SERVING_HEADER], rows))
        if len(chosen) > 1:
            typer.echo()
            typer.echo(report_tables.comparison(chosen))
    typer.echo(f"\n### shares of what is possible\n\n{shares_table(found.shares)}")


def common_start(text: str, reference: str) -> float:
    """Share of the reference that the text repeats from its beginning."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(text, reference, strict=False))
    return sum(1 for _ in same) / max(len(reference), 1)


def check(setup: Setup, peers: Sequence[Peer]) -> None:
    """Compare each peer's greedy texts with the first one's."""
    reference: list[list[str]] | None = None
    rows = []
    for peer in peers:
        texts = [[text.lstrip() for text in row] for row in peer.texts(setup)]
        reference = reference or texts
        pairs = [
            (text, other)
            for row, others in zip(texts, reference, strict=True)
            for text, other in zip(row, others, strict=True)
        ]
        shared = fmean(common_start(text, other) for text, other in pairs)
        distinct = len({text for row in texts for text in row})
        rows.append(
            [
                peer.name,
                f"{sum(a == b for a, b in pairs)} of {len(pairs)}",
                report_tables.number(shared, 0, 100),
                str(distinct),
            ]
        )
        typer.echo(f"{peer.name}: {json.dumps(texts[0], ensure_ascii=False)}", err=True)
    first = peers[0].name
    typer.echo(
        report_tables.table(["server", f"same as {first}", "common start %", "distinct"], rows)
    )


def main(
    peers: Annotated[str, typer.Option(help=", ".join(PEERS))] = IN_FLOAT32,
    modes: Annotated[str, typer.Option(help=", ".join(MODES))] = ",".join(MODES),
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1,8,16",
    busy: Annotated[str, typer.Option(help="Busy processes beside the server.")] = "0",
    only: Annotated[
        str, typer.Option(help=f"Named parts, instead of the four above: {', '.join(PARTS)}")
    ] = "",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    requests_per_worker: Annotated[int, typer.Option(min=1)] = 2,
    min_requests: Annotated[int, typer.Option(min=1, help="At each load.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    adapters: Annotated[int, typer.Option(min=1, help="lora-0 to lora-(N-1).")] = 8,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="Of our server: cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of our server.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the session here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it here, as PNG.")] = None,
    check_only: Annotated[
        bool, typer.Option("--check", help="Compare the answers' texts, measure nothing.")
    ] = False,
) -> None:
    parts = _parts(only) if only else {"": Part(peers, modes, concurrency, busy, output_tokens)}
    for part in parts.values():
        unknown = set(part.peers.split(",")) - set(PEERS) | set(part.modes.split(",")) - set(MODES)
        if unknown:
            raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}")
    missing = [name for name in ("BASE_MODEL", "ADAPTERS_DIR") if name not in os.environ]
    if missing:
        raise typer.BadParameter(f"set {' and '.join(missing)} in the environment; see README.md")
    with TemporaryDirectory(prefix="quickchange-peers-") as work:
        common = Setup(
            base=Path(os.environ["BASE_MODEL"]),
            adapters_dir=Path(os.environ["ADAPTERS_DIR"]),
            adapters=adapters,
            threads=threads,
            loads=(),
            requests_per_worker=requests_per_worker,
            min_requests=min_requests,
            repeat=repeat,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            seed=seed,
            device=device,
            dtype=dtype,
            scripts=HERE,
            work=Path(work),
            progress=say,
        )
        for name, part in parts.items():
            chosen = [PEERS[peer]() for peer in part.peers.split(",")]
            tokens = min(output_tokens, part.output_tokens)
            setup = replace(common, loads=part.loads(), output_tokens=tokens)
            if check_only:
                check(setup, chosen)
                continue
            file = out.with_stem(f"{out.stem}-{name}") if out is not None and name else out
            found = measure_all(setup, chosen, part.modes.split(","), file)
            typer.echo(f"\n## {name}\n" if name else "")
            print_session(found)
            if plot is not None:
                report_tables.plot(found.results, plot)


def _parts(names: str) -> dict[str, Part]:
    if unknown := set(names.split(",")) - set(PARTS):
        raise typer.BadParameter(f"--only: no part {', '.join(sorted(unknown))}")
    return {name: PARTS[name] for name in names.split(",")}


def measure_all(
    setup: Setup, peers: Sequence[Peer], modes: Sequence[str], out: Path | None
) -> Session:
    """Measure each round: the machine, then every peer. `out` is rewritten after each round.

    The limits are those of the round whose memory was the middle one: on a virtual machine it reads
    at 50 or at 80 GB/s from one minute to the next.
    """
    reports: list[MachineReport] = []
    points: dict[tuple[str, str], list[Point]] = {
        (peer.name, mode): [] for mode in modes for peer in peers
    }
    for turn in range(setup.repeat):
        reports.append(_machine(setup))
        for peer in peers if turn % 2 == 0 else peers[::-1]:
            for mode, measured in peer.measure(setup, modes, turn).items():
                points[peer.name, mode] += measured
        reports.sort(key=lambda one: one.rates.bandwidth)
        found = session(setup, peers, points, reports[len(reports) // 2])
        if out is not None:
            report_tables.save(found, out)
    return found


def _machine(setup: Setup) -> MachineReport:
    """The machine as it is now, measured in a process of its own, which torch ends with."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_machine, setup.base, (), setup.threads).result()


if __name__ == "__main__":
    typer.run(main)
