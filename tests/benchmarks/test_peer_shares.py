"""Measured speeds stand beside what was possible: the machine's limit, and the fair share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from quickchange_bench.bench_results import (
    Load,
    MachineInfo,
    Median,
    ServingResult,
    WorkloadSpec,
)
from quickchange_bench.load.busy_neighbours import busy_neighbours, fair_fraction
from quickchange_bench.load.peer_shares import shares, shares_table
from quickchange_kernels.roofline.machine import CoreAllowance, CpuRates, Model
from quickchange_kernels.roofline.workload_limits import PRECISIONS, ClosedLoop, workload_limit

SMOLLM2 = Model("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152)
TWO_CORES = CpuRates(
    name="two cores",
    bandwidth=40e9,
    operations={"float32": 237e9, "bfloat16": 474e9, "int8": 948e9},
    instruction_set="avx512_bf16",
    allowance=CoreAllowance(2, None),
    threads=2,
    share=1e-6,
    wake=1e-5,
)


def result(
    server: str, speeds: dict[Load, float | None], *, adapters: bool = False
) -> ServingResult:
    spec = WorkloadSpec(
        adapters=8,
        popularity="distinct" if adapters else None,
        prompt_tokens="64",
        output_tokens="64",
        requests_per_worker=2,
        requests=None,
        warmup=8,
        repeat=3,
        seed=0,
    )
    return ServingResult(
        label=server,
        model="base",
        dialect=server,
        workload=spec,
        machine=MachineInfo("cpu", 2, 2**34, "Linux", "3.11", None),
        commit=None,
        command="",
        started="",
        points=(),
        medians=tuple(
            Median(load, 3, None, 0, {"tokens_per_second": speed}) for load, speed in speeds.items()
        ),
    )


def one_share(server: ServingResult, weights: str = "float32", threads: int = 2):  # type: ignore[no-untyped-def]
    return shares(
        [server],
        {server.dialect: weights},
        rates=TWO_CORES,
        model=SMOLLM2,
        rank=16,
        threads=threads,
    )


@pytest.mark.parametrize(("weights", "adapters"), [("float32", True), ("int8", False)])
def test_a_speed_is_a_share_of_the_limit_of_its_own_load_and_weights(
    weights: str, adapters: bool
) -> None:
    (found,) = one_share(result("ours", {Load(workers=16): 100.0}, adapters=adapters), weights)
    loop = ClosedLoop(16, 64, 64, adapters=8 if adapters else 0, rank=16)
    limit = workload_limit(TWO_CORES, SMOLLM2, PRECISIONS[weights], loop).tokens_per_second
    assert (found.mode, found.limit) == ("distinct" if adapters else "base", limit)
    assert found.of_limit == pytest.approx(100 / limit)
    assert found.of_fair is None


def test_beside_busy_processes_the_share_is_of_what_two_threads_are_due() -> None:
    speeds = {Load(workers=1): 45.0, Load(workers=1, busy=1): 15.0, Load(workers=1, busy=3): 9.0}
    _, one, three = one_share(result("ours", speeds))
    assert (one.fair, three.fair) == (pytest.approx(30), pytest.approx(18))
    assert (one.of_fair, three.of_fair) == (pytest.approx(0.5), pytest.approx(0.5))
    assert one.limit is three.limit is None


def test_without_a_quiet_figure_there_is_no_fair_share() -> None:
    (found,) = one_share(result("ours", {Load(workers=1, busy=1): 15.0}))
    assert found.fair is None
    assert shares_table([found]).splitlines()[-1].split()[-4:] == ["-", "|", "-", "|"]


@pytest.mark.parametrize(
    ("cores", "threads", "busy", "fraction"),
    [(2, 2, 0, 1), (2, 2, 1, 2 / 3), (2, 2, 3, 2 / 5), (4, 2, 1, 1), (2, 1, 1, 1), (2, 1, 3, 0.5)],
)
def test_each_thread_that_wants_to_run_is_due_the_same_time(
    cores: int, threads: int, busy: int, fraction: float
) -> None:
    assert fair_fraction(cores, threads, busy) == pytest.approx(fraction)


def test_a_line_of_the_table_names_server_load_and_both_shares() -> None:
    speeds = {Load(workers=1): 45.0, Load(workers=1, busy=1): 15.0}
    lines = shares_table(one_share(result("ours", speeds))).splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]
    limit = workload_limit(TWO_CORES, SMOLLM2, PRECISIONS["float32"], ClosedLoop(1, 64, 64))
    speed = limit.tokens_per_second
    assert cells == [
        ["ours", "none", "1 concurrent", "45.0", f"{speed:.0f}", f"{45 / speed:.2f}", "-", "-"],
        ["ours", "none", "1 concurrent, 1 busy", "15.0", "-", "-", "30.0", "0.50"],
    ]


def test_busy_processes_take_the_cores_until_the_block_ends() -> None:
    with busy_neighbours(1) as (pid,):
        loop = psutil.Process(pid)
        deadline = time.monotonic() + 30
        while loop.cpu_times().user < 0.2:
            assert time.monotonic() < deadline, "the process keeps no core busy"
            time.sleep(0.05)
    assert not psutil.pid_exists(pid)


def test_busy_processes_end_with_a_benchmark_that_is_killed() -> None:
    script = (
        "from quickchange_bench.load.busy_neighbours import busy_neighbours\n"
        "import time\n"
        "with busy_neighbours(1) as (pid,): print(pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        loop = psutil.Process(int(run.stdout.readline()))
        os.kill(run.pid, signal.SIGKILL)
    psutil.wait_procs([loop], timeout=30)
    assert not loop.is_running() or loop.status() == psutil.STATUS_ZOMBIE


def test_a_load_names_its_busy_processes() -> None:
    assert Load(workers=1, busy=3).name == "1 concurrent, 3 busy"
    assert Load(workers=1).name == "1 concurrent"
    with pytest.raises(ValueError, match="busy"):
        Load(workers=1, busy=-1)
