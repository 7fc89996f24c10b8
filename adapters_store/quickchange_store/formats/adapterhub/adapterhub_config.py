"""`adapter_config.json` of AdapterHub's `adapters` library (1.3): bottleneck adapters.

With y a sub-layer's output, r the residual stream that entered it, and no norm between the two (as
in Llama), the library computes

    sequential   h = y, or y + r with original_ln_before
                 e + scaling · up(act(down(h))), with r added where original_ln_after is set;
                 e = y with residual_before_ln, else h
    parallel     y + scaling · up(act(down(r))), with r added where original_ln_after is set

So what the model adds up at the end holds r once, as without an adapter, or the configuration is
refused. Fields are honoured, harmless or refused by name. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quickchange_store.canonical.canonical_adapter import Activation, BaseSpec, Source
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError, UnsupportedFeatureError
from quickchange_store.formats.config_file import (
    CONFIG_FILE,
    flag,
    invalid,
    is_set,
    number,
    other_base,
    refuse_fields,
)

LEAST_REDUCTION = 1e-3  # a bottleneck a thousand times as wide as the model

HONOURED = frozenset(
    {
        "architecture",  # methods other than bottlenecks are refused
        "is_parallel",
        "leave_out",
        "mh_adapter",
        "non_linearity",
        "original_ln_after",
        "original_ln_before",
        "output_adapter",
        "reduction_factor",
        "residual_before_ln",
        "scaling",
    }
)
HARMLESS = frozenset(
    {
        "adapter_residual_before_ln",  # with ln_after only
        "dropout",  # training only
        "factorized_phm_W",  # all of these with phm_layer only
        "factorized_phm_rule",
        "hypercomplex_nonlinearity",
        "init_weights",
        "init_weights_seed",
        "inv_adapter_reduction_factor",  # with inv_adapter only
        "learn_phm",
        "phm_bias",
        "phm_c_init",
        "phm_dim",
        "phm_init_range",
        "phm_rank",
        "shared_W_phm",
        "shared_phm_rule",
        "stochastic_depth",  # training only
    }
)
REFUSED = frozenset(
    {"cross_adapter", "inv_adapter", "ln_after", "ln_before", "phm_layer", "use_gating"}
)
_REMEDIES = {
    "cross_adapter": "train without it: a causal language model has no cross attention",
    "inv_adapter": "train without it (inv_adapter=None)",
    "ln_after": "train without the adapter's own layer norm (ln_after=False)",
    "ln_before": "train without the adapter's own layer norm (ln_before=False)",
    "phm_layer": "train plain projections (phm_layer=False), not a Compacter",
    "use_gating": "train without the gate (use_gating=False)",
}
_TOP_LEVEL = frozenset(
    {
        "config",
        "config_id",
        "hidden_size",
        "label2id",
        "model_class",
        "model_name",
        "model_type",
        "name",
        "type",
        "version",
    }
)

# transformers' names, by which the library finds its functions.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "identity",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files without a version

Part = Literal["attention", "mlp"]


@dataclass(frozen=True)
class BottleneckSettings:
    """Fields of the configuration that decide the output."""

    name: str  # the adapter's name inside its tensors' names
    parts: frozenset[Part]  # sub-layers with a bottleneck
    left_out: frozenset[int]  # layers without bottlenecks
    reduction: Mapping[str, float]  # by layer, and "default"
    activation: Activation
    source: Source
    scaling: float | Literal["learned", "channel"]
    base_name: str
    origin: Mapping[str, Any]

    def width(self, hidden: int, layer: int) -> int:
        """The bottleneck's dimension in a layer. Raises InvalidAdapterError if none is given."""
        factor = self.reduction.get(str(layer), self.reduction.get("default"))
        if factor is None:
            remedy = f'give a factor for layer {layer}, or a "default"'
            raise invalid("config.reduction_factor", dict(self.reduction), remedy)
        return max(int(hidden // factor), 1)


def parse_bottleneck(
    whole: Mapping[str, Any], base: BaseSpec
) -> tuple[BottleneckSettings, list[str]]:
    """The settings, and warnings for the adapter's owner.

    Raises InvalidAdapterError, UnsupportedFeatureError and BaseMismatchError, naming the field.
    """
    refuse_fields(whole, known=_TOP_LEVEL, refused=(), remedies={})
    config = whole.get("config")
    if not isinstance(config, dict):
        remedy = "load it with the adapters library and save it again with save_adapter"
        raise invalid("config", config, remedy)
    _check_method(config)
    refuse_fields(
        config,
        known=HONOURED | HARMLESS,
        refused=REFUSED,
        remedies=_REMEDIES,
        prefix="config.",
    )
    _check_base(whole, base)
    settings = BottleneckSettings(
        name=_name(whole),
        parts=_parts(config),
        left_out=_left_out(config),
        reduction=_reduction(config),
        activation=_activation(config, versioned="version" in whole),
        source=_source(config),
        scaling=_scaling(config),
        base_name=str(whole.get("model_name") or ""),
        origin={
            "format": "adapterhub",
            "config": {key: value for key, value in config.items() if is_set(value)},
        },
    )
    return settings, other_base("model_name", whole.get("model_name"), base)


def _check_method(config: Mapping[str, Any]) -> None:
    method = config.get("architecture")
    if method not in (None, "bottleneck"):
        raise UnsupportedFeatureError(
            f"{method!r} of the adapters library is not supported",
            file=CONFIG_FILE,
            key="config.architecture",
            remedy="use a bottleneck adapter (seq_bn, double_seq_bn, par_bn), or PEFT for LoRA and "
            "IA3",
        )


def _check_base(whole: Mapping[str, Any], base: BaseSpec) -> None:
    kind = whole.get("model_type")
    if kind is not None and kind != base.model_type:
        raise BaseMismatchError(
            f"the adapter was made for a {kind!r} model, the base model is {base.model_type!r}",
            file=CONFIG_FILE,
            key="model_type",
            remedy="use an adapter of this base model",
        )


def _name(whole: Mapping[str, Any]) -> str:
    name = whole.get("name")
    if not isinstance(name, str) or not name:
        raise invalid("name", name, "give the name that the adapter's tensors have")
    return name


def _parts(config: Mapping[str, Any]) -> frozenset[Part]:
    parts: set[Part] = set()
    if _flag(config, "mh_adapter"):
        parts.add("attention")
    if _flag(config, "output_adapter"):
        parts.add("mlp")
    if not parts:
        raise InvalidAdapterError(
            "neither of them is set, so there is no adapter",
            file=CONFIG_FILE,
            key="config.mh_adapter, config.output_adapter",
            remedy="set one of them, as in training",
        )
    return frozenset(parts)


def _left_out(config: Mapping[str, Any]) -> frozenset[int]:
    layers = config.get("leave_out") or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise invalid("config.leave_out", layers, "list layers by number, from 0")
    return frozenset(layers)


def _reduction(config: Mapping[str, Any]) -> dict[str, float]:
    key, value = "config.reduction_factor", config.get("reduction_factor")
    given = value if isinstance(value, dict) else {"default": value}
    factors = {str(layer): number(key, factor) for layer, factor in given.items()}
    for layer, factor in factors.items():
        if factor < LEAST_REDUCTION:
            remedy = f"a reduction factor is at least {LEAST_REDUCTION:g}"
            raise invalid(f"{key}.{layer}", factor, remedy)
    return factors


def _activation(config: Mapping[str, Any], *, versioned: bool) -> Activation:
    name = config.get("non_linearity")
    if not isinstance(name, str):
        raise invalid("config.non_linearity", name, "name the activation function")
    name = name if versioned else _OLD_ACTIVATIONS.get(name, name)
    if name.lower() not in _ACTIVATIONS:
        raise UnsupportedFeatureError(
            f"{name!r} is not supported",
            file=CONFIG_FILE,
            key="config.non_linearity",
            remedy=f"train with one of {', '.join(sorted(_ACTIVATIONS))}",
        )
    return _ACTIVATIONS[name.lower()]


def _source(config: Mapping[str, Any]) -> Source:
    """The bottleneck's input. Refuses fields that would drop r from the sum or count it twice."""
    before, after = _flag(config, "original_ln_before"), _flag(config, "original_ln_after", True)
    if _flag(config, "is_parallel"):
        if not after:
            raise _wrong_residual("original_ln_after", "without", "original_ln_after=True")
        return "residual"
    if config.get("residual_before_ln") == "post_add":
        raise _wrong_residual("residual_before_ln", "not as 'post_add'", "residual_before_ln=True")
    holds = before and not _flag(config, "residual_before_ln", True)
    if holds and after:
        raise _wrong_residual("residual_before_ln", "twice", "residual_before_ln=True")
    if not holds and not after:
        raise _wrong_residual("original_ln_after", "without", "original_ln_after=True")
    return "stream" if before else "output"


def _wrong_residual(field: str, how: str, remedy: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"the residual stream goes on {how} what entered the sub-layer"
        if how == "without"
        else f"the residual stream counts what entered the sub-layer {how}",
        file=CONFIG_FILE,
        key=f"config.{field}",
        remedy=f"train with {remedy}, as seq_bn, double_seq_bn and par_bn do",
    )


def _scaling(config: Mapping[str, Any]) -> float | Literal["learned", "channel"]:
    value = config.get("scaling", 1.0)
    if value == "learned":
        return "learned"
    if value == "channel":
        return "channel"
    return number("config.scaling", value)


def _flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    if name not in config:
        return default
    return flag({f"config.{name}": config[name]}, f"config.{name}")
