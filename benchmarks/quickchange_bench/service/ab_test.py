"""An experiment from its definition to a decision, over HTTP, on the demo's order task.

`aa` serves the same adapter twice: nothing may be called different. `ab` serves the base model
against the adapter that was trained for the task. Each user asks once; the answer is scored here,
against the task's held-out reference, and its scores go back as outcomes. In the end `ab` promotes
what was found better, asks it by the experiment's alias, and rolls back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import httpx

from quickchange_bench import provenance
from quickchange_bench.bench_results import SCHEMA_VERSION, MachineInfo
from quickchange_bench.load.load_client import bearer
from quickchange_bench.service.ab_report import results_text
from quickchange_training.demo.tasks import TASKS, TaskExample

Run = Literal["aa", "ab"]
RUNS: tuple[Run, ...] = get_args(Run)
Json = dict[str, Any]
Say = Callable[[str], None]

TASK = TASKS["order-json"]
TUNED = {"model": "order-json", "turbo": "order-json-heads"}
DECIDING = "valid"  # the answer is one JSON object with the task's keys
ANSWER_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class AbOptions:
    """Options of the run. `base` is the base model's name on the server."""

    url: str
    run: Run
    name: str
    base: str
    users: int = 640
    concurrency: int = 8
    minimum: int = 100
    look_every: int = 100  # answers between two looks at the results
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class AbResult:
    """Final results from the server, and what was done with the winner."""

    machine: MachineInfo
    commit: str | None
    command: str
    started: str
    results: Json
    looks: tuple[str, ...]  # the deciding outcome's decision at each look
    promoted: Json | None  # None: the tuned variant was not found better
    rolled_back: Json | None
    kind: str = "ab"
    version: int = SCHEMA_VERSION


def definition(options: AbOptions) -> Json:
    """The experiment's body for POST /v1/experiments."""
    control = {"model": options.base, "turbo": "base-heads"} if options.run == "ab" else TUNED
    return {
        "name": options.name,
        "description": f"the task {TASK.name}: {DECIDING}",
        "variants": [{"name": "now", **control}, {"name": "tuned", **TUNED}],
        "metrics": [
            {"name": DECIDING, "kind": "flag"},
            {"name": "fields", "kind": "number"},
        ],
        "minimum": options.minimum,
        "alias": f"{options.name}-live",
    }


def request_of(model: str, user: int, example: TaskExample) -> Json:
    """Chat request with greedy decoding for one example."""
    return {
        "model": model,
        "user": f"user-{user}",
        "messages": [{"role": "user", "content": example.prompt}],
        "temperature": 0,
        "max_tokens": TASK.answer_tokens,
    }


def outcomes_of(answer: Mapping[str, Any], example: TaskExample) -> list[Json]:
    """The answer's scores as outcomes; sent twice, they count once."""
    scores = TASK.score([example], [answer["choices"][0]["message"]["content"]])
    values = {DECIDING: scores[DECIDING] == 1.0, "fields": scores["fields"]}
    return [
        {"name": name, "value": value, "completion": answer["id"], "idempotency_key": answer["id"]}
        for name, value in values.items()
    ]


def decision_of(results: Mapping[str, Any]) -> str:
    """Decision on the deciding outcome."""
    (outcome,) = (outcome for outcome in results["outcomes"] if outcome["name"] == DECIDING)
    return str(outcome["comparisons"][0]["decision"])


async def run_ab(options: AbOptions, say: Say) -> AbResult:
    """Run the experiment; where the tuned variant is better, promote it and roll back.

    Raises:
        RuntimeError: the server refused something; says what and why.
    """
    started = provenance.now()
    headers = {} if options.key is None else bearer(options.key)
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, timeout=ANSWER_SECONDS, trust_env=False
    ) as http:
        server = Server(http, options.name)
        await server.ask("POST", "/v1/experiments", definition(options))
        say(f"created {options.name}; {options.users} users, {options.concurrency} at once")
        looks = await _send(server, options, say)
        results = await server.do("GET", "results")
        say(results_text(results))
        promoted = rolled_back = None
        if options.run == "ab" and decision_of(results) == "better":
            promoted, rolled_back = await promote_and_back(server, say)
    return AbResult(
        machine=provenance.machine(),
        commit=provenance.commit(),
        command=provenance.command(),
        started=started,
        results=results,
        looks=tuple(looks),
        promoted=promoted,
        rolled_back=rolled_back,
    )


@dataclass(frozen=True)
class Server:
    """One experiment on a server."""

    http: httpx.AsyncClient
    experiment: str

    async def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        response = await self.http.request(method, path, json=body)
        if response.status_code >= 300:
            raise RuntimeError(f"{method} {path}: {response.status_code}: {response.text[:400]}")
        answer: Json = response.json()
        return answer

    async def do(self, method: str, action: str, body: Json | None = None) -> Json:
        return await self.ask(method, f"/v1/experiments/{self.experiment}/{action}", body)


async def _send(server: Server, options: AbOptions, say: Say) -> list[str]:
    """Send every user's request and its outcomes; returns the decision at each look."""
    examples = TASK.examples("held-out", options.users, seed=0)
    queue: Iterator[tuple[int, TaskExample]] = iter(enumerate(examples))
    looks: list[str] = []
    scored = 0

    async def worker() -> None:
        nonlocal scored
        for user, example in queue:
            body = request_of(options.name, user, example)
            answer = await server.ask("POST", "/v1/chat/completions", body)
            await server.do("POST", "outcomes", {"outcomes": outcomes_of(answer, example)})
            scored += 1
            if scored % options.look_every == 0:
                count = scored
                looks.append(decision_of(await server.do("GET", "results")))
                say(f"{count} answers told: {DECIDING}: {looks[-1]}")

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(options.concurrency):
                group.create_task(worker())
    except ExceptionGroup as failed:
        raise RuntimeError(str(failed.exceptions[0])) from failed
    return looks


async def promote_and_back(server: Server, say: Say) -> tuple[Json, Json]:
    """Point the alias at the tuned variant, ask it, and point it back."""
    promoted = await server.do("POST", "promote", {"variant": "tuned"})
    alias = promoted["alias"]
    before, after = _pointed(promoted["before"]), _pointed(promoted["after"])
    say(f"promoted: {alias} is {after}; it was {before}")
    (example,) = TASK.examples("held-out", 1, seed=1)
    answer = await server.ask("POST", "/v1/chat/completions", request_of(alias, 0, example))
    say(f"{alias} says: {answer['choices'][0]['message']['content']}")
    rolled_back = await server.do("POST", "rollback")
    say(f"rolled back: {alias} is {_pointed(rolled_back['after'])}")
    return promoted, rolled_back


def _pointed(target: Json | None) -> str:
    if target is None:
        return "nothing"
    name, heads = str(target["target"]), target["turbo"]
    return f"{name} with {heads}" if heads else name
