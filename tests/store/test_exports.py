"""Adapters written as folders of other tools: read back they are the same version."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quickchange_store.canonical import adapter_bytes
from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter, LowRankUpdate
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.errors import (
    BaseMismatchError,
    BaseModelError,
    NameConflictError,
    StoreError,
    UnsupportedFeatureError,
)
from quickchange_store.exporting import ExportLayout, export_adapter
from quickchange_store.importing import read_adapter

H, V = 32, 53  # of the base models in conftest
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "lm_head")


@pytest.fixture(scope="module")
def spec(bases: Any) -> BaseSpec:
    made: BaseSpec = bases("llama").spec
    return made


def block(seed: int, width: int = H) -> DraftBlock:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(H, width, generator=generator)
    return DraftBlock(weight, torch.randn(H, generator=generator))


def tokens(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def outputs(count: int, rows: int = V) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(rows, H) for _ in range(count))


PARALLEL = TurboHeads((block(0), block(1)), ((0,), (1,)))
SHARED = TurboHeads((block(0),), ((0,), (0,)))
DEEP = TurboHeads((block(0), block(1)), ((0, 1), (1, 0)))
UNEVEN = TurboHeads((block(0), block(1)), ((0,), (0, 1)))
OWN = dataclasses.replace(DEEP, outputs=outputs(2))
DRAFTED = dataclasses.replace(PARALLEL, vocabulary=tokens(1, 9, 30))
DRAFTED_OWN = dataclasses.replace(DRAFTED, outputs=outputs(2, rows=3))
SEQUENTIAL = TurboHeads((block(0, 2 * H), block(1)), ((0, 1),) * 3, sequential=True)


def lora(base: BaseSpec, *scales: float) -> dict[str, LowRankUpdate]:
    made = {}
    for number, (module, scale) in enumerate(zip(MODULES, scales, strict=False)):
        shape, rank = base.modules[module], 3 + 2 * number
        a, b = torch.randn(rank, shape.in_features), torch.randn(shape.out_features, rank)
        made[module] = LowRankUpdate(a, b, scale)
    return made


def adapter(
    heads: TurboHeads | None, updates: dict[str, LowRankUpdate] | None = None
) -> CanonicalAdapter:
    return CanonicalAdapter("LlamaForCausalLM", "tiny", updates or {}, {}, heads)


@pytest.mark.parametrize(
    ("layout", "heads"),
    [
        (ExportLayout.LORAX, PARALLEL),
        (ExportLayout.LORAX, SHARED),
        (ExportLayout.LORAX, OWN),
        (ExportLayout.VLLM, PARALLEL),
        (ExportLayout.VLLM, DEEP),
        (ExportLayout.VLLM, OWN),
        (ExportLayout.VLLM, DRAFTED),
        (ExportLayout.VLLM, DRAFTED_OWN),
        (ExportLayout.TURBO, UNEVEN),
        (ExportLayout.TURBO, DRAFTED_OWN),
        (ExportLayout.TURBO, SEQUENTIAL),
    ],
)
def test_heads_read_back_are_the_same_version(
    layout: ExportLayout, heads: TurboHeads, tmp_path: Path, spec: BaseSpec
) -> None:
    folder = tmp_path / "made"
    assert export_adapter(adapter(heads), folder, layout, spec) == ("the Turbo heads",)
    read = read_adapter(folder, spec)
    assert read.warnings == ()
    assert adapter_bytes.digest(read.adapter) == adapter_bytes.digest(adapter(heads))


@pytest.mark.parametrize("layout", [ExportLayout.LORAX, ExportLayout.TURBO])
def test_a_turbo_lora_read_back_is_the_same_version(
    layout: ExportLayout, tmp_path: Path, spec: BaseSpec
) -> None:
    made = adapter(PARALLEL, lora(spec, 2.0, 0.1, 1 / 3))
    export_adapter(made, tmp_path / "made", layout, spec)
    read = read_adapter(tmp_path / "made", spec).adapter
    assert adapter_bytes.digest(read) == adapter_bytes.digest(made)


def test_the_lora_part_is_a_peft_folder_that_peft_reads(
    tmp_path: Path, bases: Any, canonical_logits: Any
) -> None:
    from peft import PeftModel

    base = bases("llama")
    made = adapter(PARALLEL, lora(base.spec, 2.0, 0.1, 1 / 3))
    folder = tmp_path / "made"
    assert export_adapter(made, folder, ExportLayout.PEFT, base.spec) == ("the LoRA",)
    alone = dataclasses.replace(made, turbo=None)
    assert adapter_bytes.digest(read_adapter(folder, base.spec).adapter) == adapter_bytes.digest(
        alone
    )

    from transformers import AutoModelForCausalLM

    ids = torch.arange(12).reshape(2, 6) * 4 % V
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=ids).logits
    torch.testing.assert_close(canonical_logits(base.model, alone), expected)


def test_an_embeddings_lora_keeps_its_scale(tmp_path: Path, bases: Any) -> None:
    spec = bases("gemma3").spec  # whose embedding scales its own output
    module = "model.embed_tokens"
    shape = spec.modules[module]
    assert shape.output_scale != 1.0
    a, b = torch.randn(4, shape.in_features), torch.randn(shape.out_features, 4)
    update = LowRankUpdate(a, b, 2.0 * shape.output_scale)
    made = CanonicalAdapter(spec.architecture, "tiny", {module: update})
    export_adapter(made, tmp_path / "made", ExportLayout.PEFT, spec)
    assert json.loads((tmp_path / "made/adapter_config.json").read_text())["lora_alpha"] == 8
    read = read_adapter(tmp_path / "made", spec).adapter
    assert adapter_bytes.digest(read) == adapter_bytes.digest(made)


def test_vllms_folder_has_what_its_medusa_model_loads(tmp_path: Path, bases: Any) -> None:
    base = bases("llama")
    export_adapter(adapter(DRAFTED), tmp_path / "made", ExportLayout.VLLM, base.spec)
    tensors = load_file(tmp_path / "made/model.safetensors")
    assert set(tensors) == {
        *(f"blocks.{i}.layers.0.{part}" for i in range(2) for part in ("weight", "bias")),
        "lm_heads.0.weight",
        "token_map",
    }
    assert tensors["token_map"].tolist() == [1, 9, 30]
    rows = base.model.lm_head.weight[[1, 9, 30]]
    assert torch.equal(tensors["lm_heads.0.weight"], rows)
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("medusa", ["MedusaModel"])
    assert (config["truncated_vocab_size"], config["original_lm_head"]) == (3, True)


def test_loraxs_version_tells_v1_from_v2(tmp_path: Path, spec: BaseSpec) -> None:
    for name, heads in (("v1", OWN), ("v2", PARALLEL)):
        export_adapter(adapter(heads), tmp_path / name, ExportLayout.LORAX, spec)
    versions = [
        json.loads((tmp_path / name / "config.json").read_text())["version"]
        for name in ("v1", "v2")
    ]
    assert versions == [1, 2]


# --- refusals -----------------------------------------------------------------------------------


def refused(
    kind: type[StoreError],
    made: CanonicalAdapter,
    layout: ExportLayout,
    base: BaseSpec,
    tmp_path: Path,
) -> StoreError:
    with pytest.raises(kind) as raised:
        export_adapter(made, tmp_path / "made", layout, base)
    assert list(tmp_path.iterdir()) == []
    assert raised.value.key
    assert raised.value.remedy
    return raised.value


@pytest.mark.parametrize(
    ("layout", "heads", "named"),
    [
        (ExportLayout.LORAX, SEQUENTIAL, "sequential"),
        (ExportLayout.LORAX, UNEVEN, "different numbers of blocks"),
        (ExportLayout.LORAX, DRAFTED, "vocabulary"),
        (ExportLayout.LORAX, DEEP, "several blocks"),
        (ExportLayout.VLLM, SEQUENTIAL, "sequential"),
        (ExportLayout.VLLM, UNEVEN, "different numbers of blocks"),
    ],
)
def test_heads_that_a_layout_can_not_say_are_refused_by_name(
    layout: ExportLayout, heads: TurboHeads, named: str, tmp_path: Path, spec: BaseSpec
) -> None:
    error = refused(UnsupportedFeatureError, adapter(heads), layout, spec, tmp_path)
    assert named in str(error)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bias": torch.ones(H)}, "bias"),
        ({"gain": torch.ones(H)}, "gain"),
        ({"shift": torch.ones(3)}, "shift"),
        ({"activation": "relu"}, "relu"),
        ({"source": "output"}, "output"),
        ({"a": torch.zeros(0, H), "b": torch.zeros(H, 0)}, "rank 0"),
    ],
)
def test_updates_that_peft_can_not_say_are_refused_by_name(
    change: dict[str, Any], named: str, tmp_path: Path, spec: BaseSpec
) -> None:
    module, update = next(iter(lora(spec, 1.0).items()))
    made = adapter(None, {module: dataclasses.replace(update, **change)})
    error = refused(UnsupportedFeatureError, made, ExportLayout.PEFT, spec, tmp_path)
    assert error.key == module
    assert named in error.problem


@pytest.mark.parametrize(
    ("layout", "with_heads"), [(ExportLayout.VLLM, False), (ExportLayout.PEFT, True)]
)
def test_a_layout_of_what_is_not_there_is_refused(
    layout: ExportLayout, with_heads: bool, tmp_path: Path, spec: BaseSpec
) -> None:
    made = adapter(PARALLEL) if with_heads else adapter(None, lora(spec, 1.0))
    refused(UnsupportedFeatureError, made, layout, spec, tmp_path)


def test_another_base_model_is_refused(tmp_path: Path, spec: BaseSpec, bases: Any) -> None:
    other = bases("gpt_neox").spec
    refused(BaseMismatchError, adapter(PARALLEL), ExportLayout.LORAX, other, tmp_path)
    small = TurboHeads((DraftBlock(torch.eye(4), torch.ones(4)),), ((0,),))
    for layout in (ExportLayout.LORAX, ExportLayout.VLLM, ExportLayout.TURBO):
        refused(BaseMismatchError, adapter(small), layout, spec, tmp_path)
    update = LowRankUpdate(torch.ones(1, H), torch.ones(H, 1), 1.0)
    made = adapter(None, {"model.layers.7.self_attn.q_proj": update})
    refused(BaseMismatchError, made, ExportLayout.PEFT, spec, tmp_path)


def test_vllms_layout_needs_the_bases_lm_head(tmp_path: Path, spec: BaseSpec) -> None:
    bare = dataclasses.replace(spec, weights=None)
    refused(BaseModelError, adapter(PARALLEL), ExportLayout.VLLM, bare, tmp_path)
    export_adapter(adapter(OWN), tmp_path / "own", ExportLayout.VLLM, bare)


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, spec: BaseSpec) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(NameConflictError, match="exists"):
        export_adapter(adapter(PARALLEL), tmp_path / "made", ExportLayout.LORAX, spec)
    assert list((tmp_path / "made").iterdir()) == []


def test_a_failure_leaves_nothing_behind(tmp_path: Path, spec: BaseSpec) -> None:
    class Broken:
        def tensor(self, name: str) -> torch.Tensor:
            raise BaseModelError("gone", key=name)

    broken = dataclasses.replace(spec, weights=Broken())
    with pytest.raises(BaseModelError):
        export_adapter(adapter(PARALLEL), tmp_path / "made", ExportLayout.VLLM, broken)
    assert list(tmp_path.iterdir()) == []
