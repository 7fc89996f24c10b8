"""The engine: requests in, one report a step out. Token ids only; no HTTP, no text, no processes.

`step` is the architecture in a few lines: schedule and launch, then learn from an earlier step,
advance and report.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quickchange_kernels import dispatch
from quickchange_kernels.compile_watch import CompileWatch
from quickchange_kernels.kernel_cache import link_prebuilt
from quickchange_server.adapters.manager import PacedLoad
from quickchange_server.config import Settings
from quickchange_server.engine.engine_memory import EngineMemory
from quickchange_server.engine.inputs.sample_tables import RowError
from quickchange_server.engine.memory.device_memory import memory_of
from quickchange_server.engine.memory.footprint import held_dtype
from quickchange_server.engine.parallel.followers import Followers
from quickchange_server.engine.sampler import SampledToken
from quickchange_server.engine.scheduling.scheduler import Scheduled, Scheduler
from quickchange_server.engine.scheduling.sequence import Sequence, fault_of
from quickchange_server.engine.step_results import Flight, Ran, Result
from quickchange_server.engine.token_masks import constraints_of
from quickchange_server.engine.warm_up import LateWork
from quickchange_server.model.loading.model_dtype import dtype_name
from quickchange_server.model.loading.model_loader import LoadedModel
from quickchange_server.protocol import (
    AdapterFailed,
    AdapterMoved,
    Component,
    Delta,
    ErrorKind,
    FinishReason,
    Prices,
    Ready,
    StepReport,
    StepStats,
    Submit,
)
from quickchange_server.spec_decode.cost_model import StepCost
from quickchange_server.spec_decode.prompt_lookup import TokenText
from quickchange_server.spec_decode.speculator import (
    DraftReport,
    NoSpeculation,
    Speculation,
    StepDrafts,
)
from quickchange_server.structured_output.compiler import ConstraintCompiler

logger = logging.getLogger(__name__)

_UNSOUND = "prompt: it can't be read: the model's hidden states or logits hold NaN or infinity"
_DEPTH = 2  # steps in flight on a device that works beside the host


class _InFlight(NamedTuple):
    """A launched step and what its results will be judged by."""

    flight: Flight
    drafts: StepDrafts
    started: float  # when its scheduling began; seconds, monotonic
    must_settle: bool  # before the next step is scheduled


class Engine:
    """One model, its KV cache and its adapters. Everything but the loader runs on one thread.

    `load_adapter` reads an adapter version by digest, on the loader thread. `on_wake` asks the
    owner to call `poll_adapters` and `step` again; it is called on any thread. `text`: the
    tokenizer for drafting the prompt's words by their text; None: no such drafts. `constraints`:
    the grammar compiler; None: requests with a constraint are refused. `prices`: of steps, as an
    engine like this one measured them; empty: they are measured. `on_begun` is told the ids of
    requests before the engine works on them for the first time. `depth`: steps that may be launched
    and not settled; None: what suits the device. `followers`: hold the other parts of the model;
    None: it is whole.

    While a step is in flight the next one is scheduled, launched behind it, and fed its tokens on
    the device. A sequence that a token turns out to end has one row in the next step, whose result
    is dropped. Where the tokens decide what the next step computes, they are waited for first.

    An error that belongs to one sequence (its parameters, its grammar, its prompt's reading, its
    drafts) ends that sequence alone, with an error delta. An error in work that sequences share is
    raised, after which the engine's state is not to be trusted.
    """

    def __init__(
        self,
        model: LoadedModel,
        settings: Settings,
        *,
        load_adapter: PacedLoad,
        on_wake: Callable[[], None],
        text: TokenText | None = None,
        constraints: ConstraintCompiler | None = None,
        prices: Prices = (),
        on_begun: Callable[[tuple[str, ...]], None] = lambda _: None,
        depth: int | None = None,
        followers: Followers | None = None,
    ) -> None:
        self._settings = settings
        self._on_wake = on_wake
        self._on_begun = on_begun
        self._prices = prices
        self._vocabulary = model.vocabulary
        self._hidden_size = model.hidden
        self._dtypes = dtype_name(model.dtype), dtype_name(held_dtype(model, settings))
        self._scaling = model.scaling
        memory = EngineMemory(model, settings, memory_of(torch.device(settings.device)), followers)
        self._adapters = memory.adapter_tiers(load_adapter, on_wake)
        self._constraints = constraints_of(constraints, model.vocabulary, on_wake)
        self._compiles = dispatch.triton_compiles(torch.device(settings.device))
        if self._compiles:
            link_prebuilt()
        fitted = memory.fit(self._adapters, self._constraints.masks)
        self._memory = fitted.table
        logger.info("memory:\n%s", fitted.table)
        self._runner, caches = fitted.runner, fitted.caches
        self._max_model_len = caches.max_model_len
        if self._compiles:
            self._runner.launch_all(fitted.limits)
        self._speculation = self._made_speculation(text)
        self.scheduler = Scheduler(
            caches.blocks,
            self._adapters,
            self._speculation,
            max_batch_tokens=settings.batch_tokens,
            max_sequences=settings.step_sequences,
            max_model_len=self._max_model_len,
            states=caches.states,
        )
        self._refused: list[Delta] = []
        self._late = LateWork(self._runner, CompileWatch() if self._compiles else None)
        self._depth = depth or (1 if settings.device == "cpu" else _DEPTH)
        self._flights: deque[_InFlight] = deque()  # oldest first
        self._deltas: list[Delta] = []  # of sequences that ended outside of a step
        self._settled = 0.0  # when the last step was; seconds, monotonic

    def ready(self, load_seconds: float) -> Ready:
        """Limits and sizes for the API process. load_seconds: the duration of the start."""
        settings = self._settings
        return Ready(
            max_model_len=self._max_model_len,
            kv_blocks=self.scheduler.blocks.num_blocks,
            block_size=settings.block_size,
            load_seconds=load_seconds,
            adapter_device_bytes=self._adapters.device_bytes,
            adapter_host_bytes=settings.adapter_host_bytes,
            prices=self._prices,
            own_bytes=_own_bytes(),
            dtype=self._dtypes[0],
            adapter_dtype=self._dtypes[1],
            memory=self._memory,
            hidden_size=self._hidden_size,
        )

    def submit(self, submit: Submit) -> None:
        """Queue a request. One that can't run is answered with an error delta by the next step."""
        try:
            self._queue(submit)
        except BaseException as error:
            self._refused.append(_error(submit.request_id, fault_of(error), "request"))
            self.cancel(submit.request_id)

    def _queue(self, submit: Submit) -> None:
        if (error := self._refusal(submit)) is not None:
            self._refused.append(_error(submit.request_id, error, "request"))
            return
        sequence = Sequence(submit, time.monotonic(), self._scaling)
        reason = sequence.finish_reason(self._max_model_len)
        # A text at its limit may have been complete as well, which its grammar has to tell.
        if reason == "stop" or (reason is not None and submit.constraint is None):
            self._refused.append(Delta(submit.request_id, finish_reason=reason))
        elif submit.constraint is not None:
            self._begin([sequence])
            self._constraints.hold(sequence, submit.constraint)
        else:
            self.scheduler.add(sequence)

    def watch_states(self, watch: Callable[[Tensor], None] | None) -> None:
        """Tell `watch` of each step's hidden states, as `Runner.watch` says; None: nobody."""
        self._runner.watch = watch

    def cancel(self, request_id: str) -> None:
        """Drop a request in any state; an unknown id is ignored."""
        self._constraints.cancel(request_id)
        self.scheduler.cancel(request_id)

    def prefetch(self, digest: str, tier: Literal["device", "host"]) -> None:
        self._adapters.prefetch(digest, tier)

    def pin(self, digest: str, pinned: bool) -> None:
        self._adapters.pin(digest, pinned)

    def forget(self, digest: str) -> None:
        self._adapters.forget(digest)

    def poll_adapters(self) -> list[AdapterMoved | AdapterFailed]:
        """Apply finished loads, start the next ones and return the moves since the last call."""
        return self._adapters.poll()

    def step(self) -> StepReport | None:
        """Launch what can be, then settle one step, the oldest, and return its report. None if
        there was nothing to compute and nothing to report."""
        self._deltas += self._ended_before_a_step()
        while len(self._flights) < self._depth and not self._must_settle():
            if not self._launch():
                break
        if not self._flights:
            deltas, self._deltas = self._deltas, []
            return StepReport(tuple(deltas), self.stats()) if deltas else None
        return self._settle(self._flights.popleft())

    def land(self) -> list[StepReport]:
        """Settle the steps in flight, and launch no other; returns their reports."""
        return [self._settle(self._flights.popleft()) for _ in range(len(self._flights))]

    def _must_settle(self) -> bool:
        """True if no step can be prepared before the one in flight has told its tokens."""
        return bool(self._flights) and self._flights[-1].must_settle

    def _launch(self) -> bool:
        """Schedule a step and give it to the device; False if there is nothing to compute."""
        started = time.monotonic()
        plan = self.scheduler.schedule(started)
        for request_id, fault in self.scheduler.faults.items():
            self.scheduler.cancel(request_id)
            self._deltas.append(_error(request_id, fault, "request"))
        if self.scheduler.claims_changed:
            self._on_wake()  # the tiers act on claims in `poll_adapters`
        if not plan:
            return False
        if new := [item.sequence for item in plan if not item.sequence.begun]:
            self._begin(new)
        flight = self._runner.launch(plan, self._speculation)
        self._late.note(plan)
        drafts = self._speculation.under_way()
        faults = flight.faults
        self.scheduler.launched(
            [item for item in plan if item.sequence.request_id not in faults] if faults else plan
        )
        must_settle = bool(faults) or any(
            item.samples and item.sequence.needs_its_tokens for item in plan
        )
        self._flights.append(_InFlight(flight, drafts, started, must_settle))
        return True

    def _settle(self, launched: _InFlight) -> StepReport:
        """Wait for a launched step, and let its sequences take their tokens."""
        plan = launched.flight.plan
        ran = launched.flight.ran()
        drafted = self._speculation.observe(plan, ran, launched.drafts)
        deltas, self._deltas = self._deltas, []
        deltas += self._advance(plan, ran)
        began, self._settled = max(launched.started, self._settled), time.monotonic()
        stats = self._stats(plan, drafted, ran.mask_seconds, self._settled - began)
        return StepReport(tuple(deltas), stats)

    def stats(self) -> StepStats:
        """The state between steps; the figures of a step are 0."""
        return self._stats((), DraftReport(), None, 0.0)

    def check_integrity(self) -> None:
        """Raises AssertionError if the scheduler's, the cache's or the tiers' state is broken."""
        in_flight = [item.sequence for f in self._flights for item in f.flight.plan]
        self.scheduler.check_integrity(in_flight)
        self._adapters.check_integrity()

    def close(self) -> None:
        """End the threads that compile grammars and load adapters."""
        self._constraints.close()
        self._adapters.close()
        self._late.close()

    def _made_speculation(self, text: TokenText | None) -> Speculation | NoSpeculation:
        if not self._settings.turbo:
            return NoSpeculation()
        if not self._prices:
            self._prices = tuple(self._runner.price_rows(self._settings.batch_tokens))
        cost = StepCost(self._prices)
        return Speculation(cost, self._adapters.head_count, self._max_model_len, text)

    def _refusal(self, submit: Submit) -> str | None:
        tokens = len(submit.prompt) + len(submit.output)
        virtual = [component for component in submit.adapters if component.virtual_tokens]
        if (error := _refused_prompts(virtual)) is not None:
            return error
        context = self._max_model_len - sum([component.virtual_tokens for component in virtual])
        most = context - (submit.pooling is None)
        if not submit.prompt:
            return "prompt: it has no token; give at least one"
        if not isinstance(submit.sampling.token_limit, int):
            return f"max_tokens: {submit.sampling.token_limit} is not a whole number"
        if tokens > context or len(submit.prompt) > most:
            behind = f" behind {self._max_model_len - context} virtual tokens" if virtual else ""
            return (
                f"prompt: {tokens} tokens{behind} leave no room in a context of "
                f"{self._max_model_len}"
            )
        if not all(0 <= token < self._vocabulary for token in (*submit.prompt, *submit.output)):
            return f"prompt: token ids must be from 0 to {self._vocabulary - 1}"
        return self._adapters.refusal(submit) or self._constraints.refusal(submit)

    def _ended_before_a_step(self) -> list[Delta]:
        """Final deltas of requests that are refused or can't run.

        Queues the sequences whose grammar is ready.
        """
        refused, self._refused = self._refused, []
        failed = [_error(s.request_id, e, "adapter") for s, e in self.scheduler.failures()]
        return [*refused, *failed, *self._begin_constrained()]

    def _begin_constrained(self) -> list[Delta]:
        """Queue the sequences whose grammar is ready; final deltas of those that can't begin."""
        deltas = []
        for sequence, error in self._constraints.released():
            if error is not None:
                deltas.append(_error(sequence.request_id, f"constraint: {error}", "request"))
                continue
            try:
                if reason := sequence.finish_reason(self._max_model_len):
                    deltas.append(Delta(sequence.request_id, finish_reason=reason))
                    continue
            except BaseException as fault:
                deltas.append(_error(sequence.request_id, fault_of(fault), "request"))
                continue
            self.scheduler.add(sequence)
            self._on_wake()  # `poll_adapters` came before this claim, and the loop would sleep
        return deltas

    def _begin(self, sequences: Seq[Sequence]) -> None:
        """Tell of sequences that are about to be worked on for the first time."""
        for sequence in sequences:
            sequence.begun = True
        self._on_begun(tuple([sequence.request_id for sequence in sequences]))

    def _advance(self, plan: Seq[Scheduled], ran: Ran) -> list[Delta]:
        """Record that the plan was computed and return its sequences' deltas."""
        deltas: list[Delta] = []
        results = iter(ran.results)
        holds, faults = self.scheduler.holds, ran.faults
        for item in plan:
            result = next(results) if item.samples else None
            if not holds(item.sequence):
                continue  # it has ended since the launch
            request_id = item.sequence.request_id
            fault = faults.get(request_id) if faults else None
            if fault is None:
                try:
                    deltas += self._advance_one(item, result)
                except BaseException as error:
                    fault = fault_of(error)
            if fault is not None:
                self.scheduler.cancel(request_id)
                deltas.append(_error(request_id, fault, "request"))
        return deltas

    def _advance_one(self, item: Scheduled, result: Result | None) -> list[Delta]:
        sequence = item.sequence
        if sequence.reading is not None and not sequence.reading.sound:
            self.scheduler.cancel(sequence.request_id)
            return [_unsound(sequence, _UNSOUND, "internal")]
        if result is None:
            _, reason = self.scheduler.settled(item, ())
            return [] if reason is None else [self._delta(item, [], reason, 0)]
        drawn, error = _until_error(result.sampled)
        taken, reason = self.scheduler.settled(item, [row.token_id for row in drawn])
        deltas = []
        if taken:
            held = len(result.sampled) - 1
            deltas.append(self._delta(item, drawn[:taken], reason, min(taken, held)))
        if reason is None and error is not None:
            self.scheduler.cancel(sequence.request_id)
            deltas.append(_unsound(sequence, error.error, error.kind))
        return deltas

    def _delta(
        self,
        item: Scheduled,
        drawn: list[SampledToken],
        reason: FinishReason | None,
        accepted: int,
    ) -> Delta:
        sequence = item.sequence
        token_ids = tuple([row.token_id for row in drawn])
        logprobs = tuple([row.logprobs for row in drawn if row.logprobs is not None])
        delta = Delta(sequence.request_id, token_ids, logprobs, reason)
        if item.drafts:
            delta = delta._replace(drafted=len(item.drafts), accepted=accepted)
        if sequence.reported:
            return delta
        sequence.reported, reading = True, sequence.reading
        return delta._replace(
            cached_tokens=sequence.cached_tokens,
            queue_seconds=sequence.queue_seconds,
            prompt_logprobs=() if reading is None else reading.scores,
            embedding=None if reading is None else reading.embedding,
        )

    def _stats(
        self,
        plan: Seq[Scheduled],
        drafted: DraftReport,
        mask_seconds: float | None,
        seconds: float,
    ) -> StepStats:
        scheduler = self.scheduler
        return StepStats(
            seconds=seconds,
            rows=sum([item.rows for item in plan]),
            prefill_rows=sum([item.count for item in plan if item.prefills]),
            sequences=len(plan),
            adapters=len({digest for item in plan for digest in item.sequence.digests}),
            running=len(scheduler.running),
            waiting=len(scheduler) - len(scheduler.running) + len(self._constraints),
            kv_blocks_used=scheduler.blocks.used,
            kv_blocks_cached=scheduler.blocks.cached,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            preemptions=scheduler.preemptions,
            drafts=drafted.counts,
            draft_rows=drafted.rows,
            draft_estimate=drafted.estimate,
            draft_gain=drafted.gain,
            mask_seconds=mask_seconds,
            late_compilations=self._late.compiled,
            late_captures=self._late.captured,
        )


def _refused_prompts(virtual: Seq[Component]) -> str | None:
    """Why components with virtual tokens can't serve a request; None if they can."""
    if len(virtual) > 1:
        return "adapters: two of them have virtual tokens, and a text has one front; leave one out"
    for component in virtual:
        if component.virtual_tokens < 0 or component != Component(
            component.digest, virtual_tokens=component.virtual_tokens
        ):
            return (
                f"adapters: {component.digest[:12]} has virtual tokens, which have no weight but "
                f"1, not {component.weight:g}, and stand for all of the text"
            )
    return None


def _until_error(rows: Seq[SampledToken | RowError]) -> tuple[list[SampledToken], RowError | None]:
    """The tokens before the first row in error, and that error."""
    drawn: list[SampledToken] = []
    for row in rows:
        if isinstance(row, RowError):
            return drawn, row
        drawn.append(row)
    return drawn, None


def _own_bytes() -> int:
    """Memory of this process that no other shares; 0 where the system does not tell."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return 0
    return 1024 * sum(
        int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")
    )


def _unsound(sequence: Sequence, error: str, kind: ErrorKind) -> Delta:
    """The end of a sequence for which no token can be chosen, or whose prompt can't be read.

    The base's own numbers are finite, so under adapters these are what is wrong.
    """
    adapters = sequence.request.adapters
    if kind == "internal" and adapters:
        named = ", ".join(f"{one.digest[:12]} at weight {one.weight:g}" for one in adapters)
        error = (
            f"adapters: the model's numbers are not finite with {named}; lower the weight, or mend "
            "the adapter"
        )
        kind = "weights"
    return _error(sequence.request_id, error, kind)


def _error(request_id: str, error: str, kind: ErrorKind) -> Delta:
    return Delta(request_id, finish_reason="error", error=error, error_kind=kind)
