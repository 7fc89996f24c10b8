"""Evaluation of variants on examples, through the engine that serves them.

Answers are greedy. Quality and speed come from one pass over all examples at the highest
concurrency; passes at lower ones take the first few, as they only measure speed. Knows nothing of
files or tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from statistics import median

from quickchange_server.config import Settings
from quickchange_server.entrypoints.engine_start import read_text, token_text
from quickchange_server.entrypoints.in_process_engine import EngineRun, InProcessEngine
from quickchange_server.protocol import Component, SamplingParams, Submit
from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import CanonicalAdapter
from quickchange_training.evaluation.evaluation_results import (
    DepthAcceptance,
    EvaluatedSize,
    EvaluationSpeed,
    MixedBatch,
    Row,
    ScoredAnswer,
)
from quickchange_training.evaluation.scores import score
from quickchange_training.evaluation.variants import EvaluatedAdapters, EvaluatedVariant
from quickchange_training.examples import Encoded, Example

_WARMUP_TOKENS = 4
_LEAST_REQUESTS = 8  # in a pass that measures speed alone
_REQUESTS_A_LANE = 2


@dataclass(frozen=True)
class EvaluationTask:
    """The examples, tokenised, and the limit of an answer in tokens."""

    examples: tuple[Example, ...]
    encoded: tuple[Encoded, ...]
    max_tokens: int


def evaluate(
    settings: Settings,
    adapters: EvaluatedAdapters,
    variants: Sequence[EvaluatedVariant],
    task: EvaluationTask,
    concurrency: Sequence[int],
    stage: Callable[[str], None],
    done: Callable[[Row], None],
) -> MixedBatch:
    """Call `done` with each variant's row; then let all of them share batches.

    `concurrency`: requests in the engine at once, for each pass; the highest for the mixed one.
    `stage` is called as each part begins. Raises what `InProcessEngine` and its `run` raise.
    """
    text = read_text(settings.model)
    decode = partial(text.decode, skip_special_tokens=True)
    losses: dict[tuple[Component, ...], float] = {}  # heads change no loss
    with InProcessEngine(settings, adapters.load, token_text(text)) as engine:
        passes = []
        for variant in variants:
            if variant.components not in losses:
                stage(f"{variant.label}: loss")
                losses[variant.components] = reference_loss(engine, variant, task.encoded)
            stage(f"{variant.label}: answers")
            answers = _Answers(engine, task, variant, text.eos_ids, decode)
            size = _size(engine, adapters, variant)
            done(answers.row(concurrency, losses[variant.components], size))
            passes.append(answers)
        stage("all in one batch")
        return _mixed(engine, passes, max(concurrency))


def _size(
    engine: InProcessEngine, adapters: EvaluatedAdapters, variant: EvaluatedVariant
) -> EvaluatedSize:
    """Size of the variant's adapters and heads, which the engine must have loaded."""
    heads = None if variant.drafting is None else variant.drafting.heads
    digests = {component.digest for component in variant.components}
    digests |= set() if heads is None else {heads}
    read = [adapters.load(digest) for digest in digests]
    return EvaluatedSize(
        parameters=sum(adapter.parameters for adapter in read),
        stored_bytes=sum(_stored_bytes(adapter) for adapter in read),
        device_bytes=sum(engine.device_bytes[digest] for digest in digests),
    )


def _stored_bytes(adapter: CanonicalAdapter) -> int:
    with BytesIO() as stream:
        adapter_bytes.write(adapter, stream)
        return stream.tell()


def _mixed(engine: InProcessEngine, passes: Sequence[_Answers], lanes: int) -> MixedBatch:
    """All variants in turn, each with as many of its requests as make a few batches together."""
    each = -(-max(_LEAST_REQUESTS, _REQUESTS_A_LANE * lanes) // len(passes))
    alone = [
        (answers.renamed(index, number), answers.tokens[number])
        for number in range(min(each, len(passes[0].tokens)))
        for index, answers in enumerate(passes)
    ]
    run = engine.run([request for request, _ in alone], concurrency=lanes)
    answered = zip(run.completions, alone, strict=True)
    same = sum(completion.token_ids == tokens for completion, (_, tokens) in answered)
    return MixedBatch(_speed(lanes, run), same)


def reference_loss(
    engine: InProcessEngine, variant: EvaluatedVariant, examples: Sequence[Encoded]
) -> float:
    """Mean loss of the reference answers' tokens in nats, end-of-sequence included.

    Teacher forced, from the log-probabilities of each example as a prompt. Raises what
    `InProcessEngine.run` raises: an example must be shorter than the engine's context.
    """
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
    run = engine.run(
        [
            Submit(str(i), e.tokens, sampling, variant.serving(e.tokens[: e.prompt_length]), seed=0)
            for i, e in enumerate(examples)
        ]
    )
    nats = [
        -scores.logprob
        for example, completion in zip(examples, run.completions, strict=True)
        for scores in completion.prompt_logprobs[example.prompt_length - 1 :]
    ]
    return sum(nats) / len(nats)


class _Answers:
    """One variant on a running engine."""

    def __init__(
        self,
        engine: InProcessEngine,
        task: EvaluationTask,
        variant: EvaluatedVariant,
        eos_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._engine = engine
        self._task = task
        self._decode = decode
        self._requests = [
            Submit(
                str(index),
                e.tokens[: e.prompt_length],
                SamplingParams(
                    max_tokens=task.max_tokens,
                    temperature=0.0,
                    stop_token_ids=eos_ids,
                ),
                adapters=variant.serving(e.tokens[: e.prompt_length]),
                drafting=variant.drafting,
                seed=0,
            )
            for index, e in enumerate(task.encoded)
        ]
        self._label = variant.label
        self._warm_up()
        self.tokens: tuple[tuple[int, ...], ...] = ()  # of each example's answer, once there

    def renamed(self, variant: int, example: int) -> Submit:
        """The request for an example, by an id that no other variant's has."""
        return replace(self._requests[example], request_id=f"{variant}/{example}")

    def row(self, concurrency: Sequence[int], loss: float, size: EvaluatedSize) -> Row:
        runs = {lanes: self._pass(lanes, most=max(concurrency)) for lanes in concurrency}
        self.tokens = tuple(c.token_ids for c in runs[max(concurrency)].completions)
        answers = [self._decode(tokens) for tokens in self.tokens]
        examples = self._task.examples
        return Row(
            label=self._label,
            size=size,
            scores=score(answers, [e.completion for e in examples]),
            loss=loss,
            speeds=tuple(_speed(lanes, run) for lanes, run in runs.items()),
            acceptance=_acceptance(runs.values()),
            answers=tuple(
                ScoredAnswer(e.origin, a) for e, a in zip(examples, answers, strict=True)
            ),
        )

    def _warm_up(self) -> None:
        """Load the adapter, so that no timed request waits for it."""
        first = self._requests[0]
        short = replace(first, sampling=replace(first.sampling, max_tokens=_WARMUP_TOKENS))
        self._engine.run([short])

    def _pass(self, lanes: int, most: int) -> EngineRun:
        few = max(_LEAST_REQUESTS, _REQUESTS_A_LANE * lanes)
        requests = self._requests if lanes == most else self._requests[:few]
        return self._engine.run(requests, concurrency=lanes)


def _speed(lanes: int, run: EngineRun) -> EvaluationSpeed:
    accepted = sum(completion.accepted for completion in run.completions)
    return EvaluationSpeed(
        concurrency=lanes,
        requests=len(run.completions),
        tokens_per_second=run.tokens_per_second,
        tokens_per_step=run.tokens / (run.tokens - accepted),
        first_token_seconds=median(c.first_token_seconds for c in run.completions),
    )


def _acceptance(runs: Iterable[EngineRun]) -> tuple[DepthAcceptance, ...]:
    """Drafts by depth, of heads and lookup together, as they share the rows of a step."""
    drafted: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for run in runs:
        for (_, depth), count in run.drafts.items():
            drafted[depth] += count.drafted
            accepted[depth] += count.accepted
    return tuple(DepthAcceptance(d, drafted[d], accepted[d]) for d in sorted(drafted))
