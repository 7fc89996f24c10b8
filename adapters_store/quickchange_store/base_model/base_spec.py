"""Module shapes of a base model, read from its configuration without its weights.

The model is instantiated on the meta device, so a model of any size takes a second and no memory.
Knows nothing of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.base_model.base_source import BaseSource, language_model, text_modules
from quickchange_store.base_model.base_tokenizer import CheckpointTokenizer
from quickchange_store.base_model.base_weights import quantization_method
from quickchange_store.base_model.expert_parts import (
    ConvertedExperts,
    expert_parts,
    routed,
    routers,
)
from quickchange_store.base_model.gguf_file import GGUFTensors
from quickchange_store.base_model.norms import norms
from quickchange_store.base_model.sublayers import producers, sublayers
from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    BaseTokenizer,
    BaseWeights,
    ModuleShape,
)
from quickchange_store.errors import BaseModelError

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def base_spec(model: str | Path, name: str | None = None) -> BaseSpec:
    """The spec of the model at a path (transformers' layout) or with a hub id.

    Its modules are every `nn.Linear` and `Conv1D` (GPT-2's, a linear of a transposed weight), the
    LM head included where it is tied to the embedding, the input embedding, routers, and norms;
    linears of single experts, which no adapter can update, are left out. `name` stands for the base
    in messages; default: `model`. Takes seconds for a large model: keep the result. Raises
    BaseModelError.
    """
    import torch

    source = BaseSource.of(model)
    try:
        made, config = language_model(source.config())
        with torch.device("meta"):
            network = made(config)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"{str(model)!r} is not a causal language model that transformers can read ({error})",
            file="config.json",
            remedy="give a folder in transformers' layout, a GGUF file, or the id of a model in "
            "the hub's cache",
        ) from error
    weights: BaseWeights
    if source.gguf_path is None:
        weights = CheckpointWeights(source.where, _Names.of(network), quantization_method(config))
    else:
        weights = GGUFTensors(source.gguf_path, network)
    return spec_of(network, str(name or model), weights, CheckpointTokenizer(source))


def spec_of(
    network: Any,
    name: str,
    weights: BaseWeights | None = None,
    tokenizer: BaseTokenizer | None = None,
) -> BaseSpec:
    """The spec of a transformers model that exists already, on any device."""
    import torch
    from transformers.pytorch_utils import Conv1D

    embedding = network.get_input_embeddings()
    head = network.get_output_embeddings()
    modules = {}
    output_head = None
    text = text_modules(network)
    for path, module in network.named_modules():
        if module not in text:
            continue  # what an image passes through
        if isinstance(module, torch.nn.Linear):
            if routed(path, module):
                continue
            modules[path] = ModuleShape(
                "linear", module.in_features, module.out_features, bias=module.bias is not None
            )
            output_head = path if module is head else output_head
        elif isinstance(module, Conv1D):
            modules[path] = ModuleShape("linear", module.nx, module.nf, bias=True, transposed=True)
        elif module is embedding and isinstance(module, torch.nn.Embedding):
            modules[path] = ModuleShape(
                "embedding",
                module.num_embeddings,
                module.embedding_dim,
                # Gemma 3 and others: the module multiplies its output, and so does PEFT its update.
                output_scale=float(getattr(module, "scalar_embed_scale", 1.0)),
            )
    for path, weight in routers(network).items():
        biased = getattr(network.get_submodule(path), "bias", None) is not None
        modules[path] = ModuleShape("router", weight.shape[1], weight.shape[0], bias=biased)
    of_text = {path for path, module in network.named_modules() if module in text}
    modules |= {path: shape for path, shape in norms(network).items() if path in of_text}
    experts = expert_parts(network)
    return BaseSpec(
        architecture=type(network).__name__,
        name=name,
        modules=modules,
        model_type=str(network.config.model_type),
        output_head=output_head,
        producers=producers(network),
        tied=_tied(network, modules),
        sublayers=sublayers(network),
        weights=weights,
        tokenizer=tokenizer,
        experts=experts,
        expert_modules=ConvertedExperts.of(network, experts),
        head_dim=_head_dim(network),
    )


def _head_dim(network: Any) -> int | None:
    """The width of every head of attention; None where they differ or no module says it."""
    found = {getattr(module, "head_dim", None) for module in text_modules(network)}
    widths = {width for width in found if type(width) is int}
    return widths.pop() if len(widths) == 1 else None


def _tied(network: Any, modules: Mapping[str, ModuleShape]) -> dict[str, str]:
    """Modules whose weight is another's, and whose."""
    keys = dict(getattr(network, "all_tied_weights_keys", None) or {})
    named = {str(key).removesuffix(".weight"): str(keys[key]) for key in keys}
    pairs = {target: source.removesuffix(".weight") for target, source in named.items()}
    return {each: pairs[each] for each in pairs if {each, pairs[each]} <= modules.keys()}


@dataclass(frozen=True)
class _Names:
    """Parameter names in a checkpoint, by transformers' own rules for loading."""

    tied: Mapping[str, str]  # parameter that may be absent -> the one that it equals
    transposed: frozenset[str]  # weights of Conv1D, [in, out]
    parameters: Mapping[str, str]  # every parameter's name, twice
    prefix: str  # path of the part without a head; some checkpoints leave it out
    renamings: Sequence[Any]
    converters: Sequence[Any]

    @classmethod
    def of(cls, network: Any) -> _Names:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
        from transformers.pytorch_utils import Conv1D

        tied = getattr(network, "all_tied_weights_keys", None) or {}
        transforms = get_model_conversion_mapping(network)
        return cls(
            tied={str(target): str(source) for target, source in dict(tied).items()},
            transposed=frozenset(
                f"{path}.weight" for path, m in network.named_modules() if isinstance(m, Conv1D)
            ),
            parameters={name: name for name in network.state_dict()},
            prefix=network.base_model_prefix,
            renamings=[t for t in transforms if isinstance(t, WeightRenaming)],
            converters=[t for t in transforms if not isinstance(t, WeightRenaming)],
        )

    def parameter(self, key: str) -> str | None:
        """The parameter that a checkpoint's tensor holds; None where loading converts it."""
        from transformers.core_model_loading import rename_source_key

        name, converted = rename_source_key(
            key, self.renamings, self.converters, self.prefix, self.parameters
        )
        return None if converted else str(name)


class CheckpointWeights:
    """Parameters from a safetensors checkpoint, each read when asked for."""

    def __init__(self, model: str, names: _Names, quantized_by: str | None = None) -> None:
        self._model = model
        self._names = names
        self._method = quantized_by

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter `name`, or the one it is tied to; a linear's weight is [out, in].

        Raises BaseModelError.
        """
        for candidate in (name, self._names.tied.get(name)):
            self._refuse_codes(candidate)
            if candidate in self._keys:
                key, file = self._keys[candidate]
                tensor = _read(file, key)
                return tensor.t().contiguous() if name in self._names.transposed else tensor
        raise BaseModelError(
            f"the base model's weights lack {name!r}, which this adapter's import needs",
            file=WEIGHTS,
            key=name,
            remedy="give the base as safetensors that transformers loads without conversion",
        )

    def _refuse_codes(self, name: str | None) -> None:
        """Refuse a parameter that the checkpoint holds as codes, whatever they are stored as."""
        if self._method is None or name is None:
            return
        module = name.rpartition(".")[0]
        plain = {f"{module}.weight", f"{module}.bias"}
        beside = {key for key in map(str, self._keys) if key.startswith(f"{module}.")} - plain
        if beside:
            raise BaseModelError(
                f"the base model's {name!r}, which this adapter's import needs, is stored "
                f"quantised by {self._method!r}",
                file=WEIGHTS,
                key=min(beside),
                remedy="add the adapter with the base as it was before quantisation (--model)",
            )

    @cached_property
    def _keys(self) -> dict[str | None, tuple[str, Path]]:
        """Key and file of each parameter in the checkpoint, looked up once."""
        return {self._names.parameter(key): (key, file) for key, file in self._files().items()}

    def _files(self) -> dict[str, Path]:
        """Every tensor's key, and the file that holds it."""
        single = self._find(WEIGHTS)
        if single is not None:
            return dict.fromkeys(_keys(single), single)
        index = self._find(WEIGHTS_INDEX)
        if index is None:
            raise BaseModelError(
                f"{self._model!r} has no safetensors weights, which this adapter's import needs",
                file=WEIGHTS,
                remedy="save the base with save_pretrained, which writes safetensors",
            )
        return {key: index.parent / shard for key, shard in _shards(index).items()}

    def _find(self, file: str) -> Path | None:
        from transformers.utils.hub import cached_file

        folder = Path(self._model)
        if folder.is_dir():
            return folder / file if (folder / file).is_file() else None
        found = cached_file(
            self._model,
            file,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)


def _keys(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, None, error) from error


def _shards(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {str(key): str(shard) for key, shard in weight_map.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(index, "weight_map", error) from error


def _read(path: Path, key: str) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, key, error) from error
    return tensor


def _unreadable(path: Path, key: str | None, error: Exception) -> BaseModelError:
    return BaseModelError(
        f"the base model's file can't be read ({error})",
        file=path.name,
        key=key,
        remedy="fetch the base model again",
    )
