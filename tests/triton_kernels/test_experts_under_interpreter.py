"""The engine on Triton's kernels gives PEFT's tokens with LoRA of experts, from graphs too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_driver import Driver, make_engine, request
from mixed_peft import train
from peft import LoraConfig
from repeating_capture import RepeatingCapture

from quickchange_server.engine import model_runner

MATRICES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "attention": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "experts": LoraConfig(r=11, lora_alpha=4, target_modules=[], target_parameters=MATRICES),
}


@pytest.mark.slow
def test_an_adapter_of_experts_that_comes_after_the_graphs_is_seen(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Until it comes no adapter on the device updates an expert, and graphs leave that out."""
    repeating = None if device.type == "cuda" else RepeatingCapture()
    if repeating is not None:
        monkeypatch.setattr(model_runner, "capture_for", lambda _device: repeating)
    trained = train("mixtral", tmp_path, CONFIGS)
    engine = make_engine(
        trained.path,
        trained.adapters.__getitem__,
        device=device.type,
        max_sequences=2,
        max_model_len=48,
    )
    drive = Driver(engine)
    for name in ("attention", "experts"):
        prompt = trained.prompts[name]
        engine.submit(request(name, prompt, [(name, 1.0)], max_tokens=5))
        engine.submit(request(f"plain/{name}", prompt, max_tokens=5))
        drive.finish(name, f"plain/{name}")
    engine.close()
    for name, answer in trained.answers.items():
        assert drive.tokens[name] == answer[:5], name
        assert drive.tokens[f"plain/{name}"] == trained.plain[name][:5], name
    assert repeating is None or repeating.replayed
