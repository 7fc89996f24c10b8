"""`bench machine` says this machine's rates and each workload's limit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner

from quickchange_bench.cli import app
from quickchange_bench.machine_report import (
    closed_loops,
    limits_of,
    limits_table,
    read_model,
)
from quickchange_kernels.roofline.machine import CpuRates, MachineRates, Model

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def model_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SMOLLM2, **changes}))
    return folder


def test_the_command_prints_rates_and_limits_and_writes_them(tmp_path: Path) -> None:
    model, out = model_folder(tmp_path / "small"), tmp_path / "machine.json"
    arguments = f"machine --model {model} --concurrency 1,16 --threads 1 --out {out}"
    found = CliRunner().invoke(app, arguments.split())
    assert found.exit_code == 0, found.output
    written = json.loads(out.read_text())
    rates = TypeAdapter(CpuRates).validate_python(written["rates"])
    assert f"memory, as read: {rates.bandwidth / 1e9:.1f} GB/s" in found.output
    assert "1 threads" in found.output
    assert "- model: small" in found.output
    model = Model.of_config("small", SMOLLM2)
    loads = closed_loops([1, 16], prompt=64, answer=64, rank=16)
    limits = limits_of(rates, model, loads)
    assert limits_table(limits) in found.output
    assert written["limits"] == [asdict(one) for one in limits]
    assert [(one.weights, one.load.concurrent, one.load.adapters) for one in limits] == [
        (weights, concurrent, concurrent * distinct)
        for weights in ("float32", "bfloat16", "int8", "int4")
        for distinct in (0, 1)
        for concurrent in (1, 16)
    ]


def test_a_line_of_limits_shows_what_bounds_it(tmp_path: Path) -> None:
    machine = MachineRates("by hand", 40e9, dict.fromkeys(("float32", "bfloat16", "int8"), 200e9))
    loads = closed_loops([8], prompt=64, answer=64, rank=16)
    model = read_model(model_folder(tmp_path / "small"))
    lines = limits_table(limits_of(machine, model, loads)).splitlines()
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in (lines[0], lines[3])
    ]
    line = dict(zip(*cells, strict=True))
    # 538 MB of weights, 8 adapters of 19.5 MB, 8 rows of 96 keys of 46 kB
    assert (line["weights"], line["requests"], line["adapters"]) == ("float32", "8", "8")
    assert (line["step MB"], line["reading ms"]) == ("730", "18.2")
    # 64 tokens of 222 MFLOP and attention over 32.5 keys each, the LM head once
    assert (line["arithmetic ms"], line["prompt ms"]) == ("11.4", "72.1")
    assert line["limit tok/s"] == "297"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 8}, "has experts (num_local_experts)"),
        ({"intermediate_size": None}, "no intermediate_size"),
    ],
)
def test_a_model_whose_limits_are_not_reckoned_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = model_folder(tmp_path / "odd", **changes)
    found = CliRunner().invoke(app, ["machine", "--model", str(folder)])
    assert found.exit_code == 2
    assert message in found.output


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["machine", "--model", str(tmp_path)])
    assert found.exit_code == 2
    assert "has no config.json" in found.output
