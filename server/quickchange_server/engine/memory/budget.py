"""Division of a device's memory: the parts, the keys and values that are left, and the table.

    gpu_memory_utilization · total = base + adapters + graphs + scratch + keys and values

Pure numbers, which an engine measures and `quickchange plan` works out. What the others leave goes
to the keys and values, unless their size is set; what does not fit is refused with settings that
would.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from quickchange_server.errors import SettingError

MIB, GIB = 1 << 20, 1 << 30
LEAST_CONTEXT = 2048  # tokens that one sequence must have room for, where no length is set
_HIGHEST_SHARE = 0.98  # of a device, to be proposed
_LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes that are taken besides keys and values, and of those, what a setting can change."""

    total: int
    share: float  # of the total that may be used
    base: int  # weights, the runtime's own, and what others use
    adapters: int
    graphs: int
    scratch: int

    @property
    def limit(self) -> int:
        return int(self.total * self.share)

    @property
    def says(self) -> str:
        return f"of {size(self.limit)}: {self.share:.0%} of the device's {size(self.total)}"

    @property
    def left(self) -> int:
        """Bytes for keys, values and states; below 0 where the rest does not fit."""
        return self.limit - self.base - self.adapters - self.graphs - self.scratch


@dataclass(frozen=True, slots=True)
class Wish:
    """What the settings and the model ask of the caches, in bytes where nothing else is said."""

    kv_cache_bytes: int | None
    needed: int  # of the least that is useful: one sequence of `tokens`
    tokens: int
    block_bytes: int = 0  # 0: the length of a sequence changes nothing, or not by itself
    block_tokens: int = 1
    least_arena: int = 0
    half_weights: int = 0  # that a dtype of 16 bits would save


def kv_bytes(parts: Parts, wish: Wish) -> int:
    """Bytes of keys, values and states. Raises SettingError, with what would fit."""
    asked, left = wish.kv_cache_bytes, parts.left
    given = left if asked is None else asked
    if wish.needed <= given <= left:
        return given
    if asked is None:
        name, value = "gpu_memory_utilization", f"{parts.share:g}"
    else:
        name, value = "kv_cache_bytes", str(asked)
    raise SettingError(
        f"{name} ({value}): the device has {max(left, 0)} bytes left for keys and values, and one "
        f"sequence of {wish.tokens} tokens needs {wish.needed}. {_remedies(parts, wish, given)}",
        param=name,
    )


def _remedies(parts: Parts, wish: Wish, given: int) -> str:
    """Settings that make all fit, each alone. given: bytes for the caches as things are."""
    found, left = [], parts.left
    if wish.kv_cache_bytes is not None and left >= wish.needed:
        found.append(f"--kv-cache-bytes {max(wish.needed, min(left, given))}")
    if wish.block_bytes and given <= left:
        tokens = max(given, 0) // wish.block_bytes * wish.block_tokens
        if _LEAST_TOKENS <= tokens < wish.tokens:
            found.append(f"--max-model-len {tokens}")
    if wish.kv_cache_bytes is None:
        found += _room_makers(parts, wish, wish.needed - left)
    elif given >= wish.needed:
        found += _room_makers(parts, wish, given - left)
    found.append("a base that is stored quantised, a smaller one, or a larger device")
    taken = (
        f"base {size(parts.base)}, adapters {size(parts.adapters)}, graphs {size(parts.graphs)}, "
        f"scratch {size(parts.scratch)} of {size(parts.limit)}"
    )
    return f"Taken: {taken}. What would fit: " + "; ".join(found)


def _room_makers(parts: Parts, wish: Wish, short: int) -> list[str]:
    """Settings that free `short` bytes, each alone."""
    found = []
    if parts.adapters - short >= wish.least_arena > 0:
        found.append(f"--adapter-device-bytes {parts.adapters - short}")
    elif parts.adapters >= short:
        found.append("--no-adapters")
    share = ceil((parts.limit + short + 1) / parts.total * 1000) / 1000
    if share <= _HIGHEST_SHARE:
        found.append(f"--gpu-memory-utilization {share:g}")
    if wish.half_weights >= short:
        found.append("--dtype bfloat16")
    if parts.graphs > short:
        found.append("fewer --max-sequences, for which there are fewer graphs")
    if parts.scratch > short:
        found.append("fewer --max-batch-tokens")
    return found


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """A line of the table."""

    name: str
    bytes: int | None  # None: nothing of the kind is there
    note: str


def memory_table(lines: list[MemoryLine], device: str) -> str:
    """The lines as a table, with their sum."""
    rows = [
        (each.name, "-" if each.bytes is None else size(each.bytes), each.note) for each in lines
    ]
    rows.append(("sum", size(sum(each.bytes or 0 for each in lines)), device))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join([f"  {n:<{width}}  {count:>10}  {note}".rstrip() for n, count, note in rows])


def size(count: int) -> str:
    """Bytes for people."""
    if abs(count) >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.1f} MiB" if abs(count) >= MIB else f"{count} B"
