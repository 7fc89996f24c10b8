"""Loads the base model, puts both seams in, and finds the shapes that its KV cache must hold.

Any transformers architecture whose attention goes through the attention interface, and whose
recurrent layers keep their states through the cache interface, will do. One that keeps other state
between steps is refused by name.

`forward` also returns the hidden states that enter the LM head, from which drafting heads start.
Models scale or norm them in their own ways before the head, and scale or cap the logits behind it:
only the head's own input is the same thing everywhere. It is a tensor of the forward pass, so in a
captured graph it is an output like the logits.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from quickchange_server.adapters.module_groups import ModuleGroup
from quickchange_server.errors import UnsupportedModelError
from quickchange_server.model import paged_attention
from quickchange_server.model.adapter_layers import (
    PackedLinear,
    base_linear,
    sharing_weights,
    take_rows,
    tied_embedding,
)
from quickchange_server.model.architectures.attention_shims import (
    admit_attention_classes,
    replace_own_attention,
)
from quickchange_server.model.architectures.batch_shims import fit_to_batch, most_positions
from quickchange_server.model.architectures.experts import wrap_experts
from quickchange_server.model.architectures.position_scaling import (
    PositionScaling,
    scale_by_text,
    stretched,
)
from quickchange_server.model.architectures.recurrent_layers import RecurrentLayer, noting_states
from quickchange_server.model.architectures.routers import wrap_routers
from quickchange_server.model.forward_context import StepHolder
from quickchange_server.model.fusion import Fusion, MixingProbe
from quickchange_server.model.loading.layer_kinds import (
    keeps_states,
    refuse_headless,
    refuse_other_layers,
    refuse_other_state,
)
from quickchange_server.model.loading.model_dtype import model_dtype
from quickchange_server.model.loading.model_proof import (
    LOOSE,
    ROUNDED,
    TOLERANCE,
    ModelProof,
    Tolerance,
    explained,
)
from quickchange_server.model.loading.spare_tokens import add_spare_tokens, fence_
from quickchange_server.model.norm_side import (
    connect_norms,
    norm_sides,
    noting_norms,
)
from quickchange_server.model.output_side import connect
from quickchange_server.model.paged_attention import LayerShape, PagedAttention, ShapeRecorder
from quickchange_server.model.parallel.ranks import Ranks
from quickchange_server.model.parallel.sharding import UNCUT, localised, made_whole
from quickchange_server.model.parallel.sharding_plan import whole_ends
from quickchange_server.model.quantized_linear import (
    FLOATS,
    Quantization,
    check_quantization,
    quantized_linear,
)
from quickchange_server.model.rows_read import Rows, rows_read
from quickchange_server.model.virtual_rows import take_vectors
from quickchange_server.model.wrapping import Wrapper
from quickchange_store.base_model.base_source import BaseSource
from quickchange_store.base_model.base_weights import load_base, quantization_method
from quickchange_store.base_model.expert_parts import expert_parts, routers
from quickchange_store.errors import BaseModelError

logger = logging.getLogger(__name__)


class HeadInput:
    """Keeps the input of an LM head until it is taken."""

    def __init__(self, head: nn.Module) -> None:
        """Watch `head` from now on."""
        self._seen: torch.Tensor | None = None  # [..., H]
        self.rows: int | None = (
            None  # rows that the head reads in the coming pass, from the first; None: all
        )
        head.register_forward_pre_hook(self._keep)

    def take(self) -> torch.Tensor:
        """The head's input [R, H] in the pass that has just run.

        Raises RuntimeError if there was no pass since the last call.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise RuntimeError("the model made logits without calling its LM head")
        return seen.reshape(-1, seen.shape[-1])

    def _keep(
        self, _head: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        self._seen = args[0]
        return None if self.rows is None else (args[0][..., : self.rows, :], *args[1:])


@dataclass(frozen=True)
class LoadedModel:
    """The base model, ready for paged attention to be installed."""

    module: nn.Module
    holder: StepHolder
    groups: tuple[ModuleGroup, ...]
    layers: dict[int, LayerShape]
    vocabulary: int  # columns of the logits
    own_vocabulary: int  # of them the base's own; spare ones for adapters' tokens stand behind
    hidden: int  # features that enter the LM head
    max_positions: int  # tokens
    head: nn.Module  # the LM head, wrapped
    head_input: HeadInput
    embedding: nn.Module  # input embedding, wrapped
    dtype: torch.dtype  # of what it computes, and of its keys and values
    scaling: PositionScaling | None = None  # if positions are scaled by the text's length
    recurrent: tuple[RecurrentLayer, ...] = ()  # layers that keep states between tokens

    def install_caches(
        self,
        *,
        num_blocks: int,
        block_size: int,
        state_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Give attention its KV pages and recurrent layers room for `state_rows` states.

        From then on the model runs what `holder` holds.
        """
        attend = PagedAttention(self.layers, num_blocks, block_size, dtype, device, self.holder)
        paged_attention.install(self.module, attend)
        for layer in self.recurrent:
            layer.install(state_rows, device, self.holder)


class Output(NamedTuple):
    """Output of a forward pass for the requested rows."""

    logits: torch.Tensor  # [R, V], or fewer: the first `head_rows` rows
    hidden: torch.Tensor  # [R, H]: the LM head's input


def load_model(
    path: str,
    *,
    dtype: str | torch.dtype,
    device: torch.device,
    adapters: bool,
    quantization: Quantization = "none",
    deterministic: bool = False,
    model_check: bool = True,
    ranks: Ranks | None = None,
    extra_vocabulary: int = 0,
) -> LoadedModel:
    """Load and wrap the model that `--model` names; of several ranks, this one's part of it.

    dtype: the setting, or a dtype. extra_vocabulary: spare tokens, for adapters'.

    Raises UnsupportedModelError for an architecture that can't be served and for weights that are
    missing or not finite, OSError or ValueError (transformers') if nothing can be loaded from
    `path`.
    """
    check_quantization(quantization, device)
    paged_attention.register()
    try:
        config = BaseSource.of(path).config()
        refuse_other_state(config)
        admit_attention_classes(config)
        _refuse_twice_quantised(config, quantization)
        chosen = model_dtype(dtype, config, device)
        placed = {"device_map": {"": device}} if ranks is None else _cut(path, ranks)
        model: nn.Module = load_base(
            path, dtype=chosen, attn_implementation=paged_attention.NAME, **placed
        )
    except BaseModelError as error:
        raise UnsupportedModelError(f"model: {error}", param="model") from error
    return prepare(
        model.eval(),
        adapters=adapters,
        quantization=quantization,
        deterministic=deterministic,
        model_check=model_check,
        dtype=chosen,
        ranks=ranks,
        extra_vocabulary=extra_vocabulary,
    )


def _cut(path: str, ranks: Ranks) -> dict[str, Any]:
    """Options by which transformers reads this rank's part of a model, to its own device."""
    from transformers.distributed.configuration_utils import DistributedConfig

    whole = whole_ends(path, ranks.size)
    return {"distributed_config": DistributedConfig(tp_size=ranks.size, tp_plan=whole)}


def prepare(
    model: nn.Module,
    *,
    adapters: bool,
    quantization: Quantization = "none",
    deterministic: bool = False,
    model_check: bool = True,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    extra_vocabulary: int = 0,
) -> LoadedModel:
    """Wrap a model that was loaded with `attn_implementation="quickchange"`.

    One on the meta device is an outline: shapes and groups as they would be served, no numbers.
    deterministic: on a GPU too, sum linears in an order that their rows don't change.
    model_check: prove that it then gives what transformers' own model gives (`model_proof.py`).
    dtype: what it was loaded in; None: what its parameters say. extra_vocabulary: spare tokens.
    Raises UnsupportedModelError for a model that can't be served.
    """
    try:
        return _prepared(
            model,
            adapters,
            quantization,
            model_check,
            dtype or model.dtype,  # type: ignore[arg-type]
            deterministic=deterministic,
            ranks=ranks,
            extra_vocabulary=extra_vocabulary,
        )
    except Exception as error:
        refusal = explained(model, error)
        if ranks is not None:
            remedy = "it was cut by transformers' plan: try --tensor-parallel 1"
            refusal = UnsupportedModelError(f"{refusal.message}; {remedy}", param=refusal.param)
        raise refusal from error


def _prepared(
    model: nn.Module,
    adapters: bool,
    quantization: Quantization,
    model_check: bool,
    dtype: torch.dtype,
    *,
    deterministic: bool,
    ranks: Ranks | None,
    extra_vocabulary: int,
) -> LoadedModel:
    config: PretrainedConfig = model.config
    refuse_headless(model)
    model.requires_grad_(False)
    outline = next(model.parameters()).is_meta
    rounded = quantization != "none" or quantization_method(config) is not None
    with nullcontext() if ranks is None else made_whole(model):
        proof = ModelProof(model, rounded=rounded) if model_check and not outline else None
    head_rows = fit_to_batch(model)
    replace_own_attention(model)
    holder = StepHolder()
    with noting_norms(model, dtype) as normed:
        rows, called = _rows_of_short_pass(model)
    # Mamba multiplies by some linear's weight itself: it stays as it is.
    read = {module for path, module in model.named_modules() if path not in called}
    sharing, tied = sharing_weights(model), tied_embedding(model)
    heads = {model.get_output_embeddings()}  # type: ignore[operator]
    if ranks is not None or extra_vocabulary:  # its rows are cut, or others come behind them
        sharing |= heads
    elif tied is not None:
        sharing -= heads
    kept = read | sharing

    def base(module: nn.Module) -> nn.Module:
        head = module is model.get_output_embeddings()  # type: ignore[operator]
        if quantization == "none" or module in read:
            made = base_linear(module, deterministic=deterministic, rows_read=module in kept)
            if head and tied is not None and isinstance(made, PackedLinear):
                take_rows(tied, made)
            return made
        # The head's rounding reaches the logits as it is: int4 keeps it as int8.
        return quantized_linear(module, "int8" if head and quantization == "int4" else quantization)

    sharding = UNCUT if ranks is None else localised(model, ranks)
    if extra_vocabulary:  # behind the proof, which is of the base's own tokens
        add_spare_tokens(model, extra_vocabulary)
    wrapper = Wrapper(
        model,
        holder,
        rows=rows if adapters else None,
        base=base,
        sharding=sharding,
        spare=extra_vocabulary,
    )
    choosing = routers(model) if adapters else {}
    groups = wrapper.wrap()
    sides = norm_sides(model, normed, groups, holder) if adapters else []
    wrap_experts(model, holder, groups, adapters=adapters, sharding=sharding)
    if deterministic:
        _refuse_loose_sums(model, config, 1 if ranks is None else ranks.size)
    wrap_routers(model, choosing, holder, groups, lambda: _short_pass(model))
    head_rows.attach(model.get_output_embeddings())  # type: ignore[operator]
    scaling = scale_by_text(model, holder)
    # Fusing compares numbers, of which an outline has none.
    fusion = None if outline else Fusion(model, lambda *rows: _logits(model, *rows))
    recorder = ShapeRecorder()
    paged_attention.install(model, recorder)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    head_input = HeadInput(head)
    take_vectors(model.get_input_embeddings(), holder)  # type: ignore[operator]
    states = noting_states(model) if keeps_states(config) else nullcontext(lambda: ())
    with states as recurrent_layers:
        logits = _logits(model, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    recurrent = recurrent_layers()
    refuse_other_layers(model, recorder.layers, recurrent)
    loaded = LoadedModel(
        module=model,
        holder=holder,
        groups=tuple(groups),
        layers=dict(sorted(recorder.layers.items())),
        vocabulary=logits.shape[-1],
        own_vocabulary=logits.shape[-1] - extra_vocabulary,
        hidden=head_input.take().shape[-1],
        max_positions=stretched(config.get_text_config(), most_positions(model, config)),
        head=head,
        head_input=head_input,
        embedding=model.get_input_embeddings(),  # type: ignore[operator]
        dtype=dtype,
        scaling=scaling,
        recurrent=recurrent,
    )
    if proof is not None and fusion is not None:
        exact = TOLERANCE.get(model.dtype, LOOSE)  # type: ignore[call-overload]
        tolerance = ROUNDED if quantization != "none" else LOOSE if rounded else exact
        _prove(loaded, proof, fusion, tolerance)
    connect(model, wrapper.entrances)
    connect_norms(model, sides)
    if ranks is not None:
        _check_alike(loaded, ranks)
    return loaded


def _check_alike(loaded: LoadedModel, ranks: Ranks) -> None:
    """Raise UnsupportedModelError unless all ranks call the same modules, on parts of one size."""
    groups = [(g.kind, g.source, g.in_features, g.out_features) for g in loaded.groups]
    modules = [type(module).__name__ for module in loaded.module.modules()]
    if not ranks.agree(repr((groups, modules, loaded.layers))):
        raise UnsupportedModelError("the ranks' parts of the model differ in form", param="model")


def _prove(loaded: LoadedModel, proof: ModelProof, fusion: Fusion, tolerance: Tolerance) -> None:
    """Undo fusions until the model proves right. Raises UnsupportedModelError if it never does."""
    name = type(loaded.module).__name__
    undone: list[tuple[str, str]] = []

    def run(*rows: Any) -> torch.Tensor:
        return _logits(*rows)[:, : loaded.own_vocabulary]

    while difference := proof.difference(loaded.install_caches, loaded.holder, run, tolerance):
        kind = fusion.undo_last()
        if kind is None:
            raise UnsupportedModelError(
                f"{name} can't be served: {difference}. --no-model-check serves it unproved",
                param="model",
            )
        undone.append((kind, difference))
    for kind, difference in undone:
        logger.warning("%s: its %s are not fused, which is slower: %s", name, kind, difference)


@torch.inference_mode()
def forward(
    model: LoadedModel,
    ids: torch.Tensor,
    positions: torch.Tensor,
    sample_rows: torch.Tensor | None = None,
    head_rows: int | None = None,
) -> Output:
    """Logits and hidden states of `sample_rows` [R] (default: the last) of the rows `ids` [T].

    head_rows: the LM head reads only so many of them, from the first; None: all.
    """
    model.head_input.rows = head_rows
    try:
        logits = _logits(model.module, ids, positions, sample_rows)
        step = model.holder.step
        adapters = None if step is None else step.adapters
        segments, tokens = (adapters.samples, adapters.tables.tokens) if adapters else (None, None)
        fence_(logits, model.own_vocabulary, segments, tokens)
        return Output(logits, model.head_input.take())
    finally:
        model.head_input.rows = None


@torch.inference_mode()
def _logits(
    model: nn.Module,
    ids: torch.Tensor,
    positions: torch.Tensor,
    sample_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [R, V] of `sample_rows` (default: the last row)."""
    device = next(model.parameters()).device
    if sample_rows is None:
        # As a tensor: for a number, Gemma 4 drops the other rows in front of its last layers.
        sample_rows = torch.tensor([len(ids) - 1])
    output: Any = model(
        input_ids=ids.unsqueeze(0).to(device),
        position_ids=positions.unsqueeze(0).to(device),
        use_cache=False,
        logits_to_keep=sample_rows.to(device),
    )
    logits: torch.Tensor = output.logits[0]
    return logits


def _short_pass(model: nn.Module) -> None:
    _logits(model, torch.arange(2), torch.arange(2))


def _rows_of_short_pass(model: nn.Module) -> tuple[dict[str, Rows | None], frozenset[str]]:
    """What `rows_read` says. Raises UnsupportedModelError for weights with NaN or infinity."""
    found: list[torch.Tensor] = []

    def run(ids: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        found.append(_logits(model, ids, torch.arange(len(ids)), asked))
        return found[0]

    paged_attention.install(model, MixingProbe())
    read = rows_read(model, run)
    if not found[0].is_meta and not bool(found[0].isfinite().all()):
        _refuse_broken_weights(model)
    return read


def _refuse_broken_weights(model: nn.Module) -> None:
    """Name the weights that hold NaN or infinity, if that is why the logits are not finite."""
    broken = {
        name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.dtype in FLOATS and not bool(parameter.isfinite().all())
    }
    if broken:
        name, dtype = next(iter(broken.items()))
        raise UnsupportedModelError(
            f"model: {len(broken)} of its weights hold NaN or infinity as {dtype}, {name} first; "
            "give a --dtype that has room for them, or fetch the model again",
            param="model",
        )


def _refuse_twice_quantised(config: PretrainedConfig, quantization: Quantization) -> None:
    method = quantization_method(config)
    if method is not None and quantization != "none":
        raise UnsupportedModelError(
            f"--quantization {quantization} (or QUICKCHANGE_QUANTIZATION): the model is stored "
            f"quantised already, by {method}; use --quantization none",
            param="quantization",
        )


def _refuse_loose_sums(model: nn.Module, config: PretrainedConfig, ranks: int) -> None:
    """Raise UnsupportedModelError where a GPU would sum in an order that the batch changes."""
    loose = {
        "experts, whose grouped products choose": bool(expert_parts(model)),
        "weights that are stored quantised, whose products choose": quantization_method(config),
        "recurrent layers, whose scans choose": keeps_states(config),
        "more than two ranks (--tensor-parallel), whose sums choose": ranks > 2,
    }
    found = [what for what, there in loose.items() if there]
    if found and next(model.parameters()).device.type != "cpu":
        raise UnsupportedModelError(
            f"--deterministic (or QUICKCHANGE_DETERMINISTIC): the model has {found[0]} an order of "
            "sums by the rows of a batch on a GPU; serve it without, or on --device cpu",
            param="deterministic",
        )
