"""LoRA of experts as PEFT and trainers save it, in one update for each expert's matrix.

Two layouts:

    target_parameters   A [r · E, in] and B [out, r · E] for all experts of a parameter, named by
                        the module of the experts: `experts.lora_A`. PEFT nests the wrappers of one
                        module's parameters in the order of these, the last outermost, so an earlier
                        one is `experts.base_layer.lora_A`. Rank j of expert e is row e · r + j of A
                        and column j · E + e of B
    modules of experts  A [r, in] and B [out, r] of `experts.3.gate_proj`, which is a part of a
                        matrix since transformers 5: `BaseSpec.expert_modules` says of which

Earlier versions of PEFT took every parameter as [E, in, out]; where it is [E, out, in], their A
reads outputs and their B makes inputs, which the shapes tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from quickchange_store.canonical.canonical_adapter import (
    BaseSpec,
    ExpertPart,
    ExpertPiece,
    LowRankUpdate,
    expert_path,
)
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError
from quickchange_store.formats.config_file import CONFIG_FILE
from quickchange_store.formats.peft.peft_config import LoraSettings
from quickchange_store.formats.peft.tensor_names import PREFIX
from quickchange_store.formats.tensors import AdapterTensors

if TYPE_CHECKING:
    import torch


def expert_updates(
    tensors: AdapterTensors, settings: LoraSettings, base: BaseSpec
) -> dict[str, LowRankUpdate]:
    """The updates of experts, by `expert_path`. Raises StoreError."""
    updates: dict[str, LowRankUpdate] = {}
    modules: dict[str, list[str]] = {}  # names of single experts' modules, by the matrix's path
    for name, piece in settings.names.expert_modules.items():
        if name in settings.targets:
            modules.setdefault(piece.path, []).append(name)
    for parameter, part in base.experts.items():  # the base's order, not the file's
        found = dict(_of_parameter(tensors, settings, base, parameter, part))
        of_modules = dict(_of_modules(tensors, settings, modules, parameter, part))
        if both := found.keys() & of_modules.keys():
            raise InvalidAdapterError(
                "the adapter updates it through target_parameters and as a module of its own",
                file=CONFIG_FILE,
                key=min(both),
                remedy="train it in one of the two ways",
            )
        updates |= found | of_modules
    return updates


def _of_parameter(
    tensors: AdapterTensors,
    settings: LoraSettings,
    base: BaseSpec,
    parameter: str,
    part: ExpertPart,
) -> Iterator[tuple[str, LowRankUpdate]]:
    if parameter not in settings.parameters:
        return
    prefix = PREFIX + wrapper_name(
        parameter, [path for path in base.experts if path in settings.parameters]
    )
    keys = (f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight")
    a, b = (tensors.take(key) for key in keys)
    rank, experts = settings.rank_of((parameter,)), part.experts
    scale = settings.scale_of((parameter,))
    shapes = (tuple(a.shape), tuple(b.shape))
    inputs, outputs = part.in_features, part.out_features
    turned = shapes != ((rank * experts, inputs), (outputs, rank * experts))
    if turned and shapes != ((rank * experts, outputs), (inputs, rank * experts)):
        raise BaseMismatchError(
            f"A {list(a.shape)} and B {list(b.shape)} do not fit {experts} experts of rank {rank} "
            f"with {inputs} inputs and {outputs} outputs ({parameter})",
            file=tensors.file_of(keys[0]),
            key=tensors.name(keys[0]),
            remedy="use an adapter of this base model, and one saved with its r and rank_pattern",
        )
    rows = a.reshape(experts, rank, -1)
    columns = b.reshape(b.shape[0], rank, experts)
    for expert in range(experts):
        down, up = rows[expert], columns[:, :, expert]
        if turned:
            down, up = up.T, down.T
        yield (
            expert_path(parameter, expert),
            LowRankUpdate(down.contiguous(), up.contiguous(), scale),
        )


def _of_modules(
    tensors: AdapterTensors,
    settings: LoraSettings,
    modules: Mapping[str, list[str]],
    parameter: str,
    part: ExpertPart,
) -> Iterator[tuple[str, LowRankUpdate]]:
    for expert in range(part.experts):
        path = expert_path(parameter, expert)
        factors = [_factors(tensors, settings, part, name) for name in modules.get(path, ())]
        if factors:
            yield path, _joined(sorted(factors, key=lambda each: each[3].index), part)


_Factors = tuple["torch.Tensor", "torch.Tensor", float, ExpertPiece]


def _factors(
    tensors: AdapterTensors,
    settings: LoraSettings,
    part: ExpertPart,
    name: str,
) -> _Factors:
    """A [r, in] and B [out, r] of a single expert's module, and their scale."""
    piece = settings.names.expert_modules[name]
    rank, out = settings.rank(name), part.out_features // piece.pieces
    return (
        tensors.take_shaped(f"{PREFIX}{name}.lora_A.weight", name, (rank, part.in_features)),
        tensors.take_shaped(f"{PREFIX}{name}.lora_B.weight", name, (out, rank)),
        settings.scale(name),
        piece,
    )


def _joined(factors: list[_Factors], part: ExpertPart) -> LowRankUpdate:
    """One update of the expert's matrix: every piece has ranks of its own."""
    import torch

    scale = factors[0][2]
    a = torch.cat([a for a, _, _, _ in factors])
    widened = []
    for _, b, own, piece in factors:
        wide = b.new_zeros(part.out_features, b.shape[1])
        place = slice(piece.index, None, piece.pieces)
        if not part.interleaved:
            place = slice(piece.index * len(b), (piece.index + 1) * len(b))
        wide[place] = b
        widened.append(wide if own == scale else wide.float() * (own / scale))
    return LowRankUpdate(a, torch.cat(widened, 1), scale)


def wrapper_name(parameter: str, targets: Iterable[str]) -> str:
    """The name of PEFT's wrapper of a parameter, all of whose module's are `targets`, in order."""
    module = parameter.rpartition(".")[0]
    siblings = [path for path in targets if path.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(parameter))


def stacked(updates: Mapping[int, LowRankUpdate], part: ExpertPart) -> LowRankUpdate:
    """The updates of a parameter's experts in the layout of target_parameters.

    A [r · E, in] and B [out, r · E], where r is the highest rank of them. All have one scale.
    """
    import torch

    first = next(iter(updates.values()))
    rank = max(update.rank for update in updates.values())
    dtype = torch.promote_types(first.a.dtype, first.b.dtype)
    a = torch.zeros(part.experts, rank, part.in_features, dtype=dtype)
    b = torch.zeros(part.out_features, rank, part.experts, dtype=dtype)
    for expert, update in updates.items():
        factor = update.scale / first.scale
        a[expert, : update.rank] = update.a.to(dtype)
        b[:, : update.rank, expert] = (update.b if factor == 1 else update.b * factor).to(dtype)
    return LowRankUpdate(a.flatten(0, 1), b.flatten(1, 2), first.scale)
