"""An engine without a model: tokens are a function of (adapters, seed, position), as promised.

Where a request drafts, some steps give it several tokens, and they are the same tokens.
`partial(fake_engine.main, behaviour=Behaviour(...))` is an entry that a spawned process can
import. Tokens are lowercase ASCII letters, so that a byte tokenizer makes text of them.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from quickchange_server.config import Settings
from quickchange_server.protocol import (
    LOOKUP,
    AdapterFailed,
    AdapterMoved,
    Began,
    Cancel,
    Command,
    Component,
    Delta,
    DraftCount,
    Fatal,
    FinishReason,
    Forget,
    Pin,
    Ping,
    Prefetch,
    Prices,
    Pulse,
    Ready,
    SamplingParams,
    Shutdown,
    StepReport,
    StepStats,
    Submit,
    TokenLogprobs,
)

ADAPTER_BYTES = 1000


@dataclass(frozen=True)
class Behaviour:
    """What the fake does besides answering."""

    step_seconds: float = 0.0  # of each step, which gives every running sequence one token...
    drafts: int = 4  # ... and up to so many more where its request drafts
    start_seconds: float = 0.0
    refusal: str | None = None  # a Fatal instead of Ready
    exit_at_start: int | None = None  # the exit code, before Ready
    broken: Path | None = None  # no start succeeds while this file is there
    prices: Prices = ()  # that it measured
    poison: int | None = None  # a prompt beginning with this token ends the process...
    poison_at: int = 0  # ... once so many tokens of it have been emitted
    sleeper: int | None = None  # a prompt beginning with this token hangs the process there
    sure: bool = True  # each token's log-probability is -1; else that of `logprob_at`
    missing: frozenset[str] = frozenset()  # digests that can't be loaded
    deaf: bool = False  # reads no commands after Ready
    says: tuple[int, ...] = ()  # tokens that every answer has instead, in a circle
    hold: Path | None = None  # while this file is there, no answer grows beyond its first tokens
    journal: Path | None = None  # a JSON line for each start and each command


@dataclass
class Sequence:
    submit: Submit
    emitted: int
    begun: bool = False


@dataclass
class FakeEngine:
    connection: Connection
    settings: Settings
    behaviour: Behaviour
    sequences: dict[str, Sequence] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)
    pinned: set[str] = field(default_factory=set)
    drafts: list[DraftCount] = field(default_factory=list)  # of the step under way

    def run(self) -> None:
        try:
            while self.receive():
                if self.sequences:
                    time.sleep(self.behaviour.step_seconds)
                    self.connection.send(self.step())
        except (EOFError, OSError):
            return

    def receive(self) -> bool:
        """Take what has come, waiting only where there is nothing to do."""
        while not self.sequences or self.connection.poll():
            command: Command = self.connection.recv()
            note(self.behaviour, type(command).__name__, command)
            match command:
                case Shutdown():
                    return False
                case Submit():
                    self.submit(command)
                case Cancel():
                    self.sequences.pop(command.request_id, None)
                    if not self.sequences:
                        self.connection.send(Pulse(self.stats()))
                case Ping():
                    self.connection.send(Pulse(self.stats()))
                case Prefetch():
                    self.load(command.digest)
                case Pin():
                    self.pin(command)
                case Forget():
                    self.loaded.discard(command.digest)
                    self.connection.send(AdapterMoved(command.digest, "disk", "forget"))
        return True

    def submit(self, submit: Submit) -> None:
        for digest in digests_of(submit):
            if not self.load(digest):
                delta = Delta(
                    submit.request_id,
                    finish_reason="error",
                    error=f"adapter {digest} could not be loaded",
                    error_kind="adapter",
                )
                self.connection.send(StepReport((delta,), self.stats()))
                return
        asks = (
            submit.sampling.max_tokens
            or submit.pooling
            or submit.sampling.prompt_logprobs is not None
        )
        if not asks:
            delta = Delta(submit.request_id, finish_reason="length")
            self.connection.send(StepReport((delta,), self.stats()))
            return
        self.connection.send(Began((submit.request_id,)))
        self.sequences[submit.request_id] = Sequence(submit, len(submit.output))

    def load(self, digest: str) -> bool:
        if digest in self.behaviour.missing:
            self.connection.send(AdapterFailed(digest, "no such file"))
            return False
        if digest not in self.loaded:
            self.loaded.add(digest)
            self.connection.send(AdapterMoved(digest, "device", "load", 0.01, ADAPTER_BYTES))
        return True

    def pin(self, command: Pin) -> None:
        if command.pinned:
            self.pinned.add(command.digest)
            self.load(command.digest)
        else:
            self.pinned.discard(command.digest)

    def step(self) -> StepReport:
        held = self.behaviour.hold is not None and self.behaviour.hold.exists()
        moving = [key for key, each in self.sequences.items() if not (held and each.begun)]
        return StepReport(tuple(self.advance(key) for key in moving), self.stats())

    def advance(self, key: str) -> Delta:
        sequence = self.sequences[key]
        submit, behaviour = sequence.submit, self.behaviour
        if submit.prompt[:1] == (behaviour.poison,) and sequence.emitted >= behaviour.poison_at:
            os._exit(3)
        if submit.prompt[:1] == (behaviour.sleeper,) and sequence.emitted >= behaviour.poison_at:
            time.sleep(3600)
        if submit.pooling is not None or not submit.sampling.max_tokens:
            del self.sequences[key]
            return read_only(submit)
        tokens: list[int] = []
        drafted = 0 if submit.drafting is None else behaviour.drafts
        agreed = accepted_at(submit.seed, sequence.emitted, drafted)
        finish = None
        while finish is None and len(tokens) <= agreed:
            position = len(submit.prompt) + sequence.emitted
            if says := behaviour.says:
                tokens.append(says[sequence.emitted % len(says)])
            else:
                tokens.append(token_at(submit.seed, position, submit.adapters))
            sequence.emitted += 1
            finish = finish_of(submit.sampling, tokens[-1], sequence.emitted)
        first, sequence.begun = not sequence.begun, True
        if finish is not None:
            del self.sequences[key]
        accepted = min(agreed, len(tokens))
        self.count(submit, drafted, accepted)
        wanted = submit.sampling.logprobs is not None
        begin = len(submit.prompt) + sequence.emitted - len(tokens)
        chances = [
            -1.0 if behaviour.sure else logprob_at(begin + i, t) for i, t in enumerate(tokens)
        ]
        return Delta(
            request_id=key,
            token_ids=tuple(tokens),
            logprobs=tuple(
                TokenLogprobs(t, p, ((t, p),))
                for t, p in zip(tokens, chances, strict=True)
                if wanted
            ),
            prompt_logprobs=prompt_logprobs_of(submit) if first and not submit.output else (),
            finish_reason=finish,
            cached_tokens=0 if first else None,
            queue_seconds=0.001 if first else None,
            drafted=drafted,
            accepted=accepted,
        )

    def count(self, submit: Submit, drafted: int, accepted: int) -> None:
        drafting = submit.drafting
        if drafting is None:
            return
        drafter = LOOKUP if drafting.heads is None else drafting.heads
        depths = range(1, drafted + 1)
        self.drafts += [DraftCount(drafter, d, 1, int(d <= accepted)) for d in depths]

    def stats(self) -> StepStats:
        count = len(self.sequences)
        digests = {c.digest for s in self.sequences.values() for c in s.submit.adapters}
        drafts, self.drafts = tuple(self.drafts), []
        return StepStats(
            seconds=self.behaviour.step_seconds,
            rows=count,
            prefill_rows=0,
            sequences=count,
            adapters=len(digests),
            running=count,
            waiting=0,
            kv_blocks_used=count,
            kv_blocks_cached=0,
            prefix_hit_tokens=0,
            prefix_query_tokens=0,
            preemptions=0,
            drafts=drafts,
            draft_rows=sum(c.drafted for c in drafts),
            draft_estimate=sum(c.drafted for c in drafts) / 2,
            draft_gain=sum(c.accepted for c in drafts),
        )


def token_at(seed: int, position: int, adapters: tuple[Component, ...] = ()) -> int:
    """The token that any fake engine emits there."""
    return ord("a") + zlib.crc32(repr((seed, position, adapters)).encode()) % 26


def logprob_at(position: int, token: int) -> float:
    """The log-probability of a token that stands there."""
    return -(1 + zlib.crc32(repr((position, token)).encode()) % 1000) / 250


def prompt_logprobs_of(submit: Submit) -> tuple[TokenLogprobs, ...]:
    """Where a request asks for them: each token is the best, and the one after it the next best."""
    top = submit.sampling.prompt_logprobs
    if top is None:
        return ()
    pairs = [(t, logprob_at(i, t)) for i, t in enumerate(submit.prompt)][1:]
    return tuple(TokenLogprobs(t, p, tuple((t + k, p - k) for k in range(top))) for t, p in pairs)


def embedding_of(
    prompt: tuple[int, ...], pooling: str, adapters: tuple[Component, ...] = ()
) -> list[float]:
    """What the fake engine answers: four whole numbers."""
    return [
        float(1 + zlib.crc32(repr((prompt, pooling, adapters, i)).encode()) % 9) for i in range(4)
    ]


def read_only(submit: Submit) -> Delta:
    """The answer to a request without new tokens."""
    embedding = None
    if submit.pooling is not None:
        numbers = embedding_of(submit.prompt, submit.pooling, submit.adapters)
        embedding = struct.pack("<4f", *numbers)
    return Delta(
        submit.request_id,
        finish_reason="length" if embedding is None else "stop",
        cached_tokens=0,
        queue_seconds=0.001,
        prompt_logprobs=prompt_logprobs_of(submit),
        embedding=embedding,
    )


def accepted_at(seed: int, emitted: int, drafted: int) -> int:
    """The number of `drafted` tokens accepted in the step after `emitted` tokens."""
    return zlib.crc32(repr((seed, emitted)).encode()) % (drafted + 1)


def digests_of(submit: Submit) -> list[str]:
    """What has to be loaded for a request."""
    heads = None if submit.drafting is None else submit.drafting.heads
    digests = [component.digest for component in submit.adapters]
    return digests if heads is None else [*digests, heads]


def expected_tokens(wanted: Submit) -> list[int]:
    """All tokens of an undisturbed request."""
    tokens: list[int] = []
    while not tokens or finish_of(wanted.sampling, tokens[-1], len(tokens)) is None:
        position = len(wanted.prompt) + len(tokens)
        tokens.append(token_at(wanted.seed, position, wanted.adapters))
    return tokens


def finish_of(sampling: SamplingParams, token: int, emitted: int) -> FinishReason | None:
    if token in sampling.stop_token_ids and emitted >= sampling.min_tokens:
        return "stop"
    return "length" if emitted >= sampling.token_limit else None


def note(behaviour: Behaviour, kind: str, command: Command | None = None) -> None:
    if behaviour.journal is None:
        return
    entry = {
        "kind": kind,
        "pid": os.getpid(),
        "request_id": getattr(command, "request_id", None),
        "digest": getattr(command, "digest", None),
        "output": len(getattr(command, "output", ())),
        "background": getattr(command, "background", None),
        "salt": getattr(command, "salt", None),
        "cache_salt": getattr(command, "cache_salt", None),
        "bad_tokens": getattr(command, "bad_tokens", None),
        "heads": getattr(getattr(command, "drafting", None), "heads", None),
        "prompt": getattr(command, "prompt", None),
        "prices": getattr(command, "prices", None),
        "constraint": _constraint(command),
        **(
            {name: getattr(command.sampling, name) for name in ("logprobs", "prompt_logprobs")}
            if isinstance(command, Submit)
            else dict.fromkeys(("logprobs", "prompt_logprobs"))
        ),
    }
    with behaviour.journal.open("a") as journal:
        journal.write(json.dumps(entry) + "\n")


def _constraint(command: Command | None) -> tuple[str, ...] | None:
    constraint = getattr(command, "constraint", None)
    if constraint is None:
        return None
    return (constraint.kind, constraint.source, *filter(None, [constraint.before]))


def entries(journal: Path, kind: str) -> list[dict[str, object]]:
    """The journal's entries of one kind ("Start", "Submit", "Cancel", ...)."""
    if not journal.exists():
        return []
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def main(
    connection: Connection,
    settings: Settings,
    behaviour: Behaviour = Behaviour(),
) -> None:
    note(behaviour, "Start")
    time.sleep(behaviour.start_seconds)
    if behaviour.refusal is not None:
        connection.send(Fatal(behaviour.refusal, setting="model"))
        return
    if behaviour.exit_at_start is not None:
        os._exit(behaviour.exit_at_start)
    if behaviour.broken is not None and behaviour.broken.exists():
        os._exit(4)
    connection.send(
        Ready(
            max_model_len=settings.max_model_len or 2048,
            kv_blocks=128,
            block_size=settings.block_size,
            load_seconds=behaviour.start_seconds,
            adapter_device_bytes=settings.adapter_device_bytes or 1 << 30,
            adapter_host_bytes=settings.adapter_host_bytes,
            prices=behaviour.prices,
            hidden_size=4,
        )
    )
    if behaviour.deaf:
        time.sleep(3600)
    FakeEngine(connection, settings, behaviour).run()
