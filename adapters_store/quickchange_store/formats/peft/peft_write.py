"""Writer of a PEFT LoRA directory from the updates of a canonical adapter.

Only what PEFT's LoRA computes is written: A, B and a scale for each module, an aLoRA's invocation
and a classification head. Ranks and scales that differ between modules go into rank_pattern and
alpha_pattern, by whole module paths.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    CanonicalAdapter,
    LowRankUpdate,
    expert_path,
)
from quickchange_store.errors import BaseMismatchError, UnsupportedFeatureError
from quickchange_store.formats.config_file import BASE_NAME, CONFIG_FILE
from quickchange_store.formats.peft.classification_head import head_config, head_tensors
from quickchange_store.formats.peft.expert_lora import stacked, wrapper_name
from quickchange_store.formats.peft.invocation_tokens import TOKENS
from quickchange_store.formats.peft.peft_common import WEIGHTS_FILE
from quickchange_store.formats.peft.tensor_names import PREFIX
from quickchange_store.formats.tensors import copied, save_tensors


def check_peft(updates: Mapping[str, LowRankUpdate], base: BaseSpec) -> None:
    """Raise where PEFT's LoRA can't say an update, or the base lacks its module."""
    for module, update in updates.items():
        if module not in base.modules and base.expert(module) is None:
            raise BaseMismatchError(
                f"the base model {base.architecture} has no such module",
                key=module,
                remedy="give the base model that the adapter was made for (--model)",
            )
        extra = "a bias" if update.bias is not None else "rank 0" if not update.rank else None
        if not update.plain or extra is not None:
            what = extra or f"more than A, B and a scale ({_beyond(update)})"
            raise UnsupportedFeatureError(
                f"the update has {what}, which PEFT's LoRA can't say",
                key=module,
                remedy="keep the folder that the adapter was added from; plain LoRA is exported",
            )


def write_peft(adapter: CanonicalAdapter, directory: Path, base: BaseSpec) -> None:
    """Write the LoRA into `directory`, which exists, after `check_peft`."""
    updates, head = adapter.updates, adapter.classifier
    plain = {path: update for path, update in updates.items() if path in base.modules}
    experts = _of_parameters(updates, base)
    tensors = {}
    for name, update in experts.values():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = copied(update.a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = copied(update.b)
    for module, update in plain.items():
        embedding = base.modules[module].kind == "embedding"
        names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        for name, factor in zip(names, (update.a, update.b), strict=True):
            tensors[f"{PREFIX}{module}.lora_{name}"] = copied(factor)
    config = _config(plain, experts, base, adapter.base_name)
    if adapter.invocation is not None:
        config[TOKENS] = list(adapter.invocation.tokens)
    if head is not None:
        tensors |= head_tensors(head)
        config |= head_config(head)
    save_tensors(tensors, directory / WEIGHTS_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _of_parameters(
    updates: Mapping[str, LowRankUpdate], base: BaseSpec
) -> dict[str, tuple[str, LowRankUpdate]]:
    """Experts' updates by parameter: the name that PEFT's wrapper of it has, and all of them."""
    found: dict[str, dict[int, LowRankUpdate]] = {}
    for parameter in base.experts:
        for expert in range(base.experts[parameter].experts):
            if (path := expert_path(parameter, expert)) in updates:
                found.setdefault(parameter, {})[expert] = updates[path]
    return {
        parameter: (wrapper_name(parameter, found), stacked(own, base.experts[parameter]))
        for parameter, own in found.items()
    }


def _config(
    updates: Mapping[str, LowRankUpdate],
    experts: Mapping[str, tuple[str, LowRankUpdate]],
    base: BaseSpec,
    base_name: str,
) -> dict[str, Any]:
    ranks = {module: update.rank for module, update in updates.items()}
    ranks |= {
        parameter: update.rank // base.experts[parameter].experts
        for parameter, (_, update) in experts.items()
    }
    scales = {
        module: update.scale / base.modules[module].output_scale
        for module, update in updates.items()
    }
    scales |= {parameter: update.scale for parameter, (_, update) in experts.items()}
    alphas = {module: _alpha(scale, ranks[module]) for module, scale in scales.items()}
    routers = {path: f"{path}.weight" for path in updates if base.modules[path].kind == "router"}
    ranks = {routers.get(path, path): value for path, value in ranks.items()}
    alphas = {routers.get(path, path): value for path, value in alphas.items()}
    parameters = sorted([*experts, *routers.values()])
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        BASE_NAME: base_name,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": sorted(updates.keys() - routers.keys()),
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: _number(a) for m, a in alphas.items() if a != alpha},
    }
    return {**config, "target_parameters": parameters} if parameters else config


def _alpha(scale: float, rank: int) -> float:
    """The lora_alpha whose quotient by the rank is the scale, to the last bit where possible."""
    nearest = scale * rank
    beside = (nearest, math.nextafter(nearest, math.inf), math.nextafter(nearest, -math.inf))
    return next((alpha for alpha in beside if alpha / rank == scale), nearest)


def _number(value: float) -> int | float:
    """Whole numbers as PEFT writes them."""
    return int(value) if value.is_integer() else value


def _beyond(update: LowRankUpdate) -> str:
    parts = {
        f"activation {update.activation}": update.activation != "identity",
        f"reading the {update.source}": update.source != "input",
        "shift": update.shift is not None,
        "gain": update.gain is not None,
    }
    return ", ".join(part for part, there in parts.items() if there)
