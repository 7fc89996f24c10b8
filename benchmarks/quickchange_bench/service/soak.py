"""The soak: a server under everything at once, for long, and what is left of it at the end.

A pool of requests is answered once, undisturbed. Then workers ask for its requests in random order
for as long as it goes, some leaving in mid-stream, while adapters and API keys come and go,
experiments hear outcomes, and the engine is killed twice and stopped once. Every answer must be the
undisturbed one, to the token; what a tenant's usage says must be what its clients were given; and
once the load has ended, blocks, descriptors, threads and memory must be where they began.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from quickchange_bench.load import own_server
from quickchange_bench.load.load_client import bearer
from quickchange_bench.load.memory_growth import Growth, Samples, growth_table, sample_forever
from quickchange_bench.load.process_usage import memory, require_psutil
from quickchange_bench.load.server_process import RunningServer, quickchange_command
from quickchange_bench.models.random_adapters import AdapterSpec, device_bytes, write_adapters
from quickchange_bench.report_tables import MEBI, number, table
from quickchange_bench.service.soak_requests import (
    ALIAS,
    EXPERIMENT,
    KINDS,
    USERS,
    SoakAnswer,
    SoakAsk,
    ask,
    make_pool,
)
from quickchange_bench.summary_stats import percentile, slope

PERMANENT = 4  # the first adapters stay: an alias and an experiment name them
TENANTS = ("north", "south")
LEAVING = "leaving"  # the tenant of those who leave in mid-stream
LEAVERS = 0.1  # share of the requests whose reader leaves
DISTURBANCES = ((0.2, signal.SIGKILL), (0.4, signal.SIGKILL), (0.6, signal.SIGSTOP))
SETTLE_SECONDS = 120.0  # for the server to come to rest
CHURN_SECONDS = 1.0  # between two changes of adapters, or of keys
KV_BYTES = 128 * 1024**2  # so few that an engine soon has touched them all, and its memory is level
SLACK = 2  # descriptors or threads that may differ: a pool's
MANY = 5  # faults of a kind that are told


@dataclass(frozen=True, slots=True)
class SoakOptions:
    """`slope`: MiB a minute by which a process may grow, over the last half of its samples."""

    model: Path
    adapters: int = 500
    pool: int = 180
    workers: int = 8
    minutes: float = 30.0
    resident: int = 32
    host_resident: int = 64
    rank: int = 4
    stall_seconds: float = 20.0
    slope: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.adapters <= PERMANENT or self.pool < len(KINDS):
            raise ValueError(
                f"{self.adapters} adapters and {self.pool} requests: more than {PERMANENT} "
                f"adapters, and at least {len(KINDS)} requests, are needed"
            )

    @property
    def names(self) -> list[str]:
        return [f"soak-{k:04d}" for k in range(self.adapters)]


@dataclass(frozen=True, slots=True)
class Rest:
    """A server without requests."""

    used_blocks: float
    descriptors: Mapping[str, int]  # by process
    threads: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold at the end, with its figures."""

    name: str
    holds: bool
    figures: str


@dataclass(frozen=True, slots=True)
class SoakResult:
    checks: tuple[Check, ...]
    growth: tuple[Growth, ...]
    counts: Mapping[str, int]

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    say: Callable[[str], None]
    counts: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)  # completion tokens by tenant
    asked: Counter[str] = field(default_factory=Counter)  # answered requests by tenant
    answers: list[tuple[float, float, float]] = field(default_factory=list)  # start, end, gap

    def fault(self, text: str) -> None:
        self.counts["faults"] += 1
        if self.counts["faults"] <= MANY:
            self.say(f"fault: {text}")


class Soak:
    """Drives one running server."""

    def __init__(
        self,
        options: SoakOptions,
        server: RunningServer,
        admin: str,
        folders: Mapping[str, Path],
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._server = server
        self._admin = admin
        self._folders = folders
        self._say = say
        self._rng = random.Random(options.seed)
        self._pool = make_pool(own_server.BASE_NAME, options.names, options.pool, options.seed)
        self._keys: dict[str, str] = {}
        self._moves: Counter[str] = Counter()  # by adapter; odd while it is away
        self._http = httpx.AsyncClient(
            base_url=server.url,
            timeout=httpx.Timeout(600.0, connect=10.0),
            limits=httpx.Limits(max_connections=options.workers + 4),
            trust_env=False,
        )
        self.tally = Tally(say)

    async def run(self) -> tuple[list[Check], Samples]:
        async with self._http:
            await self._prepare()
            self._say(f"undisturbed answers to {len(self._pool)} requests")
            reference = await self._reference()
            before = await self._rest()
            self._say(f"at rest: {before}")
            samples = Samples()
            sampler = asyncio.create_task(sample_forever(self._server.pid, samples))
            silences = await self._disturbed(reference)
            sampler.cancel()
            after = await self._rest()
            self._say(f"at rest: {after}")
            return [*self._judge(before, after, silences), await self._usage()], samples

    # --- before ---------------------------------------------------------------------------------

    async def _prepare(self) -> None:
        """Adapters, an alias, an experiment and keys."""
        for name in self._folders:
            await self._call("POST", "/v1/adapters", self._added(name))
        first, second = self._options.names[:2]
        await self._call("PUT", f"/v1/aliases/{ALIAS}", {"target": first})
        variants = [
            {"name": "base", "model": own_server.BASE_NAME},
            {"name": "tuned", "model": second},
        ]
        body = {
            "name": EXPERIMENT,
            "variants": variants,
            # a tenant's draw is its own: lists give each the variant of the undisturbed run
            "allow": {user: ("base", "tuned")[k % 2] for k, user in enumerate(USERS)},
            "metrics": [{"name": "liked"}],
        }
        await self._call("POST", "/v1/experiments", body)
        for tenant in (*TENANTS, LEAVING):
            self._keys[tenant] = (await self._make_key(tenant))["secret"]

    async def _reference(self) -> dict[int, SoakAnswer]:
        """The undisturbed answer of each request. Raises RuntimeError if one has none."""
        waiting = list(reversed(self._pool))
        answers: dict[int, SoakAnswer] = {}

        async def work() -> None:
            while waiting:
                wanted = waiting.pop()
                answer = await ask(self._http, wanted, self._admin)
                if answer.status != 200 or answer.error is not None:
                    raise RuntimeError(f"undisturbed, {wanted.body} got {answer}")
                answers[wanted.index] = answer

        await asyncio.gather(*(work() for _ in range(self._options.workers)))
        return answers

    # --- meanwhile ------------------------------------------------------------------------------

    async def _disturbed(self, reference: Mapping[int, SoakAnswer]) -> list[float]:
        """Everything at once, until the time is over. Returns when the engine was disturbed."""
        started = time.monotonic()
        end = started + 60 * self._options.minutes
        async with asyncio.TaskGroup() as group:
            for worker in range(self._options.workers):
                group.create_task(self._work(worker, reference, end))
            group.create_task(self._churn_adapters(end))
            group.create_task(self._churn_keys(end))
            group.create_task(self._progress(end))
            disturbing = group.create_task(self._disturb(started, end))
        return disturbing.result()

    async def _work(self, worker: int, reference: Mapping[int, SoakAnswer], end: float) -> None:
        rng = random.Random(f"worker {self._options.seed} {worker}")
        while time.monotonic() < end:
            wanted = rng.choice(self._pool)
            leaves = wanted.body.get("stream") and rng.random() < LEAVERS
            tenant = LEAVING if leaves else rng.choice(TENANTS)
            moves = [self._moves[name] for name in wanted.names]
            leave_after = rng.randrange(1, 12) if leaves else None
            answer = await ask(self._http, wanted, self._keys[tenant], leave_after)
            stayed = moves == [self._moves[name] for name in wanted.names]
            self._count(wanted, answer, reference, tenant, there=stayed and not _odd(moves))
            if wanted.body["model"] == EXPERIMENT and answer.tokens is not None:
                told = {"name": "liked", "unit": wanted.body["user"], "value": rng.randrange(2)}
                path = f"/v1/experiments/{EXPERIMENT}/outcomes"
                await self._try("POST", path, told, self._keys[tenant])
                self.tally.counts["outcomes told"] += 1

    def _count(
        self,
        wanted: SoakAsk,
        answer: SoakAnswer,
        reference: Mapping[int, SoakAnswer],
        tenant: str,
        *,
        there: bool,
    ) -> None:
        """`there`: the request's adapters were there for all its time."""
        tally = self.tally
        if answer.status == 404 and not there:
            tally.counts["of an adapter that was away"] += 1
            return
        wrong = answer.fault(reference[wanted.index])
        if wrong is not None:
            tally.fault(f"{wanted.path} {wanted.body}: {wrong}")
            return
        tally.counts["left in mid-stream" if answer.tokens is None else "answered"] += 1
        tally.answers.append((answer.started, answer.ended, answer.gap))
        if answer.tokens is not None and tenant != LEAVING:
            tally.asked[tenant] += 1
            generated = 0 if wanted.path.endswith("embeddings") else answer.tokens
            tally.given[tenant] += generated

    async def _churn_adapters(self, end: float) -> None:
        """Take adapters away and bring them back, now and then one whose requests run."""
        names = self._options.names[PERMANENT:]
        while time.monotonic() < end:
            name = self._rng.choice(names)
            self._moves[name] += 1
            await self._try("DELETE", f"/v1/adapters/{name}")
            await asyncio.sleep(CHURN_SECONDS * self._rng.random())
            await self._try("POST", "/v1/adapters", self._added(name))
            self._moves[name] += 1
            self.tally.counts["adapters taken away and brought back"] += 1
            await asyncio.sleep(CHURN_SECONDS)

    async def _churn_keys(self, end: float) -> None:
        """Make a key, ask with it, revoke it, and find that it is."""
        wanted = next(a for a in self._pool if a.body.get("model") == own_server.BASE_NAME)
        while time.monotonic() < end:
            made = await self._make_key("passing")
            answer = await ask(self._http, wanted, made["secret"])
            if answer.status != 200:
                self.tally.fault(f"a new key got {answer}")
            await self._try("DELETE", f"/v1/keys/{made['id']}")
            answer = await ask(self._http, wanted, made["secret"])
            if answer.status != 401:
                self.tally.fault(f"a revoked key got {answer.status}")
            self.tally.counts["keys made and revoked"] += 1
            await asyncio.sleep(CHURN_SECONDS)

    async def _disturb(self, started: float, end: float) -> list[float]:
        """Kill and stop the engine. Returns when, on the monotonic clock."""
        times = []
        for share, sent in DISTURBANCES:
            await asyncio.sleep(max(0.0, started + share * (end - started) - time.monotonic()))
            pid = engine_pid(self._server.pid)
            times.append(time.monotonic())
            os.kill(pid, sent)
            self._say(f"{sent.name} to the engine, process {pid}")
        return times

    async def _progress(self, end: float) -> None:
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(60.0, left))
            counts = ", ".join(f"{count} {what}" for what, count in self.tally.counts.items())
            self._say(f"{max(0.0, end - time.monotonic()) / 60:.0f} min left: {counts}")

    # --- after ----------------------------------------------------------------------------------

    async def _rest(self) -> Rest:
        """Wait until no request runs. Raises RuntimeError if that takes too long."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while await self._metric("requests_running") + await self._metric("requests_waiting"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"requests still run after {SETTLE_SECONDS:.0f} s without load")
            await asyncio.sleep(0.5)
        await asyncio.sleep(10.0)  # pools of threads let idle ones go
        psutil = require_psutil()
        parts = {
            "API": psutil.Process(self._server.pid),
            "engine": psutil.Process(engine_pid(self._server.pid)),
        }
        return Rest(
            await self._metric("kv_used_blocks"),
            {name: process.num_fds() for name, process in parts.items()},
            {name: process.num_threads() for name, process in parts.items()},
        )

    def _judge(self, before: Rest, after: Rest, disturbed: list[float]) -> list[Check]:
        tally = self.tally
        longest = [
            max((gap for start, end, gap in tally.answers if start < at < end), default=0.0)
            for at in disturbed
        ]
        pauses = list(zip(disturbed, longest, strict=True))
        quiet = [
            gap
            for start, end, gap in tally.answers
            if not any(start < at + 2 * silence and at < end for at, silence in pauses)
        ]
        whole = tally.counts["answered"]
        most = number(max(quiet, default=None), 2)
        silences = ", ".join(
            f"{sent.name} {seconds:.1f} s"
            for (_, sent), seconds in zip(DISTURBANCES, longest, strict=True)
        )
        return [
            Check(
                "every token is the undisturbed run's",
                not tally.counts["faults"] and whole > 0,
                f"{whole} answers, {tally.counts['faults']} faults",
            ),
            Check(
                "streams go on after each death",
                True,
                f"longest silence: {silences}; at other times p99 "
                f"{number(percentile(quiet, 99), 2)} s, most {most} s",
            ),
            Check(
                "KV blocks are free",
                after.used_blocks == before.used_blocks == 0,
                f"{before.used_blocks:.0f} before, {after.used_blocks:.0f} after",
            ),
            _back("descriptors", before.descriptors, after.descriptors),
            _back("threads", before.threads, after.threads),
        ]

    async def _usage(self) -> Check:
        """Each tenant's usage against what its clients were given."""
        rows = (await self._call("GET", "/v1/usage?group=tenant"))["data"]
        told = {row["tenant"]: row for row in rows}
        said, holds = [], True
        for tenant in TENANTS:
            row = told.get(tenant, {"completion_tokens": 0, "requests": 0})
            asked, given = self.tally.asked[tenant], self.tally.given[tenant]
            holds &= row["requests"] == asked and row["completion_tokens"] == given
            said.append(
                f"{tenant}: {row['requests']} requests, {row['completion_tokens']} tokens; "
                f"its clients: {asked}, {given}"
            )
        return Check("usage is what clients were given", holds, "; ".join(said))

    # --- calls ----------------------------------------------------------------------------------

    def _added(self, name: str) -> dict[str, str]:
        return {"name": name, "path": str(self._folders[name])}

    async def _make_key(self, tenant: str) -> dict[str, Any]:
        return await self._call("POST", "/v1/keys", {"tenant": tenant, "names": ["*"]})

    async def _metric(self, name: str) -> float:
        response = await self._http.get("/metrics", headers=bearer(self._admin))
        for line in response.text.splitlines():
            if line.startswith(f"quickchange_{name} "):
                return float(line.rsplit(" ", 1)[1])
        raise RuntimeError(f"/metrics has no quickchange_{name}")

    async def _try(self, method: str, path: str, body: Any = None, key: str | None = None) -> None:
        """Make a call whose refusal is a fault, with which the soak goes on."""
        try:
            await self._call(method, path, body, key)
        except (RuntimeError, httpx.HTTPError) as error:
            self.tally.fault(str(error))

    async def _call(
        self, method: str, path: str, body: Any = None, key: str | None = None
    ) -> dict[str, Any]:
        """A call with an administrator's key, or another. Raises RuntimeError if it is refused."""
        headers = bearer(key or self._admin)
        response = await self._http.request(method, path, json=body, headers=headers)
        if response.status_code >= 300:
            raise RuntimeError(f"{method} {path}: {response.status_code} {response.text[:300]}")
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer


def _odd(moves: list[int]) -> bool:
    return any(count % 2 for count in moves)


def _back(what: str, before: Mapping[str, int], after: Mapping[str, int]) -> Check:
    figures = ", ".join(f"{name} {before[name]} to {after[name]}" for name in before)
    holds = all(after[name] <= before[name] + SLACK for name in before)
    return Check(f"{what} are back where they began", holds, figures)


def engine_pid(server: int) -> int:
    """The engine's process: the server's child with most memory."""
    children = [process for process in memory(server) if process.pid != server]
    if not children:
        raise RuntimeError("the server has no engine process")
    return max(children, key=lambda process: process.rss).pid


def growth_checks(growth: tuple[Growth, ...], most: float) -> list[Check]:
    """Growth of the processes that lived for long, over the last half of their samples."""
    checks = []
    longest = max((g.seconds[-1] - g.seconds[0] for g in growth), default=0.0)
    for g in growth:
        half = len(g.seconds) // 2
        if g.seconds[-1] - g.seconds[0] < longest / 4 or half < 4 or g.rss[-1] < 32 * MEBI:
            continue
        per_minute = slope([t / 60 for t in g.seconds[half:]], g.rss[half:])
        holds = per_minute is not None and per_minute <= most * MEBI
        figures = f"{number(per_minute, 2, 1 / MEBI)} MiB a minute"
        checks.append(Check(f"memory of {g.process} ({g.pid}) is level", holds, figures))
    return checks


def measure_soak(options: SoakOptions, work: Path, say: Callable[[str], None]) -> SoakResult:
    """Make the adapters, run the server, soak it, verify its store. `say` gets the progress."""
    say(f"writing {options.adapters} adapters of rank {options.rank}")
    spec = AdapterSpec(rank=options.rank, targets=("q_proj", "v_proj"), seed=options.seed)
    shapes = write_adapters(options.model, work / "adapters", options.names, spec)
    size = device_bytes(shapes, options.rank, own_server.VALUE_BYTES["float32"])
    store = work / "store"
    admin = own_server.admin_key(store)
    environment = {
        "QUICKCHANGE_API_KEYS": "true",
        "QUICKCHANGE_KV_CACHE_BYTES": str(KV_BYTES),
        "QUICKCHANGE_ADAPTER_DEVICE_BYTES": str(options.resident * size),
        "QUICKCHANGE_ADAPTER_HOST_BYTES": str(options.host_resident * size),
        "QUICKCHANGE_ENGINE_STALL_SECONDS": str(options.stall_seconds),
    }
    own = own_server.OwnServer(str(options.model), store, environment=environment, key=admin)
    folders = {name: work / "adapters" / name for name in options.names}
    with own.running(work / "server.log") as server:
        soak = Soak(options, server, admin, folders, say)
        checks, samples = asyncio.run(soak.run())
    command = quickchange_command("adapters", "verify", "--store", str(store))
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    words = (verified.stdout + verified.stderr).strip().splitlines()
    clean = Check("adapters verify is clean", verified.returncode == 0, (words or ["silent"])[-1])
    growth = samples.growth()
    return SoakResult(
        (*checks, *growth_checks(growth, options.slope), clean), growth, dict(soak.tally.counts)
    )


def soak_table(result: SoakResult) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in result.counts.items())
    checks = table(
        ("", "what must hold", "figures"),
        [["ok" if c.holds else "FAIL", c.name, c.figures] for c in result.checks],
    )
    return "\n\n".join([counts, checks, growth_table(result.growth)])
