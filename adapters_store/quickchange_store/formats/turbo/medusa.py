"""Reader of Medusa heads in the layouts of LoRAX, Medusa's own code and vLLM.

    LoRAX, v2      {i}.{j}.linear.weight [H, H], .bias [H]; the base model's LM head
    LoRAX, v1      the same, and {i}.{L}.weight [V, H], an LM head of each head's own
    vLLM           blocks.{i}.layers.{j}.weight, .bias; lm_heads.{i}.weight; token_map

for heads i from 0 and their blocks j from 0 to L - 1. The tensors decide the layout, as in LoRAX,
not `version`. Of config.json only the numbers of heads and blocks and the fields named below are
read; as drafts are verified, no other can change the output.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.canonical.turbo_bytes import shared
from quickchange_store.canonical.turbo_part import DraftBlock, TurboHeads
from quickchange_store.errors import InvalidAdapterError
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.turbo.medusa_vllm import read_vllm
from quickchange_store.formats.turbo.turbo_common import (
    HEADS_CONFIG_FILE,
    ImportedHeads,
    LmHead,
    base_name,
    count,
    plain,
    refuse_left,
)

HEADS_KEYS = ("medusa_num_heads", "num_heads")
LAYERS_KEYS = ("medusa_num_layers", "num_hidden_layers")
_VLLM = re.compile(r"(medusa_heads\.)?(blocks|lm_heads?)\.|token_map$")


def read_medusa(files: Sequence[Path], config: Mapping[str, Any], base: BaseSpec) -> ImportedHeads:
    """Read the heads in safetensors `files`, with the config.json `config`.

    Raises InvalidAdapterError, UnsupportedFeatureError, BaseMismatchError and BaseModelError; the
    message names file, key and remedy.
    """
    heads, layers = count(config, HEADS_KEYS), count(config, LAYERS_KEYS, default=1)
    _check_version(config)
    tensors = AdapterTensors(*files, config_file=HEADS_CONFIG_FILE)
    lm_head = LmHead.of(base)
    if is_vllm(tensors.left):
        layout, turbo = "vllm", read_vllm(tensors, config, base, heads, layers)
    else:
        layout, turbo = "lorax", _read_lorax(tensors, lm_head, heads, layers)
    refuse_left(tensors, f"{heads} heads of {layers} blocks")
    source = {"format": f"medusa ({layout})", "config": plain(config)}
    return ImportedHeads(shared(turbo), base_name(config), source)


def is_vllm(keys: Collection[str]) -> bool:
    """True if tensors of these names are heads in vLLM's layout."""
    return any(_VLLM.match(key) for key in keys)


def _read_lorax(tensors: AdapterTensors, lm_head: LmHead, heads: int, layers: int) -> TurboHeads:
    shape = (lm_head.vocabulary, lm_head.hidden)
    own = [f"{i}.{layers}.weight" for i in range(heads)]
    if not any(key in tensors for key in own):
        own = []
    prefixes = [f"{i}.{j}.linear" for i in range(heads) for j in range(layers)]
    return TurboHeads(
        blocks=tuple(DraftBlock(*lm_head.take_block(tensors, prefix)) for prefix in prefixes),
        heads=tuple(tuple(range(i * layers, (i + 1) * layers)) for i in range(heads)),
        outputs=tuple(tensors.take_shaped(key, lm_head.module, shape) for key in own),
    )


def _check_version(config: Mapping[str, Any]) -> None:
    """Refuse a version that is no number, nor a string of one. It decides nothing else."""
    version = config.get("version", 1)
    try:
        if isinstance(version, bool):
            raise TypeError
        float(version)
    except (TypeError, ValueError) as error:
        raise InvalidAdapterError(
            f"{version!r} is not a number",
            file=HEADS_CONFIG_FILE,
            key="version",
            remedy='use 1 or 2, or "1" or "2"; or leave it out',
        ) from error
