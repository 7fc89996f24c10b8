"""Virtual tokens through the engine equal PEFT's generation token for token: every kind of prompt,
alone and with a LoRA, beside LoRA and plain rows in one batch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_driver import Driver, make_engine, request
from peft import get_peft_model
from prompt_adapters import KINDS, Prompts, learn
from recurrent_models import make_recurrent
from tiny_models import VOCABULARY, save_model
from transformers import AutoModelForSequenceClassification

from quickchange_store.base_model.base_spec import base_spec
from quickchange_store.canonical.prompt_part import VirtualPrompt
from quickchange_store.importing import read_adapter

FAMILIES = ["llama", "qwen3", "gpt2", "gemma2", "mistral"]


def answered(made: Prompts, **options: object) -> Driver:
    engine = make_engine(
        made.path,
        made.adapters.__getitem__,
        **{"max_sequences": 30, "max_batch_tokens": 48, **options},
    )
    drive = Driver(engine)
    submits = made.submits()
    for submit in submits:
        engine.submit(submit)
    drive.finish(*(submit.request_id for submit in submits))
    engine.close()
    return drive


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_answer_as_in_peft_alone_and_with_a_lora(family: str, tmp_path: Path) -> None:
    made = learn(family, tmp_path)
    got = answered(made)
    assert {d.error for d in got.last.values()} == {None}
    for name, answer in made.answers.items():
        assert got.tokens[name] == answer, name
    if family != "gemma2":  # whose caps leave its random model one answer
        # Where Mistral's window has left them behind, they may change nothing any more.
        changed = [name for name in KINDS if made.alone[name] != made.plain[name]]
        assert len(changed) > len(KINDS) // 2


@pytest.mark.parametrize("kind", ["qwen3_5_text", "granitemoehybrid", "lfm2"])
def test_vectors_answer_as_in_peft_on_recurrent_layers(kind: str, tmp_path: Path) -> None:
    made = learn(kind, tmp_path, ["prompt tuning", "p-tuning"], make_recurrent)
    got = answered(made, max_model_len=96, kv_cache_bytes=2 << 20)
    for name, answer in made.answers.items():
        assert got.tokens[name] == answer, name
    prompt = VirtualPrompt("cache", torch.zeros(2, 2, 2, 3, 8))
    made.adapters["keys"] = replace(made.adapters["p-tuning"], prompt=prompt)
    engine = make_engine(made.path, made.adapters.__getitem__, max_model_len=96)
    drive = Driver(engine)
    engine.submit(made.submit("keys", ["keys"], [1, 2]))
    drive.finish("keys")
    engine.close()
    assert "prefix tuning" in str(drive.last["keys"].error)
    assert "state" in str(drive.last["keys"].error)
    assert drive.last["keys"].error_kind == "adapter"


@pytest.mark.parametrize("family", ["gemma", "bloom", "gpt_neox", "qwen2", "phi", "mixtral"])
def test_other_bases_answer_as_in_peft(family: str, tmp_path: Path) -> None:
    made = learn(family, tmp_path, ["prompt tuning", "prefix tuning"])
    got = answered(made)
    for name, answer in made.answers.items():
        assert got.tokens[name] == answer, name


def test_a_base_that_reads_ids_behind_its_embedding_says_so(tmp_path: Path) -> None:
    made = learn("gemma3n", tmp_path, ["prompt tuning"])
    got = answered(made)
    assert "reads token ids" in str(got.last["prompt tuning"].error)
    assert got.last["prompt tuning"].error_kind == "adapter"
    assert got.tokens["prompt tuning, plain"] == made.plain["prompt tuning"]


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning"])
def test_classes_behind_virtual_tokens_are_peft_s(kind: str, tmp_path: Path) -> None:
    path = save_model("llama", tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a head that is not in the checkpoint
        torch.manual_seed(0)
        classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
        classifier.config.pad_token_id = VOCABULARY - 1  # in no text
        config = KINDS[kind]()
        config.task_type = "SEQ_CLS"
        model = get_peft_model(classifier, config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", base_spec(str(path))).adapter
    assert adapter.classifier is not None
    text = [5, 17, 40, 8, 23, 61, 2]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([text])).logits[0].numpy()
    engine = make_engine(path, lambda _: adapter)
    drive = Driver(engine)
    terms = [("a", 1.0, 0, None, adapter.virtual_tokens)]
    engine.submit(request("a", text, terms, pooling="last", max_tokens=0))
    drive.finish("a")
    engine.close()
    state = np.frombuffer(drive.first["a"].embedding or b"", "<f4")
    np.testing.assert_allclose(adapter.classifier.scores(state[None])[0], expected, rtol=2e-3)
