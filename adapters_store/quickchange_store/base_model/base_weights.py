"""Loads a base model with every weight that it has, or not at all.

transformers fills parameters that a checkpoint lacks with random numbers and drops tensors that it
can't place, with a warning. Either would be served as if it were the model. So both are judged:

    missing      refused. Tied weights and what a class may compute itself are not missing
    mismatched   refused: a tensor of another shape than its parameter's
    unexpected   refused where the model computes without a part that the checkpoint holds for it:
                 a tensor of a module that has parameters (a bias, an adapter left unmerged), or one
                 that differs from a parameter in a layer's number alone (a config of fewer layers).
                 Others (a vision tower, a head for training) are warned of

Knows nothing of adapters or of serving.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quickchange_store.base_model.base_source import BaseSource, base_name, language_model
from quickchange_store.base_model.gguf_file import GGUFTensors, put_in_rope_factors
from quickchange_store.base_model.weight_reading import reading
from quickchange_store.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_SHOWN = 5
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_REMEDY = "give the folder that the model was saved to, whole and with its own config.json"


def load_base(model: str, **options: Any) -> PreTrainedModel:
    """The language model of a folder in transformers' layout, a hub id or a GGUF file.

    options: those of transformers' `from_pretrained`. Raises BaseModelError where a weight is
    missing, left over or of another shape, a file is damaged, or a library is missing that the
    checkpoint needs; ValueError where transformers has no language model of its type.
    """
    source = BaseSource.of(model)
    made, config = language_model(source.config())
    method = quantization_method(config)
    if method is not None:
        _make_floats(config, method)
    path = source.gguf_path
    if path is not None:
        import torch

        with torch.device("meta"):
            GGUFTensors(path, made(copy.deepcopy(config))).check_all_placed()
    # It warns of its rounding at every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        with reading(f"loading {base_name(model)}", cast=_casts(config, method, options)):
            loaded, info = made.from_pretrained(
                source.where,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told here, all at once and by name
                **source.options,
                **options,
            )
    except BaseModelError:
        raise
    except Exception as error:  # damaged files raise errors of many classes
        if method is not None and isinstance(error, ImportError | RuntimeError):
            raise _not_quantised_here(model, method, error) from error
        said = " ".join(str(error).split())
        raise BaseModelError(
            f"{model!r} can't be loaded ({type(error).__name__}: {said[:400]})", remedy=_REMEDY
        ) from error
    if path is not None:
        put_in_rope_factors(path, loaded)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    mismatched = {str(key[0]) for key in info["mismatched_keys"]}
    if mismatched:
        raise _refused(model, "weights of other shapes than its config.json says", mismatched)
    if missing:
        raise _refused(model, "no weights for some of its parameters", missing, unexpected)
    if left := left_out(unexpected, [name for name, _ in loaded.named_parameters()]):
        raise _refused(model, "weights that its config.json has no place for", left)
    if unexpected:
        logger.warning("%s: weights that the model doesn't use: %s", model, _named(unexpected))
    base: PreTrainedModel = loaded
    return base


def quantization_method(config: PretrainedConfig) -> str | None:
    """Name in config.json of the way in which weights are stored; None: as floats."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method", "bitsandbytes"))
    return None if method == "gguf" else method


def _casts(config: PretrainedConfig, method: str | None, options: Mapping[str, Any]) -> bool:
    """True where every weight gets another type, and so memory of its own, as it is read."""
    return method is None and options.get("dtype", config.dtype) != config.dtype


def _make_floats(config: PretrainedConfig, method: str) -> None:
    """Have compressed-tensors' weights made floats as they are read, where that changes nothing.

    transformers does so in the first pass anyway. A model that rounds its activations does that in
    its linears' own `forward`, which floats would leave out.
    """
    stored = config.quantization_config
    if method != "compressed-tensors" or not isinstance(stored, dict):
        return
    rounds = ("input_activations", "output_activations")
    groups = (stored.get("config_groups") or {}).values()
    stored["dequantize"] = not any(group.get(each) for group in groups for each in rounds)


def _not_quantised_here(model: str, method: str, error: Exception) -> BaseModelError:
    return BaseModelError(
        f"{model!r} is stored quantised by {method!r}, which can't be loaded here: {error}",
        file="config.json",
        key="quantization_config",
        remedy="install its library (pip install 'quickchange[quantized]' brings "
        "compressed-tensors, torchao and bitsandbytes), serve on a device that it supports, or "
        "give the model as it was before quantisation",
    )


def left_out(unexpected: Iterable[str], parameters: Collection[str]) -> list[str]:
    """Those of a checkpoint's unexpected tensors that belong to what the model computes."""
    known = {_NUMBER.sub("N", name) for name in parameters}
    owners = {name.rpartition(".")[0] for name in known}
    return sorted(
        key
        for key in unexpected
        if (general := _NUMBER.sub("N", key)) in known or owners.intersection(_ancestors(general))
    )


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _refused(
    model: str, what: str, names: Collection[str], others: Collection[str] = ()
) -> BaseModelError:
    beside = f", while it has others that fit nowhere: {_named(others)}" if others else ""
    return BaseModelError(
        f"{model!r} has {what}: {_named(names)}{beside}",
        key=min(names),
        remedy=_REMEDY,
    )


def _named(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
