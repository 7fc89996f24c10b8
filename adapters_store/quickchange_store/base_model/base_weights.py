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

import logging
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from quickchange_store.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SHOWN = 5
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_REMEDY = "give the folder that the model was saved to, whole and with its own config.json"


def load_base(model: str, **options: Any) -> PreTrainedModel:
    """The causal language model at a path (transformers' layout) or with a hub id.

    options: those of transformers' `from_pretrained`. Raises BaseModelError where a weight is
    missing, left over or of another shape, OSError or ValueError (transformers') where nothing can
    be loaded.
    """
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        model,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told here, all at once and by name
        trust_remote_code=False,
        **options,
    )
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
