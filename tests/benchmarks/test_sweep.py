"""Types of each kind come out of the sweep as its table says; README and docs say what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from quickchange_bench.architectures import sweep
from quickchange_bench.architectures.sweep_case import SweepResult
from quickchange_bench.architectures.tiny_configs import types

ROOT = Path(__file__).parents[2]

# One of each kind, and others of it in `make slow`; `make sweep` runs them all. Of those that come
# second, most are held against transformers and PEFT in tests/reference and tests/engine too.
KINDS = {
    "dense": ["gemma3", "llama"],
    "Conv1D linears": ["gpt2"],
    "attention of its own": ["gptj", "falcon", "bloom"],
    "experts": ["qwen3_moe", "mixtral"],
    "sinks": ["gpt_oss"],
    "latent attention": ["deepseek_v3", "minicpm3"],
    "shared keys and values": ["gemma3n_text"],
    "scaled positions": ["phi3 (longrope)", "llama (dynamic)", "ministral3"],
    "states between steps": ["qwen3_next", "lfm2", "bamba", "mamba"],
    "refused": ["diffllama", "bart", "reformer"],
}
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for _, *names in KINDS.values() for name in names
]
BUSY_SECONDS = 1800.0  # a type takes a few, on a machine with nothing else to do


@pytest.mark.parametrize("name", [*(first for first, *_ in KINDS.values()), *OTHERS])
def test_a_type_comes_out_as_the_table_says(name: str) -> None:
    [(_, found)] = sweep.run_sweep([name], jobs=1, seconds=BUSY_SECONDS)
    assert not sweep.changes({name: found}, sweep.expected())


def test_the_table_has_every_type_and_none_is_wrong_or_ends_its_process() -> None:
    table = sweep.expected()
    assert sorted(table) == sorted(types())
    assert not [name for name, row in table.items() if {row.base, row.lora} & {"wrong", "crash"}]
    assert all(row.says for row in table.values() if "refused" in (row.base, row.lora))


def test_a_change_of_outcome_is_told_with_what_was_said() -> None:
    known = {"a": SweepResult("equal", "equal"), "b": SweepResult("refused", says="1 of 3")}
    found = {"a": SweepResult("wrong", "-", "other tokens"), "b": SweepResult("refused", says="x")}
    [line] = sweep.changes(found, known)
    assert line == "a: wrong / -, was equal / equal. other tokens"
    assert sweep.changes({"c": SweepResult("equal")}, known) == [
        "c: equal / -, not expected at all. "
    ]


def test_a_type_that_hangs_is_one_line_of_the_table() -> None:
    [(_, found)] = sweep.run_sweep(["llama"], jobs=1, seconds=0.01)
    assert found == SweepResult("crash", says="no result after 0 s")


def test_a_type_that_does_not_exist_is_not_built() -> None:
    [(_, found)] = sweep.run_sweep(["no_such_type"], jobs=1, seconds=BUSY_SECONDS)
    assert found.base == "not built"


def test_the_readme_and_the_document_say_what_the_table_says() -> None:
    table = sweep.expected()
    assert sweep.counts(table) in (ROOT / "README.md").read_text().replace("\n", " ")
    assert sweep.as_markdown(table) in (ROOT / "docs" / "model-types.md").read_text()
