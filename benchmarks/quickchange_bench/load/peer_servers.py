"""Servers under comparison, each behind the same two calls: measure a round, give texts.

The peers' own start scripts are in benchmarks/peers; this module runs them, ours beside them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from quickchange_bench.bench_results import Load, Point, Summary
from quickchange_bench.load import own_server
from quickchange_bench.load.load_client import Client, DialectName, ServedNames
from quickchange_bench.load.load_runner import LoadPlan, run_plan
from quickchange_bench.load.popularity import Popularity
from quickchange_bench.load.server_process import (
    RunningServer,
    ServerFailedError,
    free_port,
    running,
    tail,
)
from quickchange_bench.load.workload import Fixed, Request, Workload

Progress = Callable[[str, str, Point], None]  # peer, mode, what was measured
MODES = ("base", "distinct")  # no adapter; each request on the next one
CHECK_PROMPTS = ("The capital of France is", "Once upon a time")
CHECK_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Setup:
    """Model, adapters and load common to all servers."""

    base: Path
    adapters_dir: Path
    adapters: int
    threads: int
    loads: tuple[Load, ...]
    requests_per_worker: int
    min_requests: int
    repeat: int
    prompt_tokens: int
    output_tokens: int
    seed: int
    device: str  # ours; the peers here run on the CPU in float32
    dtype: str
    scripts: Path  # benchmarks/peers
    work: Path  # logs and our store
    progress: Progress

    @property
    def target(self) -> ServedNames:
        return ServedNames("base", tuple(f"lora-{k}" for k in range(self.adapters)))

    def environment(self, port: int) -> dict[str, str]:
        """Environment of the start scripts, see common.sh."""
        return {
            "BASE_MODEL": str(self.base),
            "ADAPTERS_DIR": str(self.adapters_dir),
            "ADAPTERS": str(self.adapters),
            "THREADS": str(self.threads),
            "SEQUENCES": str(max(load.workers or 1 for load in self.loads)),
            "CONTEXT": str(max(1024, self.prompt_tokens + self.output_tokens + 16)),
            "PORT": str(port),
        }

    def plan(self, mode: str) -> LoadPlan:
        distinct = Popularity("distinct", self.adapters, self.seed)
        return LoadPlan(
            workload=Workload(
                Fixed(self.prompt_tokens),
                Fixed(self.output_tokens),
                distinct if mode == "distinct" else None,
                self.seed,
            ),
            loads=self.loads,
            repeat=self.repeat,
            requests_per_worker=self.requests_per_worker,
            min_requests=self.min_requests,
            warmup=max(self.adapters, 2),
        )


class Peer(Protocol):
    """A server or program that can be measured, one round at a time.

    `weights` names the width of the base's weights, as `bench machine` does.
    """

    name: str
    weights: str

    def measure(self, setup: Setup, modes: Sequence[str], turn: int) -> dict[str, list[Point]]:
        """Measure one round; its points by mode."""

    def texts(self, setup: Setup) -> list[list[str]]:
        """Per check prompt: the greedy text of the base model, then of each adapter."""


@dataclass
class HttpPeer:
    """A peer over HTTP, started and ended by `run`. `modes`: those that it has."""

    name: str
    dialect: DialectName
    run: Callable[[Setup], Iterator[RunningServer]]
    weights: str = "float32"
    modes: tuple[str, ...] = MODES

    def measure(self, setup: Setup, modes: Sequence[str], turn: int) -> dict[str, list[Point]]:
        with contextmanager(self.run)(setup) as server:
            return asyncio.run(self._measure(server, setup, modes, turn))

    async def _measure(
        self, server: RunningServer, setup: Setup, modes: Sequence[str], turn: int
    ) -> dict[str, list[Point]]:
        async with Client(server.url, setup.target, self.dialect) as client:
            return {
                mode: await run_plan(
                    client,
                    setup.plan(mode),
                    pid=server.pid,
                    turns=[turn],
                    progress=partial(setup.progress, self.name, mode),
                )
                for mode in modes
                if mode in self.modes
            }

    def texts(self, setup: Setup) -> list[list[str]]:
        with contextmanager(self.run)(setup) as server:
            return asyncio.run(self._texts(server, setup))

    async def _texts(self, server: RunningServer, setup: Setup) -> list[list[str]]:
        rows = []
        async with Client(server.url, setup.target, self.dialect) as client:
            for prompt in CHECK_PROMPTS:
                row = []
                for adapter in (None, *range(setup.adapters)):
                    done = await client.complete(Request(0, prompt, CHECK_TOKENS, adapter))
                    if done.error is not None:
                        raise RuntimeError(f"{self.name}, adapter {adapter}: {done.error}")
                    row.append(done.text)
                rows.append(row)
        return rows


def scripted(
    name: str,
    dialect: DialectName,
    *,
    weights: str = "float32",
    modes: tuple[str, ...] = MODES,
    **environment: str,
) -> HttpPeer:
    """A peer served by a start script: NAME, or NAME-VARIANT with further environment."""
    script = f"start_{name.partition('-')[0]}.sh"

    def run(setup: Setup) -> Iterator[RunningServer]:
        port = free_port()
        with running(
            [str(setup.scripts / script)],
            url=f"http://127.0.0.1:{port}",
            target=setup.target,
            dialect=dialect,
            log=setup.work / f"{name}.log",
            environment={**setup.environment(port), **environment},
        ) as server:
            yield server

    return HttpPeer(name, dialect, run, weights, modes)


def quickchange(name: str = "quickchange", **settings: str) -> HttpPeer:
    """Quickchange with further QUICKCHANGE_ settings; its store is filled at the first start."""

    def run(setup: Setup) -> Iterator[RunningServer]:
        store = setup.work / f"store-{name}"
        own = own_server.OwnServer(
            model=str(setup.base),
            store=store,
            device=setup.device,
            dtype=settings.get("dtype", setup.dtype),
            environment={
                "QUICKCHANGE_THREADS": str(setup.threads),
                **{f"QUICKCHANGE_{key.upper()}": value for key, value in settings.items()},
            },
        )
        filled = setup.work / f"store-{name}-filled"
        with own.running(setup.work / f"{name}.log") as server:
            if not filled.exists():
                folders = {name: setup.adapters_dir / name for name in setup.target.adapters}
                own_server.register(server.url, folders)
                filled.touch()
            yield server

    weights = settings.get("quantization", settings.get("dtype", "float32"))
    return HttpPeer(name, "openai", run, weights)


class PeftStatic:
    """PEFT's static batches: no server, but a program that measures itself by the same rules."""

    name = "peft"
    weights = "float32"

    def measure(self, setup: Setup, modes: Sequence[str], turn: int) -> dict[str, list[Point]]:
        if any(load.busy for load in setup.loads):
            raise ValueError("peft has no server to measure beside busy processes")
        found = {}
        for mode in modes:
            lines = self._run(
                setup,
                mode=mode,
                concurrency=",".join(str(load.workers) for load in setup.loads),
                prompt_tokens=str(setup.prompt_tokens),
                output_tokens=str(setup.output_tokens),
                requests_per_worker=str(setup.requests_per_worker),
                min_requests=str(setup.min_requests),
                seed=str(setup.seed),
                turn=str(turn),
            ).splitlines()
            found[mode] = [self._point(json.loads(line), turn) for line in lines]
            for point in found[mode]:
                setup.progress(self.name, mode, point)
        return found

    def texts(self, setup: Setup) -> list[list[str]]:
        printed = self._run(setup, check=json.dumps(CHECK_PROMPTS), output_tokens=str(CHECK_TOKENS))
        rows: list[list[str]] = json.loads(printed)
        return rows

    @staticmethod
    def _point(line: dict[str, object], turn: int) -> Point:
        workers, summary = line["workers"], line["summary"]
        if not isinstance(workers, int) or not isinstance(summary, dict):
            raise ValueError(f"peft_static.py printed {line!r}")
        return Point(load=Load(workers=workers), round=turn, summary=Summary(**summary))

    def _run(self, setup: Setup, **options: str) -> str:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        log = setup.work / "peft.log"
        with log.open("w") as errors:
            answer = subprocess.run(
                [str(setup.scripts / "start_peft.sh"), *flags],
                env={**os.environ, **setup.environment(port=0)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                check=False,
            )
        if answer.returncode != 0:
            raise ServerFailedError(f"peft ended with status {answer.returncode}; {tail(log)}")
        return answer.stdout
