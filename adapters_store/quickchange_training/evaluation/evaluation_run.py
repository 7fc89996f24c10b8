"""Runs an evaluation: every variant on every example, through the engine that serves them.

Greedy. Quality comes from one pass over all examples at the highest concurrency; the lower ones
are passes over the first few, as they only measure speed. Knows nothing of files or tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from quickchange_server.config import Settings
from quickchange_server.entrypoints.engine_start import token_text
from quickchange_server.entrypoints.in_process_engine import EngineRun, InProcessEngine
from quickchange_server.frontend.tokenizer import Text
from quickchange_server.protocol import SamplingParams, Submit
from quickchange_training.evaluation.evaluation_results import (
    DepthAcceptance,
    EvaluationSpeed,
    Row,
    ScoredAnswer,
)
from quickchange_training.evaluation.loss import LossMeter
from quickchange_training.evaluation.scores import score
from quickchange_training.evaluation.variants import EvaluatedAdapters, EvaluatedVariant
from quickchange_training.examples import Encoded, Example

_WARMUP_TOKENS = 4
_LEAST_REQUESTS = 8  # of a pass that measures speed alone
_REQUESTS_A_LANE = 2


@dataclass(frozen=True)
class EvaluationTask:
    """The examples, tokenised, and how long an answer may get."""

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
) -> Iterator[Row]:
    """A row for each variant, as it is done. `stage` is told what begins.

    `concurrency`: requests in the engine at once, of each pass.

    Raises what `load_model` raises, what `InProcessEngine.run` raises.
    """
    losses = _losses(settings, adapters, variants, task, stage)
    text = Text.load(settings.model)
    with InProcessEngine(settings, adapters.load, token_text(settings.model)) as engine:
        for variant in variants:
            stage(f"{variant.label}: answers")
            yield _Asked(engine, text, task, variant).row(concurrency, losses[variant.adapter])


def _losses(
    settings: Settings,
    adapters: EvaluatedAdapters,
    variants: Sequence[EvaluatedVariant],
    task: EvaluationTask,
    stage: Callable[[str], None],
) -> dict[str | None, float]:
    """Of each adapter, by digest: heads draft what the same weights would say."""
    meter = LossMeter(settings)
    losses: dict[str | None, float] = {}
    for variant in variants:
        digest = variant.adapter
        if digest not in losses:
            stage(f"{variant.label}: loss")
            adapter = None if digest is None else adapters.load(digest)
            losses[digest] = meter.loss(adapter, task.encoded)
    return losses


class _Asked:
    """One variant on a running engine."""

    def __init__(
        self, engine: InProcessEngine, text: Text, task: EvaluationTask, variant: EvaluatedVariant
    ) -> None:
        self._engine = engine
        self._text = text
        self._task = task
        self._requests = [
            Submit(
                str(index),
                e.tokens[: e.prompt_length],
                SamplingParams(
                    max_tokens=task.max_tokens,
                    temperature=0.0,
                    stop_token_ids=text.eos_ids,
                ),
                adapters=variant.components,
                drafting=variant.drafting,
                seed=0,
            )
            for index, e in enumerate(task.encoded)
        ]
        self._label = variant.label

    def row(self, concurrency: Sequence[int], loss: float) -> Row:
        self._warm_up()
        runs = {lanes: self._pass(lanes, most=max(concurrency)) for lanes in concurrency}
        answers = [self._answer(c.token_ids) for c in runs[max(concurrency)].completions]
        examples = self._task.examples
        return Row(
            label=self._label,
            scores=score(answers, [e.completion for e in examples]),
            loss=loss,
            speeds=tuple(_speed(lanes, run) for lanes, run in runs.items()),
            acceptance=_acceptance(runs.values()),
            answers=tuple(
                ScoredAnswer(e.origin, a) for e, a in zip(examples, answers, strict=True)
            ),
        )

    def _warm_up(self) -> None:
        """Bring the adapter to the device: reading it is not the task's time."""
        first = self._requests[0]
        short = replace(first, sampling=replace(first.sampling, max_tokens=_WARMUP_TOKENS))
        self._engine.run([short])

    def _pass(self, lanes: int, most: int) -> EngineRun:
        few = max(_LEAST_REQUESTS, _REQUESTS_A_LANE * lanes)
        requests = self._requests if lanes == most else self._requests[:few]
        return self._engine.run(requests, concurrency=lanes)

    def _answer(self, tokens: Sequence[int]) -> str:
        return self._text.decode(tokens, skip_special_tokens=True)


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
    """All drafters together: heads and lookup share the rows of a step."""
    drafted: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for run in runs:
        for (_, depth), count in run.drafts.items():
            drafted[depth] += count.drafted
            accepted[depth] += count.accepted
    return tuple(DepthAcceptance(d, drafted[d], accepted[d]) for d in sorted(drafted))
