"""Adapters on linears that read the rows asked for, not all rows: mixed batches equal PEFT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_driver import Driver, make_engine, request
from mixed_peft import TOKENS, served, train
from peft import LoraConfig, PeftModel
from tiny_models import make_model
from transformers import PreTrainedModel

BEHIND = {"modernbert-decoder": "lm_head.dense", "roc_bert": "cls.predictions.transform.dense"}
IN_LAYERS = {"modernbert-decoder": "q_proj", "roc_bert": "query"}


def configs(family: str) -> dict[str, LoraConfig]:
    dense = BEHIND[family].removeprefix("cls.")
    return {
        "behind": LoraConfig(r=4, target_modules=[dense], lora_alpha=40),
        "both": LoraConfig(r=11, target_modules=[dense, IN_LAYERS[family]], lora_alpha=99),
        "more": LoraConfig(r=2, target_modules=[dense], lora_alpha=30),
        "layers": LoraConfig(r=3, target_modules=[IN_LAYERS[family]], lora_alpha=6),
    }


@pytest.mark.parametrize("family", BEHIND)
def test_a_batch_that_mixes_them_with_other_adapters_equals_peft(
    family: str, tmp_path: Path
) -> None:
    trained = train(family, tmp_path, configs(family))
    assert all(trained.answers[name] != trained.plain[name] for name in ("behind", "both", "more"))
    tokens = served(trained)
    for name in trained.prompts:
        assert tokens[name] == trained.answers[name], name
        assert tokens[f"plain/{name}"] == trained.plain[name], name


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """What enters the LM head, row by row."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    model(input_ids=torch.tensor([prompt]), use_cache=False)
    hook.remove()
    return seen[0].double()


@pytest.mark.parametrize("family", BEHIND)
def test_embeddings_beside_generation_have_its_updates_in_every_pooled_row(
    family: str, tmp_path: Path
) -> None:
    trained = train(family, tmp_path, configs(family))
    engine = make_engine(trained.path, trained.adapters.__getitem__, max_sequences=4)
    drive = Driver(engine)
    prompt = trained.prompts["behind"]
    engine.submit(request("embedding", prompt, [("behind", 1.0)], pooling="mean"))
    engine.submit(
        request("scored", trained.prompts["both"], [("both", 1.0)], max_tokens=TOKENS, logprobs=0)
    )
    drive.finish("embedding", "scored")
    engine.close()
    with torch.inference_mode():
        model = PeftModel.from_pretrained(make_model(family), tmp_path / "behind").eval()
    expected = hidden_states(model.get_base_model(), prompt).mean(0)
    embedding = drive.last["embedding"].embedding
    assert embedding is not None
    torch.testing.assert_close(
        torch.from_numpy(np.frombuffer(embedding, dtype="<f4").astype(float)),
        expected,
        rtol=1e-3,
        atol=1e-3,
    )
    assert drive.tokens["scored"] == trained.answers["both"]
