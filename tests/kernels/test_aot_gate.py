"""The gate finds each way in which a compiled kernel is unfit; and everything that ships is fit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import quickchange_kernels
from quickchange_kernels import gpu_targets
from quickchange_kernels.aot import __main__ as command
from quickchange_kernels.aot import compiling, gate, gate_report, streams
from quickchange_kernels.aot.gate import CompileJob, CompileOutcome
from quickchange_kernels.compilation import TARGETS, Compilation

SPECIMENS = "aot_specimens"


def outcome(name: str, target: str) -> CompileOutcome:
    return gate.run_job(CompileJob(SPECIMENS, name, target))


@pytest.mark.parametrize("target", TARGETS)
def test_a_fit_kernel_passes_and_is_measured(target: str) -> None:
    found = outcome("fit", target)
    assert found.reasons == ()
    assert found.narrowest_stream == 16
    assert found.resources is not None
    assert 16 <= found.resources.registers <= 256
    assert found.resources.products > 0
    assert 50 < found.resources.instructions < 5000
    assert 0 < found.resources.occupancy <= 1


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("spills", "sm_80", r"spills \d+ bytes a thread"),
        ("spills", "gfx942", r"spills \d+ bytes a thread"),
        ("shared", "gfx942", "bytes of shared memory, gfx942 has 65536"),
        ("shared", "sm_80", "bytes of shared memory, sm_80 has 166912"),
        ("shared", "sm_89", "bytes of shared memory, sm_89 has 101376"),
        ("no products", "sm_80", "no tensor-core instruction"),
        ("narrow", "sm_90", r"aot_specimens.py:\d+ loads 2 bytes a thread at a time, not 16"),
        ("narrow", "gfx942", r"aot_specimens.py:\d+ loads 2 bytes a thread at a time, not 16"),
        ("refused", "sm_100", "does not compile: .*"),
    ],
)
def test_an_unfit_kernel_is_caught(name: str, target: str, reason: str) -> None:
    found = outcome(name, target)
    assert any(re.search(reason, one) for one in found.reasons), found.reasons


def test_a_marked_statement_without_a_load_is_caught() -> None:
    statement = streams.Statement("kernels.py", 3, 4)
    assert list(gate._narrow({statement: []})) == [
        "kernels.py:3 is marked as a stream and became no load"
    ]


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_mark_that_no_configuration_loads_is_stale(target: str) -> None:
    found = outcome("scale", target)
    assert found.reasons == ()
    assert found.narrowest_stream == 16
    stale = gate.stale_marks([outcome("fit", target), found])
    assert len(stale) == 1
    assert "no configuration loads it" in stale[0]


def test_a_mark_beside_no_statement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text("x = 1\n# stream\n")
    with pytest.raises(ValueError, match=r"kernels.py:2: '# stream' must end a line"):
        streams.marked_statements(str(path))


def test_the_mark_of_a_statement_over_several_lines_covers_them_all(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text("for i in x:\n    y = f(\n        i,\n    )  # stream\n    z = '# stream'\n")
    assert streams.marked_statements(str(path)) == (streams.Statement(str(path), 2, 4),)


def test_a_configuration_is_compiled_only_where_it_ships() -> None:
    everywhere = list(gpu_targets.TARGETS.values())
    assert [job.target for job in gate.jobs([SPECIMENS], everywhere, "scale")] == [
        "sm_80",
        "gfx942",
    ]


def test_arguments_left_out_are_named() -> None:
    import aot_specimens

    incomplete = Compilation("partial", aot_specimens.scale, {"x": "*fp32"}, {"FLAG": 1}, 4, 1)
    with pytest.raises(ValueError, match=r"partial: .* wrong: factor, out"):
        compiling.compiled(incomplete, gpu_targets.TARGETS["sm_80"])


@pytest.mark.parametrize("target", ["sm_86", "sm_89"])
def test_a_target_that_takes_anothers_code_would_have_the_same(target: str) -> None:
    import aot_specimens

    taken = compiling.compiled(aot_specimens.FIT, gpu_targets.TARGETS[target]).asm
    only_there = dataclasses.replace(aot_specimens.FIT, targets=(target,))
    own = compiling.compiled(only_there, gpu_targets.TARGETS[target]).asm
    assert f".target {target}" in own["ptx"].replace("sm_86a", "sm_86")
    assert instructions(taken["ptx"]) == instructions(own["ptx"])


def instructions(ptx: str) -> list[str]:
    return [line for line in ptx.splitlines() if not line.startswith((".target", ".version"))]


@pytest.mark.parametrize(
    ("capability", "target"),
    [((7, 5), "sm_80"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((10, 3), "sm_100"),
     ((11, 0), "sm_100"), ((12, 1), "sm_120")],
)  # fmt: skip
def test_a_gpu_that_is_not_listed_counts_as_the_closest_older_one(
    capability: tuple[int, int], target: str
) -> None:
    assert gpu_targets._for_capability(capability).name == target


def test_a_hint_that_no_launch_gives_is_refused() -> None:
    import aot_specimens

    false = dataclasses.replace(aot_specimens.FIT, kernel=aot_specimens.unspecialised)
    with pytest.raises(
        ValueError, match="fit: divisible_by_16 names K, on which the kernel is not"
    ):
        compiling.compiled(false, gpu_targets.TARGETS["sm_80"])


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown target sm_42: choose among sm_80"):
        gpu_targets.named("sm_80,sm_42")


def test_occupancy_follows_the_scarcest_resource() -> None:
    a100 = gpu_targets.TARGETS["sm_80"]
    assert a100.blocks_resident(registers=32, shared=0, warps=4) == 16  # by warps: 64 of 64
    assert a100.blocks_resident(registers=255, shared=0, warps=4) == 2  # by registers
    assert a100.blocks_resident(registers=32, shared=80 * 1024, warps=4) == 2  # by shared memory
    assert a100.blocks_resident(registers=32, shared=0, warps=1) == 32  # by blocks
    assert a100.occupancy(registers=255, shared=0, warps=4) == 8 / 64


def test_the_command_prints_the_table_and_fails_with_reasons(tmp_path: Path) -> None:
    written = tmp_path / "outcomes.json"
    words = [sys.executable, "-m", "quickchange_kernels.aot", "--module", SPECIMENS]
    words += ["--targets", "sm_80", "--only", "s", "--jobs", "2", "--json", str(written)]
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "PYTHONPATH": f"{support}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == list(gate_report.HEADER)
    assert [line.split()[0] for line in lines[1:6]] == [
        "spills",
        "shared",
        "no",
        "refused",
        "scale",
    ]
    assert lines[6].startswith("UNFIT  spills on sm_80: spills ")
    assert lines[-1].startswith("aot: 1 fit, 4 unfit, ")
    assert [one["job"]["name"] for one in json.loads(written.read_text())] == [
        "spills",
        "shared",
        "no products",
        "refused",
        "scale",
    ]


def test_every_kernel_module_of_the_package_says_what_it_ships() -> None:
    modules = compiling.kernel_modules()
    files = Path(quickchange_kernels.__path__[0]).rglob("*_triton.py")
    assert {module.rpartition(".")[2] for module in modules} == {file.stem for file in files}
    work = list(gate.jobs(modules, gpu_targets.named(",".join(TARGETS))))
    assert {job.module for job in work} == set(modules)
    assert len({(job.name, job.target) for job in work}) == len(work)


def test_a_command_that_finds_nothing_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(only="no such kernel", module=None, json=None, jobs=1)
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines()[1] == "UNFIT  no configuration was found"
