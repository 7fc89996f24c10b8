"""Bottlenecks that are trained compute and are described as AdapterHub's library has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from formula_weights import fill, formula_tensor
from tiny_models import greedy, make_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import quickchange_store.formats.adapterhub.adapterhub_config as adapterhub
from quickchange_training.adapters.adapter_recipes import BottleneckRecipe
from quickchange_training.adapters.bottleneck_adapters import BottleneckedModel
from quickchange_training.errors import RecipeError

RECORDED = json.loads(
    (Path(__file__).parents[1] / "reference" / "adapterhub" / "answers.json").read_text()
)
FORMS = {
    ("llama", "houlsby"): BottleneckRecipe(reduction_factor=4, activation="swish"),
    ("llama", "parallel"): BottleneckRecipe(placement="parallel", reduction_factor=3),
    ("qwen2", "houlsby"): BottleneckRecipe(reduction_factor=4, activation="swish"),
    ("qwen2", "pfeiffer"): BottleneckRecipe(placement="pfeiffer", reduction_factor=6),
    ("gemma2", "houlsby"): BottleneckRecipe(reduction_factor=4, activation="swish"),
}


def recorded_base(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **RECORDED["sizes"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    fill(model, RECORDED["std"])
    return model


@pytest.mark.parametrize(("family", "name"), FORMS)
def test_a_placement_answers_as_the_librarys_form_of_that_name(family: str, name: str) -> None:
    recorded = RECORDED["families"][family][name]
    model = BottleneckedModel(recorded_base(family), FORMS[family, name])
    shapes = dict(recorded["shapes"])
    for ours, parameter in model.tensors().items():
        theirs = ours.replace(".adapters.default.", f".adapters.{name}.")
        parameter.data = formula_tensor(theirs, tuple(shapes.pop(theirs)), RECORDED["std"])
    assert not shapes
    for answer in recorded["answers"]:
        assert greedy(model, answer["prompt"], len(answer["tokens"])) == answer["tokens"]


@pytest.mark.parametrize(("family", "name"), FORMS)
def test_its_configuration_says_what_the_librarys_says(family: str, name: str) -> None:
    recorded = RECORDED["families"][family][name]["config"]
    written = BottleneckedModel(recorded_base(family), FORMS[family, name]).config("tiny")
    for field in adapterhub.HONOURED - {"architecture"}:
        assert written["config"][field] == recorded["config"][field], field
    for field in ("hidden_size", "model_class", "model_type", "version"):
        assert written[field] == recorded[field], field


@pytest.mark.parametrize(
    ("family", "placement", "message"),
    [
        ("gpt2", "houlsby", "GPT2LMHeadModel has no layers with self_attn.o_proj"),
        ("gemma2", "pfeiffer", "--placement pfeiffer: where the residual stream passes the MLPs"),
    ],
)
def test_a_model_without_the_places_is_refused(family: str, placement: str, message: str) -> None:
    recipe = BottleneckRecipe(placement=placement)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=message):
        BottleneckedModel(make_model(family), recipe)
