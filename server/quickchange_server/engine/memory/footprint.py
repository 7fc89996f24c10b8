"""What the parts of a served model take and ask for, and the lines of the table.

Shapes alone are read, so a model on the meta device will do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quickchange_kernels.lowrank.lowrank_contract import RANKS_PER_PAGE
from quickchange_server.adapters.arena_sizes import ArenaSizes, least_arena
from quickchange_server.adapters.packing import page_shapes
from quickchange_server.config import GIB, Settings
from quickchange_server.engine.memory.budget import MemoryLine, Parts, Wish, size
from quickchange_server.engine.memory.cache_sizes import (
    CacheSizes,
    graph_rows,
    least_bytes,
    least_caches,
)
from quickchange_server.errors import SettingError
from quickchange_server.model.loading.model_dtype import dtype_name, torch_dtype
from quickchange_server.model.loading.model_loader import LoadedModel

TABLE_RANK = 16
_DEFAULT_ADAPTERS = 64  # of rank 16
_DEFAULT_SHARE = 4  # of what the base leaves, one part in so many
_SLACK = 16  # a part in so many may lie in slabs that are not full

Pages = Mapping[int, int]  # page size in elements -> pages


def held_dtype(model: LoadedModel, settings: Settings) -> torch.dtype:
    """What adapters are held in."""
    asked = settings.adapter_dtype
    if asked not in ("auto", "model"):
        return torch_dtype(asked)
    narrow = asked == "auto" and settings.quantization != "none" and model.dtype == torch.float32
    return torch.bfloat16 if narrow else model.dtype


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, those in one memory counted once."""
    found: dict[object, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            # On the meta device all storages lie at 0, and a shared parameter is one object.
            found[part if part.is_meta else storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's numbers: it, or what torchao's kinds are made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def adapter_pages(model: LoadedModel, dtype: torch.dtype, rank: int = TABLE_RANK) -> Pages:
    """Pages by size of an adapter of this rank on all linears: not the LM head, not experts."""
    head = next((path for path, each in model.module.named_modules() if each is model.head), "")
    shapes = page_shapes(model.groups, dtype)
    linear = {
        member.path
        for group in model.groups
        if group.kind == "linear" and group.source == "input"
        for member in group.members
        if member.path != head
    }
    pages = Counter[int]()
    for path in linear:
        pages[shapes[path, "input"].elements] += -(-rank // RANKS_PER_PAGE)
    return pages


def pages_bytes(pages: Pages, dtype: torch.dtype) -> int:
    return sum(elements * count for elements, count in pages.items()) * dtype.itemsize


def default_arena(model: LoadedModel, dtype: torch.dtype, left: int) -> int:
    """Bytes of the arena on a device that has `left`: room for 64 adapters of rank 16, but at most
    a quarter of what is left, and the least that an arena can be."""
    adapter = pages_bytes(adapter_pages(model, dtype), dtype)
    wanted = _DEFAULT_ADAPTERS * adapter * _SLACK // (_SLACK - 1)
    return max(min(wanted, left // _DEFAULT_SHARE), least_arena(model.groups, dtype))


def arena_bytes(model: LoadedModel, settings: Settings, left: int | None) -> int:
    """Bytes of the adapters' arena. left: on the device; None: its memory is not divided.

    Raises SettingError for more than is left.
    """
    asked = settings.adapter_device_bytes
    if left is None:
        return GIB if asked is None else asked
    if asked is None:
        return default_arena(model, held_dtype(model, settings), left)
    if asked > left:
        raise SettingError(
            f"adapter_device_bytes ({asked}): the base leaves {max(left, 0)} bytes of the device; "
            "give at most a part of that",
            param="adapter_device_bytes",
        )
    return asked


def wish_of(model: LoadedModel, settings: Settings) -> Wish:
    """What the settings and the model ask of the caches."""
    needed, tokens = least_bytes(model, settings)
    wide = model.dtype.itemsize == torch.float32.itemsize
    return Wish(
        settings.kv_cache_bytes,
        needed,
        tokens,
        block_bytes=0 if model.recurrent else least_caches(model, settings).block_bytes,
        block_tokens=settings.block_size,
        least_arena=least_arena(model.groups, held_dtype(model, settings)),
        half_weights=tensor_bytes(model.module) // 2 if wide else 0,
    )


def memory_lines(
    model: LoadedModel, settings: Settings, arena: int, caches: CacheSizes, parts: Parts | None
) -> list[MemoryLine]:
    """The table's lines. arena: its bytes, 0 for none. parts: as measured; None: on a CPU."""
    weights, dtype = tensor_bytes(model.module), held_dtype(model, settings)
    note = f"weights {size(weights)} in {dtype_name(model.dtype)}"
    if parts is not None:
        note += f", and {size(max(parts.base - weights, 0))} of the runtime and of others"
    lines = [MemoryLine("base", weights if parts is None else parts.base, note)]
    if arena:
        pages = adapter_pages(model, dtype)
        room = ArenaSizes.of(model.groups, arena, dtype).room_for(pages)
        note = (
            f"room for {room} all-linear rank-{TABLE_RANK}, {size(pages_bytes(pages, dtype))} each"
        )
        lines.append(MemoryLine("adapters", arena if parts is None else parts.adapters, note))
    else:
        lines.append(MemoryLine("adapters", None, "switched off"))
    if parts is None:
        lines.append(MemoryLine("graphs", None, "a CPU's recorded steps: half a MiB each"))
        lines.append(MemoryLine("scratch", None, "taken and given back in each step"))
    else:
        rows = graph_rows(settings)
        lines.append(MemoryLine("graphs", parts.graphs, f"decode steps of up to {rows} rows"))
        lines.append(
            MemoryLine("scratch", parts.scratch, f"a step of {settings.batch_tokens} rows")
        )
    return [*lines, *caches.lines()]
