"""An evaluation from options to rows: reads the task, finds the adapters, saves each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from quickchange_server.config import Settings
from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.store import Store
from quickchange_training.adapters.adapter_job import PromptFormat, load_tokenizer, uses_chat
from quickchange_training.demo import (
    demo_store_folder,
    ensure_demo_base,
    publish_demo_adapters,
)
from quickchange_training.evaluation.evaluation_results import Evaluation, Row, save
from quickchange_training.evaluation.evaluation_run import EvaluationTask, evaluate
from quickchange_training.evaluation.variants import BASE, EvaluatedAdapters
from quickchange_training.examples import as_chat, encode, read_examples

DEMO = "demo"


@dataclass(frozen=True)
class EvaluationJob:
    """Options of `quickchange eval`."""

    task: Path
    model: str  # folder, hub id or DEMO
    store: str | None
    adapters: tuple[str, ...]  # each as `variants` reads it
    density: float  # of merges
    limit: int | None  # number of examples
    max_tokens: int | None  # limit of an answer
    concurrency: tuple[int, ...]  # ascending
    prompt_format: PromptFormat
    max_length: int  # limit of an example, in tokens
    device: str
    dtype: str
    out: Path | None  # for the JSON


def run(job: EvaluationJob, stage: Callable[[str], None]) -> Evaluation:
    """Evaluate the base, then each adapter; `stage` is called with a text as each part begins.

    With `job.out`, the rows so far are written there after each. What can be refused is refused
    first. Raises TrainingError, StoreError, DemoBaseError, QuickchangeError.
    """
    model = str(ensure_demo_base()) if job.model == DEMO else job.model
    task = _task(job, model)
    adapters = EvaluatedAdapters(model, _store(job, model), job.density)
    variants = [adapters.variant(text) for text in (BASE, *job.adapters)]
    settings = Settings.model_validate(
        {
            "model": model,
            "store": job.store or ".",  # unused: adapters are handed to the engine
            "device": job.device,
            "dtype": job.dtype,
            "prefix_cache": False,  # a prompt seen before would be answered sooner
            "max_sequences": max(job.concurrency),
        }
    )
    found = Evaluation(
        task=job.task.name,
        model=Path(model).name,
        examples=len(task.examples),
        max_tokens=task.max_tokens,
        rows=(),
    )
    rows: list[Row] = []

    def done(row: Row) -> None:
        rows.append(row)
        if job.out is not None:
            save(replace(found, rows=tuple(rows)), job.out)

    mixed = evaluate(settings, adapters, variants, task, job.concurrency, stage, done)
    found = replace(found, rows=tuple(rows), mixed=mixed)
    if job.out is not None:
        save(found, job.out)
    return found


def _store(job: EvaluationJob, model: str) -> Store | None:
    """Store of adapters by name; by default the demo's for the demo's base, else None."""
    if job.store is not None:
        return Store.at(job.store)
    if job.model != DEMO:
        return None
    store = Store(demo_store_folder())
    publish_demo_adapters(store, base_spec(model))
    return store


def _task(job: EvaluationJob, model: str) -> EvaluationTask:
    examples = read_examples(job.task)[: job.limit]
    tokenizer = load_tokenizer(model)
    chat = uses_chat(examples, tokenizer, job.prompt_format)
    encoded = encode(as_chat(examples) if chat else examples, tokenizer, job.max_length)
    longest = max(e.answer_length for e in encoded)
    return EvaluationTask(
        examples=tuple(examples),
        encoded=tuple(encoded),
        max_tokens=job.max_tokens or longest + -(-longest // 4),
    )
