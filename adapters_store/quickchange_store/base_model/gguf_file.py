"""Reads a base model from one GGUF file through transformers, which dequantises it.

transformers passes over tensors that its classes have no place for, and over the scaling of rotary
positions. Either would be served as if it were the model. So factors of rotary frequencies
(`rope_freqs.weight`: Llama 3.1 and later) are put in, and other such parts are refused.

Knows nothing of adapters or of serving.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.errors import BaseModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

ROPE_FACTORS = "rope_freqs.weight"
_NAMED = 5
_CONVERT = "convert the model to safetensors, and give that folder"
# Tensors that hold nothing a pass computes with: what a converter keeps for its own use.
_IGNORED = re.compile(r"(token_types|.*rotary_emb\.inv_freq|.*attn\.masked_bias)(\.weight)?")


@contextmanager
def gguf_errors(path: Path) -> Iterator[None]:
    """Errors of reading a damaged file, as BaseModelError."""
    try:
        yield
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        unknown = "not supported" in str(error)
        raise BaseModelError(
            f"{path.name!r} can't be read as GGUF ({error})",
            file=path.name,
            remedy=_CONVERT if unknown else "it may be cut short: fetch the file again",
        ) from error


def gguf_metadata(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The file's fields, arrays of text as their lengths, and its tensors' names.

    Raises BaseModelError.
    """
    from transformers.integrations.gguf import read_gguf_metadata

    with gguf_errors(path):
        fields, names = read_gguf_metadata(str(path))
    if int(fields.get("split.count", 1)) > 1:
        raise BaseModelError(
            f"{path.name!r} is one of {fields['split.count']} files of a model",
            file=path.name,
            key="split.count",
            remedy="join them (llama-gguf-split --merge) and give the one file",
        )
    return fields, names


@lru_cache(2)  # reading takes seconds: a loader and its model need the same
def gguf_config(path: Path, _changed: int) -> PretrainedConfig:
    """The configuration that transformers derives from a file. Raises BaseModelError."""
    from transformers import AutoConfig

    fields, _ = gguf_metadata(path)
    kind = fields["general.architecture"]
    with gguf_errors(path):
        config = AutoConfig.from_pretrained(
            str(path.parent), gguf_file=path.name, trust_remote_code=False
        )
    text = config.get_text_config()
    _check_scaling(path, fields, text)
    head = fields.get(f"{kind}.attention.key_length")
    if head is not None and hasattr(text, "head_dim") and kind != "gemma4":
        text.head_dim = head  # transformers leaves it out for some kinds
    return config


def _check_scaling(path: Path, fields: Mapping[str, Any], config: PretrainedConfig) -> None:
    kind = fields["general.architecture"]
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    found = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling != "none" and found == "default":
        raise BaseModelError(
            f"{path.name!r} scales its positions by {scaling!r}, which transformers does not read "
            "from GGUF",
            file=path.name,
            key=f"{kind}.rope.scaling.type",
            remedy=_CONVERT,
        )


class GGUFTensors:
    """A model's parameters in a GGUF file, each dequantised when asked for."""

    def __init__(self, path: Path, network: PreTrainedModel) -> None:
        self._path = path
        self._network = network

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        kind = gguf_metadata(self._path)[0]["general.architecture"]
        return TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=self._network.config.to_dict())

    @cached_property
    def _mapping(self) -> dict[str, str]:
        """Parameters by the names of tensors."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        with gguf_errors(self._path):
            return dict(get_gguf_hf_weights_map(self._network, self._processor))

    def check_all_placed(self) -> None:
        """Raise BaseModelError for tensors that the model has no place for."""
        from transformers.integrations.gguf.utils import is_gguf_arch_supported

        fields, names = gguf_metadata(self._path)
        if is_gguf_arch_supported(fields["general.architecture"]):
            return  # transformers itself tells what is left over
        left = [
            name
            for name in names
            if name not in self._mapping and name != ROPE_FACTORS and not _IGNORED.fullmatch(name)
        ]
        if left:
            shown = ", ".join(sorted(left)[:_NAMED])
            raise BaseModelError(
                f"{self._path.name!r} has tensors that transformers has no place for: {shown}"
                + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""),
                file=self._path.name,
                key=min(left),
                remedy=_CONVERT,
            )

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter `name`, in float32. Raises BaseModelError where no tensor holds it."""
        import torch
        from gguf import GGUFReader, dequantize

        tied = getattr(self._network, "all_tied_weights_keys", None) or {}
        wanted = {name, tied.get(name, name)}
        with gguf_errors(self._path):
            for tensor in GGUFReader(self._path).tensors:
                if self._mapping.get(tensor.name) in wanted:
                    made = self._processor.process(
                        weights=dequantize(tensor.data, tensor.tensor_type),
                        name=tensor.name,
                        tensor_key_mapping=self._mapping,
                        parsed_parameters={"tensors": {}},
                    )
                    return torch.from_numpy(made.weights.copy())
        raise BaseModelError(
            f"{self._path.name!r} lacks {name!r}, which this adapter's import needs",
            file=self._path.name,
            key=name,
            remedy=_CONVERT,
        )


def put_in_rope_factors(path: Path, model: nn.Module) -> None:
    """Divide the model's rotary frequencies by the file's factors. Raises BaseModelError."""
    import torch
    from gguf import GGUFReader, dequantize

    if ROPE_FACTORS not in gguf_metadata(path)[1]:
        return
    tensors = GGUFReader(path).tensors
    found = next(tensor for tensor in tensors if tensor.name == ROPE_FACTORS)
    factors = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
    buffers: Collection[torch.Tensor] = [
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and buffer.shape == factors.shape
    ]
    if not buffers:
        raise BaseModelError(
            f"{path.name!r} has factors for {len(factors)} rotary frequencies, and "
            f"{type(model).__name__} has no such frequencies",
            file=path.name,
            key=ROPE_FACTORS,
            remedy=_CONVERT,
        )
    for buffer in buffers:
        buffer.div_(factors.to(buffer))
