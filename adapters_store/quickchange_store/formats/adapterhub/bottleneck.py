"""Reader of bottleneck adapters that AdapterHub's `adapters` 1.3 saved with safetensors.

Houlsby (double_seq_bn), Pfeiffer (seq_bn) and parallel (par_bn) adapters, for base models whose
layers are named as Llama's are. The bottleneck of an attention becomes an update of o_proj, that of
an MLP one of down_proj: both add to the sub-layer's output to the residual stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    CanonicalAdapter,
    LowRankUpdate,
    SubLayer,
)
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.adapterhub.adapterhub_config import (
    BottleneckSettings,
    parse_bottleneck,
)
from quickchange_store.formats.config_file import CONFIG_FILE, read_config
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.tensors import AdapterTensors
from quickchange_store.formats.weight_files import weight_files

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter.safetensors"
WRITER = "save_adapter(…, use_safetensors=True) of the adapters library"
_PLACES = {"attention": "attention_adapters", "mlp": "output_adapters"}
_BESIDE = {  # files beside an adapter that change the output
    "head_config.json": "a prediction head",
    "model_head.safetensors": "a prediction head",
    "pytorch_model_head.bin": "a prediction head",
    "adapter_fusion_config.json": "AdapterFusion",
    "embedding.pt": "an embedding of its own",
}


def read_adapterhub(directory: Path, base: BaseSpec) -> Imported:
    """Read the bottleneck adapter in `directory` for the base model `base`.

    Raises InvalidAdapterError, UnsupportedFeatureError and BaseMismatchError; the message names
    file, key and remedy.
    """
    settings, warnings = parse_bottleneck(read_config(directory), base)
    _refuse_beside(directory)
    places = _places(settings, base)
    tensors = AdapterTensors(*weight_files(directory, WEIGHTS_FILE, WRITER))
    updates = {
        path: _update(tensors, settings, base, path) for path in base.modules if path in places
    }
    if tensors.left:
        raise InvalidAdapterError(
            f"the tensor is not expected: nothing in {CONFIG_FILE} asks for it",
            file=WEIGHTS_FILE,
            key=min(tensors.left),
            remedy="save the adapter again; bottleneck adapters after attention and MLP are served",
        )
    adapter = CanonicalAdapter(
        base.architecture, settings.base_name, updates, dict(settings.origin)
    )
    return Imported(adapter, tuple(warnings))


def _refuse_beside(directory: Path) -> None:
    for file, what in _BESIDE.items():
        if (directory / file).exists():
            raise UnsupportedFeatureError(
                f"{what} beside the adapter is not supported",
                file=file,
                remedy="save the adapter alone (with_head=False), or remove the file if the model "
                "was trained without it",
            )


def _places(settings: BottleneckSettings, base: BaseSpec) -> dict[str, SubLayer]:
    """Modules that get an update. Raises where the base's structure leaves their input open."""
    places = {
        path: place
        for path, place in base.sublayers.items()
        if place.kind in settings.parts and place.layer not in settings.left_out
    }
    if not places:
        raise BaseMismatchError(
            f"the base model {base.architecture} has no layers with self_attn.o_proj and "
            "mlp.down_proj that this adapter asks for",
            file=CONFIG_FILE,
            key="config.leave_out" if base.sublayers else "model_type",
            remedy="use an adapter of this base model; bottleneck adapters are served for models "
            "that name their layers as Llama does",
        )
    for place in places.values():
        if settings.source == "stream" and not place.plain_stream:
            raise UnsupportedFeatureError(
                f"{base.architecture} has another norm between the sub-layer and the residual "
                "stream, which the bottleneck would have to read through",
                file=CONFIG_FILE,
                key="config.original_ln_before",
                remedy="train with original_ln_before=False (double_seq_bn), or with LoRA",
            )
        if settings.source == "residual" and place.norm is None:
            raise UnsupportedFeatureError(
                f"where the residual stream enters the sub-layers of {base.architecture} is not "
                "known",
                file=CONFIG_FILE,
                key="config.is_parallel",
                remedy="train a sequential bottleneck (double_seq_bn), or LoRA",
            )
    return places


def _update(
    tensors: AdapterTensors, settings: BottleneckSettings, base: BaseSpec, path: str
) -> LowRankUpdate:
    place, hidden = base.sublayers[path], base.modules[path].out_features
    width = settings.width(hidden, place.layer)
    prefix = _prefix(tensors, settings, place, path)
    down = tensors.take_shaped(f"{prefix}adapter_down.0.weight", path, (width, hidden))
    shift = tensors.take_shaped(f"{prefix}adapter_down.0.bias", path, (width,))
    up = tensors.take_shaped(f"{prefix}adapter_up.weight", path, (hidden, width))
    bias = tensors.take_shaped(f"{prefix}adapter_up.bias", path, (hidden,))
    scale = 1.0
    if settings.scaling == "channel":
        factors = tensors.take_shaped(f"{prefix}scaling", path, (hidden,)).float()
        up, bias = up.float() * factors[:, None], bias.float() * factors
    elif settings.scaling == "learned":
        scale = float(tensors.take_shaped(f"{prefix}scaling", path, (1,)))
    else:
        scale = settings.scaling
    return LowRankUpdate(
        down,
        up,
        scale,
        bias=_scaled(bias, scale),
        activation=settings.activation,
        source=settings.source,
        shift=shift,
    )


def _scaled(bias: torch.Tensor, scale: float) -> torch.Tensor:
    return bias if scale == 1.0 else bias.float() * scale


def _prefix(
    tensors: AdapterTensors, settings: BottleneckSettings, place: SubLayer, path: str
) -> str:
    """Prefix of the tensors' names: the model's own, or none where saved without its head."""
    layer = path.rpartition(".")[0].rpartition(".")[0]
    part = f"{_PLACES[place.kind]}.adapters.{settings.name}."
    whole, headless = f"{layer}.{part}", f"layers.{place.layer}.{part}"
    return headless if f"{headless}adapter_up.weight" in tensors else whole
