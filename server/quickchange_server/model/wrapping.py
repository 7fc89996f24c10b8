"""Wraps a loaded model's modules for adapters: linears of one input are fused, others stand alone.

Recognises the two fused patterns by the names that nearly all decoder models use; anything else is
wrapped one by one. Module paths, as adapters name them, are those before fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from quickchange_server.adapters.module_groups import Member, ModuleGroup
from quickchange_server.model.adapter_layers import (
    AdaptedEmbedding,
    AdaptedLinear,
    ProjectionPart,
    SharedProjection,
    base_linear,
)
from quickchange_server.model.forward_context import StepHolder
from quickchange_server.model.output_side import OutputSide
from quickchange_server.model.parallel.sharding import UNCUT, JointLinear, Sharding
from quickchange_server.model.quantized_linear import is_plain, linear_shape
from quickchange_server.model.rows_read import Rows
from quickchange_store.base_model.sublayers import sublayers
from quickchange_store.base_model.weight_reading import release
from quickchange_store.canonical.canonical_adapter import Source

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Wrapper:
    """Wraps one model's modules; `groups` then lists their groups, by group index.

    rows: the rows that each linear reads, by path. One whose rows are None has no group: no adapter
    may update it. With rows=None no group exists and no step ever looks for segments; the linears
    are fused and go through the native kernels all the same. sharding: what this process holds only
    a part of. spare: tokens of the embedding and the LM head that the base itself does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        holder: StepHolder,
        *,
        rows: Mapping[str, Rows | None] | None,
        base: Callable[[nn.Module], nn.Module] = base_linear,
        sharding: Sharding = UNCUT,
        spare: int = 0,
    ) -> None:
        self._model = model
        self._holder = holder
        self._adapters = rows is not None
        self._rows = rows or {}
        self._base = base  # makes the module that computes a linear
        self._joints = sharding.joints
        self._spare = spare
        self.groups: list[ModuleGroup] = []
        self.entrances: list[
            tuple[str, OutputSide]
        ] = []  # (path of the norm that the stream enters, its OutputSide)

    def wrap(self) -> list[ModuleGroup]:
        """Replace the modules in place and return the groups."""
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        self._head = self._model.get_output_embeddings()  # type: ignore[operator]
        self._sublayers = sublayers(self._model)
        for path in self._paths():
            for names in FUSED:
                self._fuse(path, self._model.get_submodule(path), names)
        for path in self._paths():
            try:
                module = self._model.get_submodule(path)
            except AttributeError:
                continue  # a part of a linear that was replaced whole
            if linear_shape(module) is not None:
                self._replace(path, self._linear(path, module))
            elif module is embedding and isinstance(module, nn.Embedding) and self._adapters:
                self._replace(path, self._embedding(path, module))
        return self.groups

    def _paths(self) -> list[str]:
        """Paths alone: modules in a list would keep the weights of those that are replaced."""
        return [path for path, _ in self._model.named_modules()]

    def _fuse(self, path: str, parent: nn.Module, names: tuple[str, ...]) -> None:
        parts = [getattr(parent, name, None) for name in names]
        linears = [part for part in parts if isinstance(part, nn.Linear) and is_plain(part)]
        paths = [f"{path}.{name}" if path else name for name in names]
        rows = {self._rows.get(each) for each in paths}
        joint, *others = [self._joints.get(each) for each in paths]
        joined = all(joint is other or (joint and joint.fits(other)) for other in others)
        if len(linears) < len(names) or not _alike(linears) or len(rows) > 1 or not joined:
            return
        fused = _concatenate(linears)
        widths = [linear.out_features for linear in linears]
        adapted = self._adapted(fused, paths, widths, rows.pop())
        shared = SharedProjection(adapted, widths if joint is None else joint.widened(widths))
        for index, name in enumerate(names):
            setattr(parent, name, ProjectionPart(shared, index))

    def _linear(self, path: str, module: nn.Module) -> nn.Module:
        _, width = _shape_of(module)
        adapted = self._adapted(module, [path], [width], self._rows.get(path))
        if isinstance(adapted, AdaptedLinear) and path in self._sublayers:
            joint = self._joints.get(path)
            whole = width if joint is None else sum(joint.widened([width]))
            adapted.output_side = self._output_side(path, whole)
        return adapted

    def _output_side(self, path: str, width: int) -> OutputSide:
        """Output side of a sub-layer's last module, with groups for its output and the stream."""
        place = self._sublayers[path]
        sources: list[Source] = ["output"]
        if place.norm is not None:
            sources += ["residual", "stream"] if place.plain_stream else ["residual"]
        groups: dict[Source, ModuleGroup] = {}
        for source in sources:
            member = Member(path, 0, width)
            group = ModuleGroup(len(self.groups), "linear", width, width, (member,), source)
            groups[source] = group
            self.groups.append(group)
        side = OutputSide(groups, self._holder)
        if place.norm is not None:
            self.entrances.append((place.norm, side))
        return side

    def _adapted(
        self, linear: nn.Module, paths: list[str], widths: list[int], rows: Rows | None
    ) -> nn.Module:
        base, joints = self._base(linear), [self._joints.get(path) for path in paths]
        joint = joints[0]
        if rows is None:
            return base if joint is None else JointLinear(base, joint, widths)
        columns = [sum(widths[:index]) for index in range(len(widths))]
        shards = [None if each is None else each.shard for each in joints]
        spare = self._spare if linear is self._head else 0
        members = tuple(
            Member(*item, spare) for item in zip(paths, columns, widths, shards, strict=True)
        )
        group = ModuleGroup(len(self.groups), "linear", *_shape_of(linear), members)
        self.groups.append(group)
        return AdaptedLinear(base, group, rows, self._holder, joint)

    def _embedding(self, path: str, module: nn.Embedding) -> nn.Module:
        vocabulary, hidden = module.num_embeddings, module.embedding_dim
        member = Member(path, 0, hidden, spare=self._spare)
        group = ModuleGroup(len(self.groups), "embedding", vocabulary, hidden, (member,))
        self.groups.append(group)
        return AdaptedEmbedding(module, group, self._holder)

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(parent), name, module)


def _shape_of(linear: nn.Module) -> tuple[int, int]:
    shape = linear_shape(linear)
    assert shape is not None
    return shape


def _alike(linears: list[nn.Linear]) -> bool:
    first = linears[0]
    return all(
        linear.in_features == first.in_features
        and (linear.bias is None) == (first.bias is None)
        and linear.weight.dtype == first.weight.dtype
        for linear in linears
    )


def _concatenate(linears: list[nn.Linear]) -> nn.Linear:
    first = linears[0]
    fused = nn.Linear(
        first.in_features,
        sum(linear.out_features for linear in linears),
        bias=first.bias is not None,
        device="meta",
    )
    fused.weight = nn.Parameter(
        torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False
    )
    for linear in linears:
        release(linear.weight)
        del linear.weight  # before the fused weight is packed: never three of them in memory
    if first.bias is not None:
        biases = [linear.bias.detach() for linear in linears]
        fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return fused
