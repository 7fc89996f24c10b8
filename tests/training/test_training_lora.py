"""LoRA training on a small random model: it learns, is repeatable, and PEFT reads the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from recorded_recipe import recorded_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quickchange_training.adapters.adapter_recipes import LoraRecipe
from quickchange_training.adapters.adapter_trainer import (
    answer_loss,
    lr_share,
    save_adapter,
    total_steps,
    train_adapter,
)
from quickchange_training.adapters.peft_adapters import add_peft, without_peft_noise
from quickchange_training.checkpoint import Checkpoints
from quickchange_training.errors import OutputError, RecipeError
from quickchange_training.examples import Encoded, collate

RECIPE = LoraRecipe(rank=4, alpha=8, lr=1e-2, steps=60, batch_size=8, seed=7)
# To each of 16 first tokens belongs one answer, which the base can't know.
EXAMPLES = [Encoded((4 + i, 2, 20 + i * 7 % 16, 3), prompt_length=2) for i in range(16)]


def small_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # with the usual 0.02 the random LM head caps every logit near 0.6
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, float, float]:
    """The adapted model, its loss before any training, and what the report says after."""
    model = small_llama()
    with torch.no_grad():
        before = answer_loss(model, collate(EXAMPLES, 0)).item()
    adapted, report = train_adapter(model, RECIPE, EXAMPLES, EXAMPLES)
    assert report.held_out_loss is not None
    return adapted, before, report.held_out_loss


@pytest.fixture(scope="module")
def saved(
    trained: tuple[torch.nn.Module, float, float], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "tiny"
    save_adapter(trained[0], out, "some/base", {"lora": RECIPE.as_dict()})
    return out


def test_training_brings_the_loss_down(trained: tuple[torch.nn.Module, float, float]) -> None:
    _, before, after = trained
    assert after < 0.5 * before


class StopError(Exception):
    """Ends a run as a crash would."""


class Interrupted(Checkpoints):
    """Checkpoints that end the run after one of them."""

    def save(self, state: Mapping[str, Any]) -> None:
        super().save(state)
        raise StopError


def test_a_resumed_run_gives_what_an_uninterrupted_one_gives(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=20, dropout=0.3)
    whole, report = train_adapter(small_llama(), recipe, EXAMPLES, EXAMPLES)
    with pytest.raises(StopError):
        train_adapter(small_llama(), recipe, EXAMPLES, checkpoints=Interrupted(tmp_path, "run", 7))
    torch.manual_seed(99)  # whatever else has drawn random numbers in between
    resumed, again = train_adapter(
        small_llama(), recipe, EXAMPLES, EXAMPLES, checkpoints=Checkpoints(tmp_path, "run", 7)
    )
    assert again.held_out_loss == report.held_out_loss
    assert again.tokens == report.tokens
    theirs = dict(resumed.named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_every_field_of_pefts_config_can_be_reached() -> None:
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "bias": "lora_only"}
    config = add_peft(small_llama(), replace(RECIPE, peft_options=options)).peft_config["default"]
    assert {key: getattr(config, key) for key in options} == options
    assert config.r == RECIPE.rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_rslra": True}, "--peft-option use_rslra: PEFT's LoraConfig has no such field"),
        ({"r": 3}, "--peft-option r: it has an option of its own"),
        ({"layers_pattern": "layers"}, "--peft-option layers_pattern=layers: "),
    ],
)
def test_a_bad_peft_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        add_peft(small_llama(), replace(RECIPE, peft_options=options))


def test_the_loss_is_that_of_transformers_on_the_answers_alone() -> None:
    model = small_llama()
    example = Encoded((9, 8, 7, 6, 5), prompt_length=2)
    labels = torch.tensor([[-100, -100, 7, 6, 5]])
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([example.tokens]), labels=labels).loss
        ours = answer_loss(model, collate([example], 0))
    torch.testing.assert_close(ours, theirs)


def test_padding_does_not_change_the_loss() -> None:
    model = small_llama()
    short, long = Encoded((9, 8, 7), 2), Encoded((4, 5, 6, 7, 8, 9), 5)  # one answer token each
    with torch.no_grad():
        apart = [answer_loss(model, collate([e], 0)).item() for e in (short, long)]
        together = answer_loss(model, collate([short, long], 0)).item()
    assert together == pytest.approx(sum(apart) / 2, abs=1e-5)


def test_the_same_seed_gives_the_same_adapter() -> None:
    recipe = replace(RECIPE, steps=3)
    states = [
        [
            p
            for p in train_adapter(small_llama(), recipe, EXAMPLES)[0].parameters()
            if p.requires_grad
        ]
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_peft_loads_the_saved_adapter_and_answers_as_trained(
    trained: tuple[torch.nn.Module, float, float], saved: Path
) -> None:
    with without_peft_noise():
        loaded = PeftModel.from_pretrained(small_llama(), str(saved)).eval()
    batch = collate(EXAMPLES, 0)
    with torch.no_grad():
        again = answer_loss(loaded, batch).item()
    assert again == pytest.approx(trained[2], rel=0.1, abs=0.05)  # saved in bfloat16


def test_what_is_saved_is_bfloat16_names_its_base_and_no_path(saved: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    recipe = json.loads((saved / "recipe.json").read_text())
    assert recorded_recipe(recipe["lora"]) == RECIPE
    assert {f.name for f in saved.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.json",
    }


def test_an_existing_folder_is_not_overwritten(
    trained: tuple[torch.nn.Module, float, float], saved: Path
) -> None:
    with pytest.raises(OutputError, match="is there already"):
        save_adapter(trained[0], saved, "some/base", {})


def test_a_failed_save_leaves_nothing(
    trained: tuple[torch.nn.Module, float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained[0], tmp_path / "new", "some/base", {})
    assert list(tmp_path.iterdir()) == []


def test_all_linear_trains_every_projection(tmp_path: Path) -> None:
    recipe = replace(RECIPE, targets=("all-linear",), steps=1)
    adapted, _ = train_adapter(small_llama(), recipe, EXAMPLES)
    save_adapter(adapted, tmp_path / "all", "some/base", {})
    names = load_file(tmp_path / "all" / "adapter_model.safetensors")
    assert any(".mlp.down_proj.lora_A" in name for name in names)


def test_a_target_that_the_model_lacks_is_named() -> None:
    with pytest.raises(RecipeError, match="--targets c_attn"):
        train_adapter(small_llama(), replace(RECIPE, targets=("c_attn",)), EXAMPLES)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"rank": 0}, "--rank"),
        ({"lr": -1.0}, "--lr"),
        ({"batch_size": 0}, "--batch-size"),
        ({"steps": 0}, "--steps"),
        ({"targets": ()}, "--targets"),
        ({"dropout": 1.0}, "--dropout"),
        ({"weight_decay": -0.1}, "--weight-decay"),
    ],
)
def test_a_recipe_that_cannot_be_trained_with_names_the_option(
    change: dict[str, float], option: str
) -> None:
    with pytest.raises(RecipeError, match=option):
        replace(RECIPE, **change)  # type: ignore[arg-type]


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    shares = [lr_share(step, 100, 0.1) for step in range(101)]
    assert shares[0] < shares[5] < shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[100] == pytest.approx(0.1)


def test_steps_win_over_epochs() -> None:
    assert total_steps(10, replace(RECIPE, steps=None, epochs=3, batch_size=4)) == 9
    assert total_steps(10, replace(RECIPE, steps=5, epochs=3)) == 5


def test_the_base_keeps_its_weights() -> None:
    model = small_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_adapter(model, replace(RECIPE, steps=2), EXAMPLES)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


def test_a_base_saved_elsewhere_takes_the_adapter(saved: Path, tmp_path: Path) -> None:
    small_llama().save_pretrained(tmp_path / "base")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with without_peft_noise():
        adapted = PeftModel.from_pretrained(fresh, str(saved))
    assert adapted.active_adapter == "default"
