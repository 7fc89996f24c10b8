"""Quickchange's own directory of Turbo heads, which holds all that Medusa's layouts can't.

That is sequential heads, shared blocks, a draft vocabulary, and heads of different lengths:

    config.json                {"base_model_name_or_path", "quickchange_turbo": {…}, "notes"}
    turbo_heads.safetensors    block.{i}.weight, block.{i}.bias, output.{i}, vocabulary

`quickchange_turbo` has `format` (1; 2 where there is a `tenant`, the only one that they draft for),
`heads` (each head's blocks, from 0), `outputs` (each head's LM head; empty: the base model's),
`sequential` and `vocabulary` (true if there is one). The same folder may hold a PEFT adapter:
together they are a Turbo LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical import turbo_bytes
from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.canonical.turbo_bytes import TurboLayout
from quickchange_store.errors import InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import BASE_NAME
from quickchange_store.formats.tensors import AdapterTensors, copied, save_tensors
from quickchange_store.formats.turbo.turbo_common import (
    HEADS_CONFIG_FILE,
    MAX_HEADS,
    ImportedHeads,
    LmHead,
    base_name,
    refuse_left,
)

if TYPE_CHECKING:
    import torch

    from quickchange_store.canonical.turbo_part import TurboHeads

TURBO_KEY = "quickchange_turbo"
TURBO_FILE = "turbo_heads.safetensors"
FORMAT = 1
TENANT_FORMAT = 2  # with `tenant`, which readers of format 1 would drop
_PREFIX = "turbo."  # prefix of canonical names; the file omits it


def write_turbo_directory(
    heads: TurboHeads, directory: Path, base_name: str, notes: Mapping[str, Any] | None = None
) -> None:
    """Write `heads` to `directory`, made where it is missing; other files in it stay.

    `base_name` names the base model; `notes` are JSON about the heads' origin. Both are kept beside
    the adapter when it is added. Raises OSError, and ValueError or TypeError where the notes are no
    JSON.
    """
    layout, tensors = turbo_bytes.parts(heads)
    config = {
        BASE_NAME: base_name,
        TURBO_KEY: {
            "format": FORMAT if heads.tenant is None else TENANT_FORMAT,
            **layout.encode(),
        },
        "notes": dict(notes or {}),
    }
    encoded = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    directory.mkdir(parents=True, exist_ok=True)
    content = {name.removeprefix(_PREFIX): copied(tensor) for name, tensor in tensors.items()}
    save_tensors(content, directory / TURBO_FILE)
    (directory / HEADS_CONFIG_FILE).write_text(encoded + "\n")


def read_turbo_directory(
    directory: Path, config: Mapping[str, Any], base: BaseSpec
) -> ImportedHeads:
    """Read the heads in `directory`, whose config.json is `config`, for the base model `base`.

    Raises InvalidAdapterError, UnsupportedFeatureError and BaseMismatchError; the message names
    file, key and remedy.
    """
    layout = _layout(config.get(TURBO_KEY))
    path = directory / TURBO_FILE
    if not path.is_file():
        raise InvalidAdapterError(
            "the file is missing", file=TURBO_FILE, remedy="copy the folder again, complete"
        )
    tensors = AdapterTensors(path, config_file=HEADS_CONFIG_FILE)
    taken = _take(tensors, layout, LmHead.of(base))
    refuse_left(tensors, f"{len(layout.heads)} heads, of the blocks that {TURBO_KEY} lists")
    try:
        heads = turbo_bytes.assemble(layout, lambda name: taken[name.removeprefix(_PREFIX)])
    except InvalidAdapterError as error:
        raise InvalidAdapterError(
            error.problem, file=HEADS_CONFIG_FILE, key=TURBO_KEY, remedy=error.remedy
        ) from error
    source = {"format": "turbo", "notes": config.get("notes") or {}}
    return ImportedHeads(turbo_bytes.shared(heads), base_name(config), source)


def _take(tensors: AdapterTensors, layout: TurboLayout, head: LmHead) -> dict[str, torch.Tensor]:
    """Tensors that the layout asks for, checked against the base's LM head."""
    taken: dict[str, torch.Tensor] = {}
    rows = head.vocabulary
    if layout.vocabulary:
        taken["vocabulary"] = head.take_tokens(tensors, "vocabulary").int()
        rows = len(taken["vocabulary"])
    first = {blocks[0] for blocks in layout.heads} if layout.sequential else set()
    for block in sorted({index for blocks in layout.heads for index in blocks}):
        prefix = f"block.{block}"
        weight, bias = head.take_block(tensors, prefix, reads_embedding=block in first)
        taken[f"{prefix}.weight"], taken[f"{prefix}.bias"] = weight, bias
    for output in sorted(set(layout.outputs)):
        name = f"output.{output}"
        taken[name] = tensors.take_shaped(name, head.module, (rows, head.hidden))
    return taken


def _layout(tree: Any) -> TurboLayout:
    if isinstance(tree, dict) and tree.get("format") not in (None, FORMAT, TENANT_FORMAT):
        raise UnsupportedFeatureError(
            f"format {tree['format']!r} is not known to this version, which reads {FORMAT} and "
            f"{TENANT_FORMAT}",
            file=HEADS_CONFIG_FILE,
            key=f"{TURBO_KEY}.format",
            remedy="use the version of quickchange that wrote it",
        )
    try:
        layout = TurboLayout.decode(tree)
        if not layout.heads or not all(layout.heads):
            raise ValueError("there must be a head, and each must list a block")
        if max(len(layout.heads), *map(len, layout.heads)) > MAX_HEADS:
            raise ValueError(f"more than {MAX_HEADS} heads, or blocks of one head")
        if layout.outputs and len(layout.outputs) != len(layout.heads):
            raise ValueError("outputs must list one for each head, or none")
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidAdapterError(
            f"it does not describe heads ({error!r})",
            file=HEADS_CONFIG_FILE,
            key=TURBO_KEY,
            remedy="write the folder again",
        ) from error
    return layout
