"""Launches of a layer with adapters in a decode step, which the paper estimate rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from engine_driver import engine_of
from launch_record import graphs_recorded, recorded_launches
from transformers import LlamaConfig, LlamaForCausalLM

from quickchange_kernels.roofline.beside_vllm import QUICKCHANGE
from quickchange_server.model.graphs.cuda_graphs import Outputs
from quickchange_server.model.loading.model_loader import load_model

LINEARS = 4  # q/k/v, o, gate/up, down: cuBLAS's


def launches(folder: Path, layers: int) -> Counter[str]:
    """Triton's launches in the graph of a decode step with adapters."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    path = folder / str(layers)
    LlamaForCausalLM(config).save_pretrained(path)
    cpu = torch.device("cpu")
    loaded = load_model(str(path), dtype=torch.float32, device=cpu, adapters=True)
    found: list[Counter[str]] = []
    with recorded_launches() as record, graphs_recorded(record):
        capture = record.capture

        def noting(compute: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
            before = Counter(record.launches)
            result = capture(compute)
            found.append(record.launches - before)
            return result

        record.capture = noting  # type: ignore[method-assign]
        with graphs_recorded(record):
            engine_of(loaded, path).close()
    decode = [each for each in found if each["paged_attention_kernel"] == layers]
    return max(decode, key=lambda each: each["shrink_kernel"])


def test_a_layer_takes_as_many_launches_as_the_estimate_says(tmp_path: Path) -> None:
    one, two = launches(tmp_path, 1), launches(tmp_path, 2)
    layer = two - one
    assert layer == Counter(
        rms_norm_kernel=2, rotary_kernel=1, kv_write_kernel=1, paged_attention_kernel=1,
        merge_splits_kernel=1, silu_mul_kernel=1, shrink_kernel=4, expand_kernel=4,
    )  # fmt: skip
    assert layer.total() + LINEARS == QUICKCHANGE.layer
    assert layer["expand_kernel"] == QUICKCHANGE.overlapped
