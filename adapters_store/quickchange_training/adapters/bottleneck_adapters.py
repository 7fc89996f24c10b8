"""Bottlenecks around a model, and the files in which AdapterHub's `adapters` keeps them.

That library needs another transformers, so the forward is here, by hooks on the modules that end a
sub-layer: with y the sub-layer's output and r the residual stream that entered it,

    houlsby    y + up(act(down(y)))          attention and MLP
    pfeiffer   y + up(act(down(y + r)))      MLP
    parallel   y + 4 up(act(down(r)))        MLP

as `quickchange_store.formats.adapterhub` reads the configurations of those names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from quickchange_store.base_model.sublayers import sublayers
from quickchange_store.canonical.canonical_adapter import Source, SubLayer
from quickchange_training.adapters.adapter_recipes import BottleneckRecipe, Placement
from quickchange_training.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter.safetensors"
_NAME = "default"  # the adapter's, within its tensors' names
_VERSION = "adapters.1.3.0"  # the release whose layout is written
_PARTS = {"attention": "attention_adapters", "mlp": "output_adapters"}


@dataclass(frozen=True)
class _Form:
    """A placement in the library's terms. `reads` is what the bottleneck computes from."""

    reads: Source
    attention: bool
    scaling: float
    before: bool  # original_ln_before: y + r goes in


_FORMS: Mapping[Placement, _Form] = {
    "houlsby": _Form("output", attention=True, scaling=1.0, before=False),
    "pfeiffer": _Form("stream", attention=False, scaling=1.0, before=True),
    "parallel": _Form("residual", attention=False, scaling=4.0, before=False),
}


class _Bottleneck(nn.Module):
    """One bottleneck, float32 whatever its input is. It adds nothing before it is trained."""

    def __init__(self, hidden: int, width: int, activation: str, scaling: float) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width)
        self.act = ACT2FN[activation]
        self.up = nn.Linear(width, hidden)
        self.scaling = scaling
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What is added for x [..., hidden], in x's dtype."""
        added: torch.Tensor = self.scaling * self.up(self.act(self.down(x.float())))
        return added.to(x.dtype)


class BottleneckedModel(nn.Module):
    """`model`, frozen, with a bottleneck at each of its sub-layers that the placement names.

    Raises RecipeError where the model's structure has no such places.
    """

    def __init__(self, model: PreTrainedModel, recipe: BottleneckRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.base = model.requires_grad_(False)
        self._form = _FORMS[recipe.placement]
        self._entered: dict[str, torch.Tensor] = {}  # by norm: the residual stream, this forward
        hidden = model.get_input_embeddings().embedding_dim
        width = max(int(hidden // recipe.reduction_factor), 1)
        self._by_prefix: dict[str, _Bottleneck] = {}  # of its tensors' names in the file
        for path, place in _places(model, recipe.placement).items():
            bottleneck = _Bottleneck(hidden, width, recipe.activation, self._form.scaling)
            layer = path.rpartition(".")[0].rpartition(".")[0]
            self._by_prefix[f"{layer}.{_PARTS[place.kind]}.adapters.{_NAME}."] = bottleneck
            self._hook(path, place, bottleneck)
        self.bottlenecks = nn.ModuleList(self._by_prefix.values())

    def _hook(self, path: str, place: SubLayer, bottleneck: _Bottleneck) -> None:
        def entered(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            self._entered[path] = given[0]

        def ended(_: nn.Module, __: Any, y: torch.Tensor) -> torch.Tensor:
            x = y if self._form.reads == "output" else self._entered.pop(path)
            x = y + x if self._form.reads == "stream" else x
            return torch.add(y, bottleneck(x))

        if self._form.reads != "output" and place.norm is not None:
            self.base.get_submodule(place.norm).register_forward_pre_hook(entered)
        self.base.get_submodule(path).register_forward_hook(ended)

    def forward(self, **inputs: Any) -> Any:
        """The model's own output, with the bottlenecks in it."""
        return self.base(**inputs)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors by the names that the library saves them under."""
        return {
            f"{prefix}{name}.{tensor}": value
            for prefix, bottleneck in self._by_prefix.items()
            for name, linear in (("adapter_down.0", bottleneck.down), ("adapter_up", bottleneck.up))
            for tensor, value in linear.named_parameters()
        }

    def config(self, base_name: str) -> dict[str, Any]:
        """Content of adapter_config.json, in which the base is called `base_name`."""
        form = self._form
        return {
            "config": {
                "architecture": "bottleneck",
                "init_weights": "mam_adapter",  # up begins at zero
                "is_parallel": form.reads == "residual",
                "leave_out": [],
                "mh_adapter": form.attention,
                "non_linearity": self.recipe.activation,
                "original_ln_after": True,
                "original_ln_before": form.before,
                "output_adapter": True,
                "reduction_factor": self.recipe.reduction_factor,
                "residual_before_ln": True,
                "scaling": form.scaling,
            },
            "hidden_size": self.base.get_input_embeddings().embedding_dim,
            "model_class": type(self.base).__name__,
            "model_name": base_name,
            "model_type": self.base.config.model_type,
            "name": _NAME,
            "version": _VERSION,
        }


def _places(model: PreTrainedModel, placement: Placement) -> dict[str, SubLayer]:
    form = _FORMS[placement]
    places = {
        path: place
        for path, place in sublayers(model).items()
        if form.attention or place.kind == "mlp"
    }
    if not places:
        raise RecipeError(
            f"{type(model).__name__} has no layers with self_attn.o_proj and mlp.down_proj, where "
            "bottlenecks go; train a LoRA"
        )
    for place in places.values():
        plain = place.plain_stream if form.reads == "stream" else place.norm is not None
        if form.reads != "output" and not plain:
            raise RecipeError(
                f"--placement {placement}: where the residual stream passes the MLPs of "
                f"{type(model).__name__} is not known; give --placement houlsby"
            )
    return places
