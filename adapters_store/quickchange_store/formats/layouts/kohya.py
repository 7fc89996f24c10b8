"""LoRA in the names of Kohya's scripts and of those who follow them.

`lora_te_model_layers_0_self_attn_q_proj.lora_down.weight`, `.lora_up.weight` and `.alpha`: the
module's path with underscores behind a prefix, or with dots; A, B and a scalar of the file in place
of a configuration: scale = alpha / rank, and 1 without one. DoRA's magnitude is `dora_scale`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_store.canonical.canonical_adapter import BaseSpec
from quickchange_store.errors import InvalidAdapterError
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.imported import Imported
from quickchange_store.formats.layouts.own_layout import MAGNITUDE, A, B, Config, OpenedLayout
from quickchange_store.formats.peft.tensor_names import LEADING, PREFIX, TensorNames
from quickchange_store.formats.tensors import Named

if TYPE_CHECKING:
    import torch

_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_down|lora\.down|lora_linear_layer\.down)\.weight"
    r"|(?P<up>lora_up|lora\.up|lora_linear_layer\.up)\.weight"
    r"|(?P<peft>lora_A|lora_B)(?:\.default)?\.weight|(?P<alpha>alpha)|(?P<dora>dora_scale))"
)
_PREFIX = re.compile(r"(?:lora|lycoris)_(?:(?:te\d?|llm|unet|prior_unet|transformer)_)?")
_ALPHA = "lora_alpha"  # behind a module's path: no tensor of PEFT's has this name


def knows(key: str) -> bool:
    """True if `key`, without wrappers' parts, is a name of this layout."""
    found = _KEY.fullmatch(key)
    return found is not None and found["peft"] is None


def read(
    directory: Path,  # noqa: ARG001 - what every layout takes
    files: Sequence[Path],
    config: Config,
    base: BaseSpec,
    names: TensorNames,
) -> Imported:
    """The adapter in `files`. Raises StoreError."""
    flat = _underscored(names)

    def parts(key: str, tensor: torch.Tensor, _file: str) -> Named | None:
        found = _KEY.fullmatch(key)
        path = None if found is None else names.path(found["module"])
        if found is not None and path is None:
            path = _flat_path(found["module"], flat)
        if found is None or path is None or base.modules[path].kind in ("embedding", "norm"):
            return None
        if found["alpha"]:
            return [(f"{PREFIX}{path}.{_ALPHA}", tensor)]
        if found["dora"]:
            return [(f"{PREFIX}{path}.{MAGNITUDE}", tensor.flatten())]
        part = A if found["down"] or found["peft"] == "lora_A" else B
        if tensor.ndim == 4 and tensor.shape[2:].numel() == 1:  # of a convolution of 1 x 1
            tensor = tensor.flatten(1)
        return [(f"{PREFIX}{path}.{part}", tensor)]

    opened = OpenedLayout.of("kohya", files, base, names, parts)
    targets = opened.targets
    dora = any(key.endswith(MAGNITUDE) for key in opened.tensors.left)
    ranks = {path: _rank(opened, path) for path in targets}
    alphas = {path: _alpha(opened, path, ranks[path]) for path in targets}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], max(alphas.values())
    given = config.get("lora_alpha", alpha)
    if given != alpha or config.get("use_rslora"):
        raise InvalidAdapterError(
            f"it says {given!r}, and the tensors' own alphas say {alpha:g} over their rank",
            file=CONFIG_FILE,
            key="lora_alpha",
            remedy=f"remove {CONFIG_FILE}, or convert the tensors to PEFT's format",
        )
    peft: dict[str, Any] = {
        "peft_type": "LORA",
        **config,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "rank_pattern": {path: each for path, each in ranks.items() if each != rank},
        "alpha_pattern": {path: each for path, each in alphas.items() if each != alpha},
        "use_dora": dora,
    }
    return opened.read(peft)


def _underscored(names: TensorNames) -> dict[str, str]:
    """Paths of the base by their names with underscores; those that two modules share left out."""
    known: dict[str, set[str]] = {}
    for text, path in names.spellings.items():
        known.setdefault(text.replace(".", "_"), set()).add(path)
    return {flat: next(iter(paths)) for flat, paths in known.items() if len(paths) == 1}


def _flat_path(text: str, flat: dict[str, str]) -> str | None:
    """The path of the module that is called `text`, with a prefix and underscores."""
    rest = _PREFIX.sub("", text, count=1)
    while rest not in flat:
        leading = next((part for part in LEADING if rest.startswith(f"{part}_")), None)
        if leading is None:
            return None
        rest = rest.removeprefix(f"{leading}_")
    return flat[rest]


def _rank(opened: OpenedLayout, path: str) -> int:
    """The rank of a module by its A. Raises InvalidAdapterError where there is none."""
    a = opened.tensors.take(f"{PREFIX}{path}.{A}")
    return int(a.shape[0])


def _alpha(opened: OpenedLayout, path: str, rank: int) -> float:
    key = f"{PREFIX}{path}.{_ALPHA}"
    return opened.tensors.take_number(key) if key in opened.tensors else float(rank)
