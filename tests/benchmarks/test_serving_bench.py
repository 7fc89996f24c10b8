"""Closed and open loops, their figures, the result file, the comparison and the commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from http_support import live_server
from typer.testing import CliRunner

from quickchange_bench import report_tables
from quickchange_bench.bench_results import ClientCompletion, Load, Point, medians, summarise
from quickchange_bench.cli import adapter_names, app, parse_loads
from quickchange_bench.load.load_client import Client, ServedNames
from quickchange_bench.load.load_runner import LoadPlan, run_plan
from quickchange_bench.load.own_server import count_device_loads
from quickchange_bench.load.popularity import Popularity
from quickchange_bench.load.process_usage import memory
from quickchange_bench.load.server_process import ServerFailedError, free_port, running
from quickchange_bench.load.workload import Fixed, Workload
from quickchange_bench.service.overhead import Pair, summarise_pairs

TARGET = ServedNames("base", ("lora-0", "lora-1", "lora-2"))


def plan(*loads: Load, **changes: Any) -> LoadPlan:
    workload = Workload(Fixed(5), Fixed(6), Popularity("distinct", 3))
    return LoadPlan(**{"workload": workload, "loads": loads, "repeat": 2, "warmup": 3, **changes})


def measure(url: str, chosen: LoadPlan, pid: int | None = None) -> list[Point]:
    async def run() -> list[Point]:
        async with Client(url, TARGET) as client:
            return await run_plan(client, chosen, pid=pid)

    return asyncio.run(run())


def completion(index: int, started: float, error: str | None = None) -> ClientCompletion:
    """Four tokens, one a second, the first after two."""
    return ClientCompletion(
        index=index,
        adapter=None,
        started=started,
        finished=started + 5,
        first_token=started + 2,
        gaps=(1.0, 1.0, 1.0),
        prompt_tokens=10,
        output_tokens=4,
        text="",
        error=error,
    )


def test_a_closed_loop_keeps_its_workers_busy_and_no_more(fake_server: Any) -> None:
    (point,) = measure(fake_server.url, plan(Load(workers=4), repeat=1))
    assert fake_server.most_running == 4
    assert (point.summary.requests, point.summary.errors) == (8, 0)
    assert point.summary.output_tokens == 8 * 6


def test_warm_up_is_not_counted(fake_server: Any) -> None:
    (point,) = measure(fake_server.url, plan(Load(workers=1), repeat=1))
    assert point.summary.requests == 4
    assert len(fake_server.bodies) == 3 + 4


def test_no_prompt_is_sent_twice(fake_server: Any) -> None:
    measure(fake_server.url, plan(Load(workers=1), Load(workers=2)))
    prompts = [body["prompt"] for body in fake_server.bodies]
    assert len(set(prompts)) == len(prompts)


def test_rounds_go_over_all_loads_before_they_repeat(fake_server: Any) -> None:
    points = measure(fake_server.url, plan(Load(workers=1), Load(workers=2)))
    assert [(p.round, p.load.workers) for p in points] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_requests_are_spread_over_the_adapters(fake_server: Any) -> None:
    measure(fake_server.url, plan(Load(workers=3), repeat=1, warmup=0))
    named = [body["model"] for body in fake_server.bodies]
    assert sorted(named) == sorted(TARGET.adapters * 2)


def test_an_open_loop_sends_without_waiting_for_answers(fake_server: Any) -> None:
    chosen = plan(Load(rate=500.0), requests=30, repeat=1, warmup=0)
    (point,) = measure(fake_server.url, chosen)
    assert point.summary.requests == 30
    assert fake_server.most_running > 1


def test_the_servers_processes_are_measured(fake_server: Any) -> None:
    (point,) = measure(fake_server.url, plan(Load(workers=2), repeat=1), pid=os.getpid())
    assert point.summary.server_cores is not None
    assert point.summary.peak_rss is not None
    assert point.summary.peak_rss > 10 * 1024**2


def test_a_summary_counts_failed_requests_as_errors_alone() -> None:
    done = [completion(0, 0.0), completion(1, 5.0), completion(2, 5.0, error="gone")]
    summary = summarise(done, None)
    assert (summary.requests, summary.errors, summary.first_errors) == (3, 1, ("gone",))
    assert summary.seconds == 10
    assert summary.tokens_per_second == pytest.approx(0.8)
    assert (summary.ttft_p50, summary.itl_p99, summary.e2e_p50) == (2, 1, 5)


def test_medians_are_taken_load_by_load() -> None:
    base = summarise([completion(0, 0.0)], None)
    points = [
        Point(Load(workers=w), r, replace(base, tokens_per_second=10.0 * w + r))
        for r in range(3)
        for w in (1, 8)
    ]
    one, eight = medians(points)
    assert (one.values["tokens_per_second"], eight.values["tokens_per_second"]) == (11, 81)
    assert one.spread == pytest.approx(2 / 11)
    assert one.rounds == 3


def test_a_load_is_closed_or_open() -> None:
    for bad in ({}, {"workers": 1, "rate": 1.0}, {"workers": 0}, {"rate": 0.0}):
        with pytest.raises(ValueError, match=r"workers|rate"):
            Load(**bad)  # type: ignore[arg-type]


def test_a_rate_needs_a_number_of_requests() -> None:
    with pytest.raises(ValueError, match="--requests"):
        plan(Load(rate=3.0))


def test_loads_are_parsed() -> None:
    assert parse_loads("1,8", None) == (Load(workers=1), Load(workers=8))
    assert parse_loads("1,8", 2.5) == (Load(rate=2.5),)
    with pytest.raises(ValueError, match="--concurrency"):
        parse_loads("few", None)


def test_adapters_are_named_by_list_or_prefix() -> None:
    assert adapter_names("a, b", "", 8) == ("a", "b")
    assert adapter_names("", "x-", 2) == ("x-0", "x-1")
    with pytest.raises(ValueError, match="not both"):
        adapter_names("a", "x", 2)


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def serve_to(fake: Any, out: Path, *more: str) -> Any:
    return bench(
        "serving", "--url", fake.url, "--adapter-prefix", "lora-", "--concurrency", "1,2",
        "--repeat", "2", "--requests", "3", "--output-tokens", "3", "--out", str(out), *more,
    )  # fmt: skip


def test_the_command_writes_a_result_a_plot_and_a_table(fake_server: Any, tmp_path: Path) -> None:
    out, plot = tmp_path / "new" / "result.json", tmp_path / "result.png"
    answer = serve_to(fake_server, out, "--plot", str(plot), "--pid", str(os.getpid()))
    assert answer.exit_code == 0, answer.output
    assert "| 2 concurrent |" in answer.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = json.loads(out.read_text())
    assert set(content) == {
        "label", "model", "dialect", "workload", "machine", "commit", "command", "started",
        "points", "medians", "kind", "version",
    }  # fmt: skip
    assert content["workload"]["popularity"] == "distinct"
    assert content["machine"]["cores"] >= 1
    assert len(content["points"]) == 4
    assert content["medians"][0]["values"]["tokens_per_second"] > 0


def test_a_result_is_read_back_as_it_was(fake_server: Any, tmp_path: Path) -> None:
    serve_to(fake_server, tmp_path / "a.json")
    result = report_tables.load_serving(tmp_path / "a.json")
    report_tables.save(result, tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()


def test_compare_puts_ratios_to_the_first_result(fake_server: Any, tmp_path: Path) -> None:
    serve_to(fake_server, tmp_path / "a.json", "--label", "ours")
    result = report_tables.load_serving(tmp_path / "a.json")
    slow = tuple(
        replace(
            m, values={**m.values, "tokens_per_second": (m.values["tokens_per_second"] or 0) / 2}
        )
        for m in result.medians
    )
    report_tables.save(replace(result, label="theirs", medians=slow), tmp_path / "b.json")
    answer = bench("compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert answer.exit_code == 0, answer.output
    assert "theirs" in answer.output
    assert answer.output.count("(2.00x)") == 2


@pytest.mark.parametrize("content", ["no json", "[]", '{"kind": "peers", "version": 1}'])
def test_compare_refuses_other_files_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    answer = bench("compare", str(tmp_path / "other.json"))
    assert answer.exit_code == 2
    assert "other.json" in answer.output
    assert "Traceback" not in answer.output


@pytest.mark.parametrize(
    ("option", "value"),
    [("--popularity", "some"), ("--dialect", "latin"), ("--url", "http://example.org")],
)
def test_a_bad_option_is_refused_by_name(option: str, value: str) -> None:
    answer = bench("serving", "--adapters", "a", option, value)
    assert answer.exit_code == 2
    assert option in answer.output


def test_a_run_in_which_all_fails_ends_with_an_error(tmp_path: Path) -> None:
    with live_server(tmp_path / "store") as live:
        answer = bench(
            "serving", "--url", live.url, "--model", "not-there", "--concurrency", "1",
            "--repeat", "1", "--out", str(tmp_path / "failed.json"),
        )  # fmt: skip
    assert answer.exit_code == 1
    assert "every request failed" in answer.output


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no model here'); raise SystemExit(3)"]
    target, log = ServedNames("base"), tmp_path / "server.log"
    url = f"http://127.0.0.1:{free_port()}"
    with (
        pytest.raises(ServerFailedError, match=r"(?s)status 3.*no model here"),
        running(command, url=url, target=target, log=log, timeout=30),
    ):
        pass


LAUNCHER = """
import sys, time
from pathlib import Path
from quickchange_bench.load import server_process
from quickchange_bench.load.load_client import ServedNames
server_process._wait_ready = lambda process, *_: print(process.pid, flush=True) or 0.0
sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
names = ServedNames("base")
with server_process.running(sleeper, url="", target=names, log=Path(sys.argv[1])):
    time.sleep(60)
"""


def test_a_terminated_benchmark_ends_its_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench_process:
        assert bench_process.stdout is not None
        server = psutil.Process(int(bench_process.stdout.readline()))
        bench_process.terminate()
        assert bench_process.wait(30) == 128 + 15
    with contextlib.suppress(psutil.NoSuchProcess):
        server.wait(10)
    assert not server.is_running()


def test_memory_of_a_process_tree_is_in_bytes() -> None:
    own = memory(os.getpid())[0]
    assert own.pid == os.getpid()
    assert own.rss > 10 * 1024**2


def test_overhead_compares_round_by_round() -> None:
    base = summarise([completion(0, 0.0)], None)
    pairs = [
        Pair(
            Load(workers=1),
            turn,
            on=replace(base, tokens_per_second=on, tokens_per_cpu_second=on),
            off=replace(base, tokens_per_second=off, tokens_per_cpu_second=off),
        )
        for turn, (on, off) in enumerate([(9.0, 10.0), (20.0, 20.0), (11.0, 10.0)])
    ]
    (found,) = summarise_pairs(pairs)
    assert (found.ratio, found.lowest, found.highest) == (1.0, 0.9, 1.1)
    assert found.cpu_ratio == 1.0


def test_device_loads_are_counted_from_the_metrics() -> None:
    text = (
        'quickchange_adapter_load_seconds_count{tier="host"} 7.0\n'
        'quickchange_adapter_load_seconds_count{tier="device"} 5.0\n'
        'quickchange_adapter_load_seconds_sum{tier="device"} 0.5\n'
    )
    assert count_device_loads(text) == 5
