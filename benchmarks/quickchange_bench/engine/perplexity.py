"""Perplexity and KL divergence of dtypes and quantisations of the base on a fixed text.

Runs the server's own model path (fused modules, paged attention) over windows of a text that lies
beside this file: an early copy of this project's documentation, which no model was trained on.
Every window starts a sequence of its own; all its tokens but the first are scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quickchange_server.frontend.tokenizer import Text
from quickchange_server.model.forward_context import (
    FIRST_STATE,
    AttentionBatch,
    ForwardContext,
    StatePart,
)
from quickchange_server.model.loading.model_dtype import torch_dtype
from quickchange_server.model.loading.model_loader import LoadedModel, forward, load_model
from quickchange_server.model.quantized_linear import Quantization

TEXT = Path(__file__).parent / "texts" / "prose.txt"
_BLOCK = 16  # tokens of one KV block


@dataclass(frozen=True, slots=True)
class BaseVariant:
    """Dtype and quantisation of the base."""

    dtype: str
    quantization: Quantization

    @property
    def name(self) -> str:
        return self.dtype if self.quantization == "none" else f"{self.quantization} ({self.dtype})"


@dataclass(frozen=True, slots=True)
class Loss:
    variant: BaseVariant
    tokens: int  # scored
    perplexity: float
    divergence: float  # mean KL to float32, nats a token
    same_choice: float  # share of tokens whose most likely successor is float32's


def measure_perplexity(
    model: str, variants: Sequence[BaseVariant], *, window: int, windows: int
) -> list[Loss]:
    """Measure each variant against float32, over `windows` windows of `window` tokens.

    Raises ValueError where the text is shorter.
    """
    tokens = Text.load(model).encode_now(TEXT.read_text())
    if len(tokens) < window * windows:
        raise ValueError(
            f"--windows {windows}: the text has {len(tokens)} tokens, {window * windows} are "
            "needed; give fewer or a smaller --window"
        )
    parts = torch.tensor(tokens[: window * windows]).view(windows, window)
    expected = list(_log_probabilities(model, BaseVariant("float32", "none"), parts))
    return [
        _loss(variant, parts, expected, _log_probabilities(model, variant, parts))
        for variant in variants
    ]


def loss_table(losses: Sequence[Loss]) -> str:
    """Markdown table of the losses."""
    lines = [
        "| base | perplexity | KL to float32, 1e-3 nats | same first choice |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {loss.variant.name} | {loss.perplexity:.3f} | {loss.divergence * 1e3:.2f} | "
        f"{loss.same_choice:.4f} |"
        for loss in losses
    ]
    return "\n".join(lines)


@torch.inference_mode()
def _log_probabilities(model: str, variant: BaseVariant, parts: Tensor) -> Iterator[Tensor]:
    """Log-probabilities [window - 1, V] of each window's tokens but the first."""
    dtype, device = torch_dtype(variant.dtype), torch.device("cpu")
    loaded = load_model(
        model, dtype=dtype, device=device, adapters=False, quantization=variant.quantization
    )
    blocks = -(-parts.shape[1] // _BLOCK)
    loaded.install_caches(
        num_blocks=blocks,
        block_size=_BLOCK,
        state_rows=FIRST_STATE + 1,
        dtype=dtype,
        device=device,
    )
    for ids in parts:
        yield torch.log_softmax(_logits(loaded, ids, blocks)[:-1].float(), dim=-1)


def _logits(loaded: LoadedModel, ids: Tensor, blocks: int) -> Tensor:
    length, positions = len(ids), torch.arange(len(ids))
    loaded.holder.step = ForwardContext(
        AttentionBatch(
            slots=positions,
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
            seq_lens=torch.tensor([length], dtype=torch.int32),
            query_start=torch.tensor([0, length], dtype=torch.int32),
        ),
        adapters=None,
        # read where layers keep states, or positions are scaled by the text's length
        states=(StatePart(None, length, None, torch.tensor([FIRST_STATE]), None),),
        reach=torch.full((length,), length),
    )
    try:
        return forward(loaded, ids, positions, positions).logits
    finally:
        loaded.holder.step = None


def _loss(
    variant: BaseVariant, parts: Tensor, expected: Sequence[Tensor], found: Iterator[Tensor]
) -> Loss:
    surprise, divergence, same, count = 0.0, 0.0, 0, 0
    for ids, reference, scores in zip(parts, expected, found, strict=True):
        surprise -= float(scores.gather(1, ids[1:, None]).sum())
        divergence += float((reference.exp() * (reference - scores)).sum())
        same += int((reference.argmax(1) == scores.argmax(1)).sum())
        count += len(scores)
    return Loss(variant, count, math.exp(surprise / count), divergence / count, same / count)
