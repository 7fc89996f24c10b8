"""Python function to one-line docstring, from the standard library's own source.

The examples depend on the running Python's standard library; the recipe records its version.
"""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from quickchange_training.demo.tasks.task import Split, TaskExample, mean, split_of

_INSTRUCTION = "Write a one-line docstring for this Python function.\n\n"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}
_SOURCE_CHARACTERS = 300
_SUMMARY_CHARACTERS = range(15, 90)
_PER_MODULE = 40  # bounds the share of modules with many similar functions


class Docstring:
    """Short functions whose docstring begins with a one-sentence summary; split by module."""

    name = "docstring"
    description = "Python function to a one-line docstring"
    answer_tokens = 40
    sample_prompt = (
        _INSTRUCTION + "def read_lines(path):\n    with open(path) as f:\n"
        "        return [line.strip() for line in f]"
    )

    def examples(self, split: Split, count: int, seed: int) -> list[TaskExample]:
        pool = [
            TaskExample(_INSTRUCTION + source, summary)
            for module, source, summary in documented_functions()
            if split_of(module) == split
        ]
        if count > len(pool):
            raise ValueError(
                f"docstring: this Python's standard library has {len(pool)} {split} examples, "
                f"{count} were asked for"
            )
        return random.Random(f"{self.name}/{split}/{seed}").sample(pool, count)

    def score(self, examples: Sequence[TaskExample], answers: Sequence[str]) -> dict[str, float]:
        """rouge_l: F1 of the longest common word sequence with the real docstring."""
        pairs = list(zip(examples, answers, strict=True))
        return {
            "rouge_l": mean([rouge_l(e.completion, answer) for e, answer in pairs]),
            "word_f1": mean([word_f1(e.completion, answer) for e, answer in pairs]),
            "one_line": mean([_is_one_line(answer) for answer in answers]),
        }


@functools.cache  # parsing the library takes seconds
def documented_functions() -> tuple[tuple[str, str, str], ...]:
    """(top-level module, source without docstring, summary sentence), no source twice."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, tuple[str, str, str]] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if not _SKIPPED.isdisjoint(parts):
            continue
        fresh = [item for item in _functions(file) if item[0] not in found][:_PER_MODULE]
        found |= {source: (parts[0], source, summary) for source, summary in fresh}
    return tuple(found.values())


def _functions(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have escapes that newer Pythons warn of
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # deliberate bad source, such as lib2to3's fixtures
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        summary = _summary(ast.get_docstring(node) or "")
        node.body = node.body[1:]
        source = ast.unparse(node)
        if summary and len(source) <= _SOURCE_CHARACTERS:
            yield source, summary


def _summary(docstring: str) -> str | None:
    """The docstring's first paragraph if it is one sentence of fitting length."""
    text = " ".join(docstring.partition("\n\n")[0].split())
    one_sentence = re.fullmatch(r"[A-Z][^.>]*\.", text) is not None
    return text if one_sentence and len(text) in _SUMMARY_CHARACTERS else None


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+", text.lower())


def word_f1(reference: str, answer: str) -> float:
    """F1 over the multisets of words."""
    want, got = _words(reference), _words(answer)
    return _f1(sum((Counter(want) & Counter(got)).values()), len(want), len(got))


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L (Lin 2004), F1 over words."""
    want, got = _words(reference), _words(answer)
    row = [0] * (len(got) + 1)  # longest common subsequence with the words of `want` so far
    for word in want:
        previous = row
        row = [0]
        for j, other in enumerate(got):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
    return _f1(row[-1], len(want), len(got))


def _f1(common: int, wanted: int, given: int) -> float:
    return 2 * common / (wanted + given) if common else 0.0


def _is_one_line(answer: str) -> bool:
    text = answer.strip()
    return "\n" not in text and text.endswith(".")
