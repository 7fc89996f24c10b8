"""A large model takes the memory of its weights, whatever becomes of them while it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import save_model
from torch import nn

from quickchange_server.model.adapter_layers import PackedLinear
from quickchange_server.model.loading.model_loader import load_model

LOAD = r"""
import json, re, sys, time
from pathlib import Path
import torch
from quickchange_kernels import native
from quickchange_server.model.loading.model_loader import load_model
import transformers.models.llama.modeling_llama
native.ensure()
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
path, dtype, quantization = sys.argv[1:]
before, begun = peak(), time.monotonic()
load_model(path, dtype=getattr(torch, dtype), device=torch.device("cpu"), adapters=True,
           quantization=quantization)
print(json.dumps({"peak": peak() - before, "seconds": time.monotonic() - begun}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """1.58 GB in float32, in six files, and its number of weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=7,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").float()
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, 1) if "norm" in name else nn.init.uniform_(parameter, -1, 1)
    count = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size="300MB")
    del model
    yield folder, count
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantization", "bytes_each", "most"),
    # In bfloat16 a layer's gate and up projections, in memory twice for a moment, are 6 %.
    [("float32", "none", 4, 1.1), ("bfloat16", "none", 2, 1.15), ("float32", "int8", 4, 1.1)],
)
def test_peak_memory_is_that_of_the_weights(
    dtype: str, quantization: str, bytes_each: int, most: float, large: tuple[Path, int]
) -> None:
    folder, count = large
    command = [sys.executable, "-c", LOAD, str(folder), dtype, quantization]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    print(dtype, quantization, measured, count * bytes_each)
    assert measured["peak"] < most * count * bytes_each


def test_fused_linears_leave_no_copy_of_their_weights(tmp_path: Path) -> None:
    """What is left are the fused weights, packed: as many numbers as the model has."""
    path = save_model("llama", tmp_path)
    model = load_model(
        str(path), dtype=torch.float32, device=torch.device("cpu"), adapters=True
    ).module
    import gc

    from transformers import AutoModelForCausalLM

    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
    gc.collect()
    packed = [one.panels for one in model.modules() if isinstance(one, PackedLinear)]
    assert len(packed) == 12
    assert sum(p.numel() for p in (*model.parameters(), *packed)) == count
