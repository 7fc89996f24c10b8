"""Reader of PEFT's prompt learning: what PEFT hands to the model, as virtual tokens.

PEFT saves a prompt as `prompt_embeddings`, behind P-tuning's encoder and prefix tuning's
projection: loaded for use it applies neither again. A cache's row is all layers' keys and values
side by side, layer by layer, the key first, all heads of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter
from quickchange_store.canonical.prompt_part import MAX_VIRTUAL_TOKENS, VirtualPrompt
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import (
    CONFIG_FILE,
    invalid,
    is_set,
    read_config,
    refuse_fields,
)
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.peft.classification_head import take_classifier
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE, WRITER, check_base
from quickchange_store.formats.peft.peft_config import TRAINING_ONLY
from quickchange_store.formats.rank_limits import RankLimits
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.weight_files import weight_files

if TYPE_CHECKING:
    import torch

PROMPT = "prompt_embeddings"
OF_EMBEDDINGS = ("CPT", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING")
OF_CACHES = ("CARTRIDGE", "PREFIX_TUNING")
_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"
_MOST = 1 << 20  # of a size in the configuration


def read_prompt(directory: Path, base: BaseSpec, _limits: RankLimits) -> Imported:
    """Read the prompt in `directory`, with its classification head if it has one.

    Raises InvalidAdapterError, UnsupportedFeatureError and BaseMismatchError; the message names
    file, key and remedy.
    """
    config = read_config(directory)
    tensors = AdapterTensors(*weight_files(directory, WEIGHTS_FILE, WRITER))
    classified = take_classifier(directory, config, base, tensors)
    return classified.joined(_read(classified.config, base, tensors))


def _read(config: Mapping[str, Any], base: BaseSpec, tensors: AdapterTensors) -> Imported:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CLASSES

    kind = config["peft_type"]
    known = {each.name for each in fields(CLASSES[kind])} | TRAINING_ONLY
    refuse_fields(
        config,
        known=known - {"modules_to_save"},
        refused={"modules_to_save"},
        remedies={"modules_to_save": "train a LoRA of these modules, and name both in a request"},
    )
    warnings = check_base(config, base)
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UnsupportedFeatureError(
            "a prompt of an encoder and a decoder is not served",
            file=CONFIG_FILE,
            key="num_transformer_submodules",
            remedy="train it on a causal language model (task_type CAUSAL_LM)",
        )
    count = _size(config, "num_virtual_tokens", MAX_VIRTUAL_TOKENS)
    if kind in OF_CACHES:
        prompt = VirtualPrompt("cache", _cache(config, base, tensors, count))
    else:
        prompt = VirtualPrompt("embeddings", _embeddings(str(kind), base, tensors, count))
    if tensors.left:
        raise InvalidAdapterError(
            f"the tensor is not expected: a prompt of type {kind} has none of this name",
            file=WEIGHTS_FILE,
            key=min(tensors.left),
            remedy="save the adapter again, with PEFT's save_pretrained",
        )
    source = {
        "format": "peft",
        "config": {key: value for key, value in config.items() if is_set(value)},
    }
    name = str(config.get("base_model_name_or_path") or "")
    adapter = CanonicalAdapter(base.architecture, name, {}, source, prompt=prompt)
    return Imported(adapter, tuple(warnings))


def _embeddings(kind: str, base: BaseSpec, tensors: AdapterTensors, count: int) -> torch.Tensor:
    """The vectors [P, H] that PEFT puts in front of the text's."""
    width = _embedding_width(base)
    values = tensors.take_shaped(PROMPT, "the input embedding", (count, width))
    if kind != "MULTITASK_PROMPT_TUNING":
        return values
    columns, rows = tensors.take(_COLUMNS), tensors.take(_ROWS)
    if columns.ndim != 3 or columns.shape[0] != 1:
        raise UnsupportedFeatureError(
            f"a prompt for each of several tasks, shape {list(columns.shape)}: a request has no "
            "task id",
            file=CONFIG_FILE,
            key="num_tasks",
            remedy="save one task's: a PROMPT_TUNING adapter whose prompt_embeddings are these, "
            f"times {_COLUMNS}[task] @ {_ROWS}[task]",
        )
    rank = columns.shape[2]
    columns = tensors.take_shaped(_COLUMNS, "the prompt", (1, count, rank))[0]
    rows = tensors.take_shaped(_ROWS, "the input embedding", (1, rank, width))[0]
    return values.float() * (columns.float() @ rows.float())


def _embedding_width(base: BaseSpec) -> int:
    widths = [each.out_features for each in base.modules.values() if each.kind == "embedding"]
    if not widths:
        raise UnsupportedFeatureError(
            f"the base model {base.architecture} has no input embedding that is known, in whose "
            "place a prompt's vectors would stand",
            file=CONFIG_FILE,
            key="peft_type",
            remedy="train a LoRA (peft_type LORA) instead",
        )
    return widths[0]


def _cache(
    config: Mapping[str, Any], base: BaseSpec, tensors: AdapterTensors, count: int
) -> torch.Tensor:
    """Keys and values [layers, 2, KV heads, P, head size] as PEFT puts them into the cache."""
    layers = _size(config, "num_layers", _MOST)
    heads = _size(config, "num_attention_heads", _MOST)
    width = _size(config, "token_dim", _MOST)
    if width % heads:
        raise invalid("token_dim", width, f"use a multiple of num_attention_heads, {heads}")
    _check_keys(base, layers, width)
    expected = (count, layers * 2 * width)
    values = tensors.take_shaped(PROMPT, "the cache of keys and values", expected)
    parts = values.view(count, layers, 2, heads, width // heads)
    return parts.permute(1, 2, 3, 0, 4).contiguous()


def _check_keys(base: BaseSpec, layers: int, width: int) -> None:
    """Raise BaseMismatchError where the base's projections of keys, if it has such, differ."""
    keys = [
        shape.out_features
        for path, shape in base.modules.items()
        if path.rpartition(".")[2] == "k_proj" and shape.kind == "linear"
    ]
    if keys and (len(keys), set(keys)) != (layers, {width}):
        raise BaseMismatchError(
            f"it has keys of {width} numbers in {layers} layers, the base model "
            f"{base.architecture} of {', '.join(map(str, sorted(set(keys))))} in {len(keys)}",
            file=CONFIG_FILE,
            key="token_dim",
            remedy="use an adapter of this base model",
        )


def _size(config: Mapping[str, Any], name: str, most: int) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise invalid(name, value, f"give the training's, a whole number from 1 to {most}")
    return value
