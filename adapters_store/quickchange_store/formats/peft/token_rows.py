"""Trained rows of an embedding: PEFT's TRAINABLE_TOKENS, and LoRA's `trainable_token_indices`.

PEFT saves the rows as they are after training. As an update of the embedding, A picks the tokens
and B holds what their rows changed by, so the rank is the number of tokens; of an LM head tied to
it, A holds the change and B picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec, CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import (
    CONFIG_FILE,
    MAX_NAMES,
    invalid,
    is_set,
    read_config,
    refuse_fields,
)
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.patterns import check_patterns
from quickchange_store.formats.peft.peft_common import (
    WEIGHTS_FILE,
    check_base,
    find_targets,
    open_tensors,
)
from quickchange_store.formats.peft.tensor_names import PREFIX, TensorNames
from quickchange_store.formats.rank_limits import RankLimits
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.vocabulary.resized_vocabulary import resized_base

if TYPE_CHECKING:
    import torch

INDICES = "trainable_token_indices"  # of a LoRA
_KIND_INDICES = "token_indices"  # of the type of its own
_HONOURED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "peft_type",
        "target_modules",
        "task_type",
        _KIND_INDICES,
    }
)
_HARMLESS = frozenset({"inference_mode", "init_weights", "peft_version", "revision"})


@dataclass(frozen=True)
class TokenRows:
    """A LoRA's configuration without its trained tokens, and the updates that these are."""

    config: Mapping[str, Any]
    updates: Mapping[str, LowRankUpdate]

    def joined(self, imported: Imported, base: BaseSpec) -> Imported:
        """What was imported by that configuration, with the trained tokens."""
        if not self.updates:
            return imported
        updates = imported.adapter.updates
        if both := updates.keys() & self.updates.keys():
            raise UnsupportedFeatureError(
                f"the adapter has trained tokens of {min(both)} and another update of it",
                file=CONFIG_FILE,
                key=INDICES,
                remedy="train the module in one of the two ways",
            )
        every = {**updates, **self.updates}
        ordered = {path: every[path] for path in (*base.modules, *updates) if path in every}
        return replace(imported, adapter=replace(imported.adapter, updates=ordered))


def take_token_rows(
    config: Mapping[str, Any], base: BaseSpec, tensors: AdapterTensors
) -> TokenRows:
    """Take the trained tokens, if any, of a LoRA whose tensors are open. Raises StoreError."""
    given = config.get(INDICES)
    if not is_set(given):
        return TokenRows(config, {})
    embeddings = [path for path, shape in base.modules.items() if shape.kind == "embedding"]
    listed = given if isinstance(given, dict) else dict.fromkeys(embeddings, given)
    updates: dict[str, LowRankUpdate] = {}
    for name, indices in listed.items():
        found = [path for path in base.modules if f".{path}".endswith(f".{name}")]
        if not found:
            raise BaseMismatchError(
                f"the base model {base.architecture} has no module {name!r}",
                file=CONFIG_FILE,
                key=INDICES,
                remedy="use an adapter of this base model",
            )
        for path in found:
            key = f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"
            if key not in tensors and path in base.tied:
                continue  # it follows the module that it is tied to
            updates |= _updates(base, path, _indices(INDICES, indices), tensors, key)
    without = {name: value for name, value in config.items() if name != INDICES}
    return TokenRows(without, updates)


def read_tokens(directory: Path, base: BaseSpec, limits: RankLimits) -> Imported:  # noqa: ARG001 - what every type takes
    """Read the TRAINABLE_TOKENS adapter in `directory`. Raises StoreError."""
    config = read_config(directory)
    tensors, _ = open_tensors(directory, base)
    base = resized_base(base, tensors, PREFIX, named_tokens(config))
    refuse_fields(config, known=_HONOURED | _HARMLESS, refused=(), remedies={})
    warnings = check_base(config, base)
    check_patterns(config, base.modules, CONFIG_FILE)
    indices = _indices(_KIND_INDICES, config.get(_KIND_INDICES))
    embeddings = [path for path, shape in base.modules.items() if shape.kind == "embedding"]
    targets = find_targets(config, base, {base.model_type: embeddings}, TensorNames(base))
    updates: dict[str, LowRankUpdate] = {}
    for path in (path for path in base.modules if path in targets):
        key = f"{PREFIX}{path}.trainable_tokens_delta"
        if base.tied.get(path) in targets:
            continue  # it follows the module that it is tied to
        updates |= _updates(base, path, indices, tensors, key)
    if tensors.left:
        raise InvalidAdapterError(
            "the tensor is not expected: target_modules does not cover it",
            file=WEIGHTS_FILE,
            key=tensors.name(min(tensors.left)),
            remedy=f"save the adapter again, so that {CONFIG_FILE} and its tensors agree",
        )
    source = {"format": "peft", "config": {k: v for k, v in config.items() if is_set(v)}}
    name = str(config.get("base_model_name_or_path") or "")
    ordered = {path: updates[path] for path in base.modules if path in updates}
    return Imported(CanonicalAdapter(base.architecture, name, ordered, source), tuple(warnings))


def named_tokens(config: Mapping[str, Any]) -> int:
    """The least number of tokens for which a configuration's numbers of tokens are some."""
    fields = [config.get(INDICES), config.get(_KIND_INDICES)]
    listed = [list(each.values()) if isinstance(each, dict) else [each] for each in fields]
    numbers = [each for lists in listed for one in lists if isinstance(one, list) for each in one]
    return max((each + 1 for each in numbers if type(each) is int), default=0)


def _indices(field: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise invalid(field, value, "list tokens by number, from 0")
    if len(set(value)) != len(value) or not 1 <= len(value) <= MAX_NAMES:
        raise invalid(field, f"{len(value)} tokens", f"list 1 to {MAX_NAMES} tokens, each once")
    return value


def _updates(
    base: BaseSpec, path: str, indices: list[int], tensors: AdapterTensors, key: str
) -> dict[str, LowRankUpdate]:
    """The update of a module's rows, and those of the modules that are tied to it."""
    shape = base.modules[path]
    embedding = shape.kind == "embedding"
    if not embedding and (path != base.output_head or shape.bias):
        raise UnsupportedFeatureError(
            f"trained tokens of {path} are not served",
            file=CONFIG_FILE,
            key="target_modules",
            remedy="train tokens of the input embedding, or of an LM head without a bias",
        )
    tokens, width = shape.in_features, shape.out_features
    if not embedding:
        tokens, width = width, tokens
    if max(indices) >= tokens:
        raise BaseMismatchError(
            f"it has trained token {max(indices)}, and the base model has {tokens} tokens",
            file=CONFIG_FILE,
            key=INDICES if INDICES in key else _KIND_INDICES,
            remedy="use an adapter of this base model",
        )
    trained = tensors.take_shaped(key, path, (len(indices), width)).float()
    weight = tensors.base_tensor(base, f"{path}.weight", key)
    if tuple(weight.shape) != (tokens, width) or not weight.is_floating_point():
        raise UnsupportedFeatureError(
            f"trained tokens need the base's {path}.weight as plain numbers [{tokens}, {width}], "
            f"and the checkpoint has {weight.dtype} {list(weight.shape)}",
            file=CONFIG_FILE,
            key="peft_type",
            remedy="add the adapter with the base as it was before quantisation (--model)",
        )
    followers = [name for name, source in base.tied.items() if source == path]
    for name in followers:
        _take_copy(tensors, key.replace(path, name), name, trained)
    rows, trained = _with_resized(tensors, key, path, followers, weight, indices, trained)
    change = trained - weight[rows].float()
    picked = _picked(rows, tokens)
    found = {}
    for name in (path, *followers) if embedding else (path,):
        if base.modules[name].kind == "embedding":
            scale = base.modules[name].output_scale
            found[name] = LowRankUpdate(picked, change.T.contiguous(), scale)
        else:
            found[name] = LowRankUpdate(change, picked.T.contiguous(), 1.0)
    return found


def _with_resized(
    tensors: AdapterTensors,
    key: str,
    path: str,
    followers: list[str],
    weight: torch.Tensor,
    indices: list[int],
    trained: torch.Tensor,
) -> tuple[list[int], torch.Tensor]:
    """The trained rows, and those others that differ in the matrix that PEFT saves beside them
    where the vocabulary was resized."""
    import torch

    saved = key.replace("trainable_tokens_delta", "base_layer.weight")
    if saved not in tensors:
        return indices, trained
    copy = tensors.take_shaped(saved, path, tuple(weight.shape))
    for name in followers:
        _take_copy(tensors, saved.replace(path, name), name, copy.float())
    differ = (copy != weight.to(copy.dtype)).any(1).nonzero().flatten().tolist()
    others = [row for row in differ if row not in set(indices)]
    return [*indices, *others], torch.cat([trained, copy[others].float()])


def _take_copy(tensors: AdapterTensors, key: str, path: str, trained: torch.Tensor) -> None:
    """Take the same rows, which PEFT saves again for a module that is tied."""
    if key in tensors and not tensors.take(key).float().equal(trained):
        raise InvalidAdapterError(
            f"these rows differ from those of the embedding, which {path} is tied to",
            file=tensors.file_of(key),
            key=tensors.name(key),
            remedy="save the adapter again, on this base model",
        )


def _picked(indices: list[int], tokens: int) -> torch.Tensor:
    """One row for each index, with a one in its column."""
    import torch

    rows = torch.zeros(len(indices), tokens)
    rows[torch.arange(len(indices)), torch.tensor(indices)] = 1
    return rows
