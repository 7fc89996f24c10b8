"""Plan by which transformers cuts a model, checked before a weight is read.

transformers has a plan for each type of model: which linears are cut by columns (outputs) and which
by rows (inputs). Embeddings and the LM head stay whole on every rank: drafting heads use them
between steps, on the first rank alone. What can't be cut in equal parts is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

from quickchange_server.errors import UnsupportedModelError
from quickchange_store.base_model.base_source import BaseSource, language_model
from quickchange_store.base_model.base_weights import quantization_method

SETTING = "tensor_parallel"
_WHOLE = "replicate"
COLUMNS = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
GATHERED = COLUMNS - {"colwise"}
ROWS = frozenset({"rowwise", "rowwise_split_input", "rowwise_rep"})
SPLIT = ROWS - {"rowwise"}  # their input is whole on every rank
SUMMED = frozenset({"moe_tp_experts", "all_reduce"})  # modules whose outputs are partial sums
# Cut parameters only, or change nothing without gradients.
_PASSIVE = frozenset(
    {
        _WHOLE,
        "replicated_with_grad_allreduce",
        "mla_kv_a_proj",
        "local_params",
        "packed_colwise",
        "packed_rowwise",
    }
)
_KNOWN = COLUMNS | ROWS | SUMMED | _PASSIVE


def style_of(path: str, plan: Mapping[str, str]) -> str | None:
    """The plan's style for a module or a parameter; None if it says nothing of it."""
    return plan.get(replace_layer_number_by_wildcard(path))


def whole_ends(path: str, ranks: int) -> dict[str, str]:
    """Changes to transformers' plan for the model at `path`: its embeddings and head stay whole.

    Raises UnsupportedModelError, naming what can't be cut, where `ranks` can't share the model.
    """
    source = BaseSource.of(path)
    made, config = language_model(source.config())
    if source.gguf_file is not None:
        raise _refused("a GGUF file is read whole", "give the model in transformers' layout")
    if (method := quantization_method(config)) is not None:
        raise _refused(
            f"weights stored quantised ({method}) can't be cut",
            "give the model as it was before quantisation",
        )
    with torch.device("meta"):
        model: PreTrainedModel = made(copy.deepcopy(config))
    plan = dict(model.tp_plan or {})
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    whole = dict.fromkeys(paths, _WHOLE)
    cut = {name: style for name, style in plan.items() if name not in whole}
    whole |= {name: _WHOLE for name, style in cut.items() if style.startswith("embedding")}
    cut = {name: style for name, style in cut.items() if name not in whole}
    if not COLUMNS.union(ROWS, SUMMED).intersection(cut.values()):
        raise _refused(f"transformers has no plan to cut {made.__name__}", "serve it on one")
    if unknown := set(cut.values()) - _KNOWN:
        raise _refused(
            f"transformers cuts {made.__name__} in ways that are not served: "
            f"{', '.join(sorted(unknown))}",
            "serve it on one",
        )
    for name, module in model.named_modules():
        style = style_of(name, cut)
        if style is not None:
            _check_module(model, name, module, style, ranks)
    for name, parameter in model.named_parameters():
        style = style_of(name, cut)
        if style is not None:
            _check_parameter(name, parameter, style, ranks)
    return whole


def _check_module(model: nn.Module, path: str, module: nn.Module, style: str, ranks: int) -> None:
    """Raise UnsupportedModelError if a module's features or heads can't be cut in equal parts."""
    if style in SUMMED and getattr(module, "has_post_expert_norm", False):
        raise _refused(f"{path} norms each expert's whole output", "serve it on one")
    if style not in COLUMNS | ROWS:
        return
    if not isinstance(module, nn.Linear):
        raise _refused(f"{path} is no plain linear", "serve it on one")
    _divides(path, module.out_features if style in COLUMNS else module.in_features, ranks)
    if style != "colwise":
        return
    parent = model.get_submodule(path.rpartition(".")[0])
    size = getattr(parent, "head_dim", None)
    if path.endswith("v_proj"):
        size = getattr(parent, "v_head_dim", size)
    if type(size) is int and path.endswith(("q_proj", "k_proj", "v_proj")):
        what = "heads" if path.endswith("q_proj") else "heads of keys and values"
        _divides(f"{path}'s {what}", module.out_features // size, ranks)
    elif "attn" in path or "attention" in path:
        heads = model.config.get_text_config().num_attention_heads  # type: ignore[union-attr, operator]
        _divides(f"{path}'s heads", heads, ranks)


def _check_parameter(path: str, parameter: nn.Parameter, style: str, ranks: int) -> None:
    """Raise UnsupportedModelError if a parameter that the plan names can't be cut equally."""
    match style:
        case "packed_colwise":
            _divides(path, parameter.shape[max(parameter.ndim - 2, 0)], 2 * ranks)
        case "packed_rowwise":
            _divides(path, parameter.shape[-1], 2 * ranks)
        case "rowwise":
            _divides(path, parameter.shape[-1], ranks)
        case "colwise":
            _divides(path, parameter.shape[max(parameter.ndim - 2, 0)], ranks)


def _divides(what: str, count: int, parts: int) -> None:
    if count % parts:
        raise _refused(f"{what} ({count}) can't be cut in {parts} equal parts", "give a divisor")


def _refused(why: str, remedy: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"--tensor-parallel: {why}; {remedy}", param=SETTING)
