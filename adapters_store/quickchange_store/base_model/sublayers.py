"""Sub-layers and gated MLPs of a base model, which bottleneck and IA3 adapters depend on.

Read from a transformers model on any device, the meta device included. Knows nothing of adapters.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quickchange_store.canonical.canonical_adapter import SubLayer

if TYPE_CHECKING:
    import torch
    from torch import nn

_ENDS = re.compile(
    r"(?P<layer>(?:.*\.)?layers\.(?P<index>\d+))\.(?P<end>self_attn\.o_proj|mlp\.down_proj)"
)
# The norms of a layer whose stream is known: the name of the one before the MLP, by all of them.
_PLAIN = frozenset({"input_layernorm", "post_attention_layernorm"})
_SANDWICHED = _PLAIN | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_BEFORE_MLP = {_PLAIN: "post_attention_layernorm", _SANDWICHED: "pre_feedforward_layernorm"}
_TOLERANCE = 1e-9


def sublayers(network: nn.Module) -> dict[str, SubLayer]:
    """Modules that end a sub-layer, by path, in models that name their parts as Llama does.

    In most of them `post_attention_layernorm` is the norm before the MLP. Where there are norms
    around the MLP too (Gemma 2), it stands between the attention's output and the residual stream.
    A layer with any other set of norms has none that is known to be where the stream enters.
    """
    found = {}
    for path, _ in network.named_modules():
        match = _ENDS.fullmatch(path)
        if match is None:
            continue
        layer = network.get_submodule(match["layer"])
        norms = frozenset(name for name, _ in layer.named_children() if "norm" in name)
        attention = match["end"].startswith("self_attn")
        name = "input_layernorm" if attention else _BEFORE_MLP.get(norms)
        known = norms in _BEFORE_MLP
        found[path] = SubLayer(
            layer=int(match["index"]),
            kind="attention" if attention else "mlp",
            norm=f"{match['layer']}.{name}" if known else None,
            plain_stream=norms == _PLAIN,
        )
    return found


def producers(network: nn.Module) -> dict[str, str]:
    """Paths of down_proj -> up_proj, wherever an MLP is down(act(gate(x)) ⊙ up(x)).

    Found by what the MLP computes: with small weights in place of its own, scaling up_proj's output
    must give what scaling down_proj's input gives.
    """
    found = {}
    for path, module in network.named_modules():
        if _is_gated(module):
            prefix = f"{path}." if path else ""
            found[f"{prefix}down_proj"] = f"{prefix}up_proj"
    return found


def _is_gated(mlp: nn.Module) -> bool:
    import torch
    from torch.func import functional_call

    names = ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(getattr(mlp, name, None), torch.nn.Linear) for name in names):
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        if getattr(mlp, name).bias is not None:
            bias = torch.randn(shape[0], generator=generator, dtype=torch.float64)
            weights[f"{name}.bias"] = bias
    factors = torch.linspace(-1, 2, 6, dtype=torch.float64)
    scaled_up = {
        key: torch.einsum("o,o...->o...", factors, tensor) if key.startswith("up_") else tensor
        for key, tensor in weights.items()
    }
    scaled_down = {**weights, "down_proj.weight": weights["down_proj.weight"] * factors}
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    try:
        left, right = (functional_call(mlp, w, (x,)) for w in (scaled_up, scaled_down))
        return bool((left - right).abs().max() < _TOLERANCE)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError):
        return False  # it takes more than its input, or has other parts: not what it looks like
