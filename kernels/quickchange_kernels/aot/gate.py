"""Decides whether a compiled kernel is fit to ship, and runs the whole set in several processes."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quickchange_kernels.aot import compiling, inspection, streams
from quickchange_kernels.aot.inspection import Resources
from quickchange_kernels.compilation import Compilation
from quickchange_kernels.gpu_targets import TARGETS, Target


@dataclass(frozen=True)
class CompileJob:
    """One configuration of one module for one target; by name, since kernels can't be pickled."""

    module: str
    name: str
    target: str


@dataclass(frozen=True)
class CompileOutcome:
    """Result of a job."""

    job: CompileJob
    seconds: float
    resources: Resources | None  # None: it does not compile
    narrowest_stream: int | None  # bytes; None: the configuration has no marked load
    loading: tuple[streams.Statement, ...]  # marked statements that load in this configuration
    reasons: tuple[str, ...]  # why it is unfit; none: fit


@functools.cache
def _shipped(module: str) -> dict[str, Compilation]:
    found = list(compiling.compilations_of(module))
    twice = [name for name, times in Counter(one.name for one in found).items() if times > 1]
    if twice:
        raise ValueError(f"{module}: compilations() names {', '.join(twice)} twice: rename one")
    return {one.name: one for one in found}


def jobs(modules: Sequence[str], targets: Sequence[Target], only: str = "") -> Iterator[CompileJob]:
    """The configurations whose name contains `only`, on each target that they ship on."""
    for module in modules:
        for name, one in _shipped(module).items():
            for target in targets:
                if only in name and target.name in one.targets:
                    yield CompileJob(module, name, target.name)


def run_job(job: CompileJob) -> CompileOutcome:
    """Compile and judge one configuration."""
    one, target = _shipped(job.module)[job.name], TARGETS[job.target]
    started = time.perf_counter()
    try:
        kernel = compiling.compiled(one, target)
    except Exception as error:  # the compiler's own errors have no common base; all are reported
        reason = f"does not compile: {_last_line(error)}"
        return CompileOutcome(job, time.perf_counter() - started, None, None, (), (reason,))
    taken = inspection.resources(kernel, target)
    loading = streams.loading_statements(kernel.asm["ttir"], _source(one).parent)
    widths = streams.load_widths(inspection.assembly(kernel, target), target)
    by_statement = {statement: streams.widths_of(statement, widths) for statement in loading}
    return CompileOutcome(
        job,
        time.perf_counter() - started,
        taken,
        min((width for found in by_statement.values() for width in found), default=None),
        tuple(loading),
        (*_unfit(one, taken, target), *_narrow(by_statement)),
    )


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:200] if lines else ''}"


def _unfit(one: Compilation, taken: Resources, target: Target) -> Iterator[str]:
    if taken.spilled:
        yield f"spills {taken.spilled} bytes a thread: use smaller blocks or more warps"
    if taken.shared > target.shared_per_block:
        yield (
            f"takes {taken.shared} bytes of shared memory, {target.name} has "
            f"{target.shared_per_block}: use smaller blocks or fewer stages"
        )
    if one.products and not taken.products:
        yield "has products but no tensor-core instruction: are both operands in 16 bits?"


def _narrow(by_statement: dict[streams.Statement, list[int]]) -> Iterator[str]:
    for statement, found in by_statement.items():
        if not found:
            yield f"{statement} is marked as a stream and became no load"
        elif min(found) < streams.WIDE:
            yield (
                f"{statement} loads {min(found)} bytes a thread at a time, not {streams.WIDE}: say "
                "what is aligned (tl.multiple_of), or give each thread more of the row"
            )


def run(work: Sequence[CompileJob], processes: int) -> Iterator[CompileOutcome]:
    """Outcomes in the order of the jobs. With one process, the jobs run in this one."""
    if processes == 1:
        yield from map(run_job, work)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for outcomes in pool.map(_run_jobs, _sharing_code(work)):
            yield from outcomes


def _run_jobs(work: list[CompileJob]) -> list[CompileOutcome]:
    return list(map(run_job, work))


def _sharing_code(work: Sequence[CompileJob]) -> list[list[CompileJob]]:
    """The jobs in groups, those in one that follow each other and are assembled from one code."""

    def code(job: CompileJob) -> tuple[str, str, str]:
        return job.module, job.name, TARGETS[job.target].code_of or job.target

    return [list(group) for _, group in itertools.groupby(work, code)]


def stale_marks(outcomes: Iterable[CompileOutcome]) -> list[str]:
    """Marked statements that load nothing in any configuration: such a mark checks nothing."""
    loading = {statement for outcome in outcomes for statement in outcome.loading}
    marked = {mark for path in _source_files(outcomes) for mark in streams.marked_statements(path)}
    return sorted(
        f"{one} is marked as a stream and no configuration loads it" for one in marked - loading
    )


def _source_files(outcomes: Iterable[CompileOutcome]) -> set[str]:
    modules = {(outcome.job.module, outcome.job.name) for outcome in outcomes}
    return {str(_source(_shipped(module)[name])) for module, name in modules}


def _source(one: Compilation) -> Path:
    return Path(one.kernel.fn.__code__.co_filename)
