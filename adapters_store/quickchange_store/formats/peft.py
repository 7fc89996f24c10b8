"""PEFT LoRA directories: `adapter_config.json` and `adapter_model.safetensors`.

Every targeted module must have its tensors and every tensor must be understood: an adapter is read
completely or refused by name. Pickled weights are never opened.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from quickchange_store.canonical import DTYPES, BaseSpec, CanonicalAdapter, LowRankUpdate
from quickchange_store.errors import (
    BaseMismatchError,
    BaseModelError,
    InvalidAdapterError,
    UnsupportedFeatureError,
)
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.peft_config import (
    CONFIG_FILE,
    LoraSettings,
    parse_config,
    read_config,
)

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_peft(directory: Path, base: BaseSpec) -> Imported:
    """Read the LoRA adapter in `directory` for the base model `base`.

    The base's own weights are opened only for adapters that hold copies of them: trained biases
    (stored as the difference) and embeddings. Raises InvalidAdapterError, UnsupportedFeatureError,
    BaseMismatchError and BaseModelError; the message names file, key and remedy.
    """
    config = read_config(directory)
    settings, warnings = parse_config(config, base)
    tensors = _Tensors(_weights_file(directory))
    _refuse_dora(tensors)
    updates = {}
    for module in base.modules:  # the base's order, not the file's
        update = _module_update(tensors, settings, base, module)
        if update is not None:
            updates[module] = update
    _check_copies(tensors, base)
    _refuse_leftovers(tensors, settings, base)
    adapter = CanonicalAdapter(
        base.architecture, settings.base_name, updates, dict(settings.source)
    )
    return Imported(adapter, tuple(warnings))


def _weights_file(directory: Path) -> Path:
    path = directory / WEIGHTS_FILE
    if path.is_file():
        return path
    others = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    for name in others:
        if name.endswith(PICKLES):
            raise UnsupportedFeatureError(
                "a pickle can run any code when it is opened, and is not read",
                file=name,
                remedy=f"convert it where you trust it: python -c {shlex.quote(_conversion(name))}",
            )
    sharded = [name for name in others if "adapter_model" in name]
    if sharded:
        raise UnsupportedFeatureError(
            "an adapter in several weight files is not supported",
            file=", ".join(sharded),
            remedy=f"save it as one {WEIGHTS_FILE}",
        )
    raise InvalidAdapterError(
        "the file is missing",
        file=WEIGHTS_FILE,
        remedy="give the folder that PEFT's save_pretrained wrote",
    )


def _conversion(name: str) -> str:
    return (
        "import torch; from safetensors.torch import save_file; "
        f"save_file(torch.load({name!r}, weights_only=True, map_location='cpu'), {WEIGHTS_FILE!r})"
    )


class _Tensors:
    """The tensors of the file, and which of them nothing has asked for yet."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                self._content: dict[str, torch.Tensor] = {
                    str(key): file.get_tensor(key)
                    for key in file.keys()  # noqa: SIM118
                }
        except (SafetensorError, OSError) as error:
            raise InvalidAdapterError(
                f"not a safetensors file ({error})",
                file=WEIGHTS_FILE,
                remedy="copy or save it again",
            ) from error
        self.left = set(self._content)

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def take(self, key: str) -> torch.Tensor:
        """The tensor, checked for its dtype and for finite values."""
        if key not in self._content:
            raise InvalidAdapterError(
                f"the tensor is missing, while {CONFIG_FILE} asks for it",
                file=WEIGHTS_FILE,
                key=key,
                remedy="save the adapter again, with all its tensors",
            )
        tensor = self._content[key]
        if str(tensor.dtype) not in DTYPES:
            raise UnsupportedFeatureError(
                f"dtype {tensor.dtype} is not supported",
                file=WEIGHTS_FILE,
                key=key,
                remedy="save it as float32, bfloat16 or float16",
            )
        if not bool(tensor.isfinite().all()):
            raise InvalidAdapterError(
                "it holds NaN or infinite values",
                file=WEIGHTS_FILE,
                key=key,
                remedy="train again, or take an earlier checkpoint",
            )
        self.left.discard(key)
        return tensor

    def take_shaped(self, key: str, module: str, expected: tuple[int, ...]) -> torch.Tensor:
        """`take`, and the shape must be the one that the base's module asks for."""
        tensor = self.take(key)
        if tuple(tensor.shape) != expected:
            raise BaseMismatchError(
                f"shape {list(tensor.shape)}, while {module} of the base model asks for "
                f"{list(expected)}",
                file=WEIGHTS_FILE,
                key=key,
                remedy="use an adapter of this base model",
            )
        return tensor


def _module_update(
    tensors: _Tensors, settings: LoraSettings, base: BaseSpec, module: str
) -> LowRankUpdate | None:
    """The update of one module of the base, None where the adapter leaves it alone."""
    import torch

    change = _base_bias_change(tensors, settings, base, module)
    if module not in settings.targets:
        if change is None:
            return None
        shape = base.modules[module]
        a, b = torch.zeros(0, shape.in_features), torch.zeros(shape.out_features, 0)
        return LowRankUpdate(a, b, 1.0, change)
    a, b = _factors(tensors, settings, base, module)
    scale = settings.scale(module)
    if settings.lora_bias and base.modules[module].kind == "linear":
        out = (base.modules[module].out_features,)
        own = tensors.take_shaped(f"{PREFIX}{module}.lora_B.bias", module, out).float() * scale
        change = own if change is None else own + change
    return LowRankUpdate(a, b, scale * base.modules[module].output_scale, change)


def _factors(
    tensors: _Tensors, settings: LoraSettings, base: BaseSpec, module: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of a targeted module."""
    shape = base.modules[module]
    names = ("lora_A.weight", "lora_B.weight")
    if shape.kind == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    keys = tuple(f"{PREFIX}{module}.{name}" for name in names)
    a, b = (tensors.take(key) for key in keys)
    rank = settings.rank(module)
    found = {a.shape[0], b.shape[-1]} if a.ndim == b.ndim == 2 else set()
    if found and found != {rank}:
        raise InvalidAdapterError(
            f"A {list(a.shape)} and B {list(b.shape)} are not of rank {rank}, which {CONFIG_FILE} "
            "gives to this module",
            file=WEIGHTS_FILE,
            key=keys[0],
            remedy="correct r or rank_pattern, or save the adapter again",
        )
    return (
        tensors.take_shaped(keys[0], module, (rank, shape.in_features)),
        tensors.take_shaped(keys[1], module, (shape.out_features, rank)),
    )


def _base_bias_change(
    tensors: _Tensors, settings: LoraSettings, base: BaseSpec, module: str
) -> torch.Tensor | None:
    """[out] float32: trained minus original bias of the base's module; None without a change."""
    targeted = module in settings.targets
    if settings.bias == "none" or not (targeted or settings.bias == "all"):
        return None
    if not base.modules[module].bias:
        return None
    key = f"{PREFIX}{module}.base_layer.bias"
    if not targeted or (key not in tensors and f"{PREFIX}{module}.bias" in tensors):
        key = f"{PREFIX}{module}.bias"  # also the name under which older versions of PEFT saved it
    trained = tensors.take_shaped(key, module, (base.modules[module].out_features,))
    change = trained.float() - _base_tensor(base, f"{module}.bias", key).float()
    return change if bool(change.any()) else None


def _check_copies(tensors: _Tensors, base: BaseSpec) -> None:
    """Accept copies of the base's own parameters where nothing in them has changed.

    PEFT saves the embedding beside its LoRA, and with bias="all" every bias of the model.
    """
    copies = [key for key in sorted(tensors.left) if _is_base_parameter(key)]
    for key in copies:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name.rpartition(".")[0] not in base.modules and not name.endswith(".bias"):
            continue  # a module that the base lacks: reported with the leftovers
        saved = tensors.take(key)
        original = _base_tensor(base, name, key)
        if saved.shape != original.shape or not bool((original.to(saved.dtype) == saved).all()):
            raise UnsupportedFeatureError(
                f"it replaces the base model's own {name}, shape {list(original.shape)}, by other "
                f"values, shape {list(saved.shape)}",
                file=WEIGHTS_FILE,
                key=key,
                remedy="train the module with LoRA; a resized vocabulary, fully trained modules "
                "and biases outside of linear modules are not supported",
            )


def _is_base_parameter(key: str) -> bool:
    return key.startswith(PREFIX) and key.endswith((".weight", ".bias")) and ".lora_" not in key


def _base_tensor(base: BaseSpec, name: str, key: str) -> torch.Tensor:
    if base.weights is None:
        raise BaseModelError(
            f"the tensor must be compared with the base model's {name}, whose weights aren't at "
            "hand",
            file=WEIGHTS_FILE,
            key=key,
            remedy="add the adapter where the base model's safetensors weights are",
        )
    return base.weights.tensor(name)


def _refuse_dora(tensors: _Tensors) -> None:
    for key in sorted(tensors.left):
        if "lora_magnitude_vector" in key:
            raise UnsupportedFeatureError(
                "DoRA is not supported",
                file=WEIGHTS_FILE,
                key=key,
                remedy="train without DoRA, or merge it into the base",
            )


def _refuse_leftovers(tensors: _Tensors, settings: LoraSettings, base: BaseSpec) -> None:
    if not tensors.left:
        return
    key = min(tensors.left)
    more = f" ({len(tensors.left) - 1} more like it)" if len(tensors.left) > 1 else ""
    module, _, part = key.removeprefix(PREFIX).partition(".lora_")
    if key.startswith(PREFIX) and part and module not in base.modules:
        raise BaseMismatchError(
            f"the base model {base.architecture} has no linear or input embedding module "
            f"{module!r}{more}",
            file=WEIGHTS_FILE,
            key=key,
            remedy="use an adapter of this base model; linear and input embedding modules are "
            "served",
        )
    reason = "nothing in adapter_config.json asks for it"
    if part and module not in settings.targets:
        reason = f"target_modules does not cover {module}"
    raise InvalidAdapterError(
        f"the tensor is not expected: {reason}{more}",
        file=WEIGHTS_FILE,
        key=key,
        remedy=f"save the adapter again, so that {CONFIG_FILE} and its tensors agree",
    )
