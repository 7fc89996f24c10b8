"""What a GPU would punish and Triton's interpreter forgives: a sanitizer for launches under it.

Inside `sanitized`, every launch runs its programs in a shuffled order and raises

    OutOfBoundsError   a load or store outside the storages of the launch's tensors
    RaceError          two programs touch one address and one of them writes it (atomics on both
                       sides excepted), or lanes of one store write different values to one address
    FalseHintError     the values contradict tl.multiple_of, tl.max_contiguous or tl.max_constancy:
                       the compiler would have made wide loads of it, at the wrong addresses
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

Array = NDArray[Any]

NOBODY, SEVERAL = -1, -2  # among program numbers in the shadow of a storage


class KernelError(AssertionError):
    """A kernel did what a GPU need not forgive."""


class OutOfBoundsError(KernelError):
    """An access outside every tensor of the launch."""


class RaceError(KernelError):
    """The result depends on the order of programs or lanes."""


class FalseHintError(KernelError):
    """The kernel promised the compiler what its values don't keep."""


class Shadow:
    """Who read and wrote each byte of one storage during one launch."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        self.writer = np.full(size, NOBODY, np.int64)
        self.reader = np.full(size, NOBODY, np.int64)
        self.atomic = np.zeros(size, bool)  # the last write was

    def load(self, places: Array, program: int) -> None:
        if _of_others(self.writer[places], program).any():
            raise RaceError(f"program {program} reads what another program of the launch writes")
        seen = self.reader[places]
        self.reader[places] = np.where((seen == NOBODY) | (seen == program), program, SEVERAL)

    def store(self, places: Array, program: int, atomic: bool) -> None:
        written = _of_others(self.writer[places], program)
        if atomic:
            written &= ~self.atomic[places]
        if written.any():
            raise RaceError(f"program {program} writes where another program of the launch writes")
        if _of_others(self.reader[places], program).any():
            raise RaceError(f"program {program} writes what another program of the launch reads")
        self.writer[places] = program
        self.atomic[places] = atomic


def _of_others(programs: Array, program: int) -> Array:
    others: Array = (programs != NOBODY) & (programs != program)
    return others


class Sanitizer:
    """Watches the launches of one `sanitized` block."""

    def __init__(self, reachable: Iterable[torch.Tensor], seed: int) -> None:
        self.reachable = list(reachable)
        self.random = random.Random(seed)
        self.shadows: list[Shadow] = []
        self.starts = np.zeros(0, np.uint64)
        self.order: list[int] = []

    def begin(self, arguments: Iterable[Any]) -> None:
        """A launch starts: nobody has read or written anything."""
        tensors = [one for one in arguments if isinstance(one, torch.Tensor)] + self.reachable
        storages = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
        self.shadows = [Shadow(start, size) for start, size in sorted(storages) if size]
        self.starts = np.array([shadow.start for shadow in self.shadows], np.uint64)
        self.order = []

    def place(self, index: tuple[int, int, int], grid: tuple[int, int, int]) -> tuple[int, ...]:
        """The program to run where the interpreter would run `index`."""
        count = grid[0] * grid[1] * grid[2]
        if not self.order:
            self.order = list(range(count))
            self.random.shuffle(self.order)
        turn = self.order[int(np.ravel_multi_index(index, grid))]
        return tuple(int(part) for part in np.unravel_index(turn, grid))

    def access(self, pointers: Any, mask: Any, kind: str, value: Any = None) -> None:
        """Check one load, store or atomic of the running program."""
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[active].astype(np.uint64)
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        builder = interpreter.interpreter_builder
        program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        if value is not None:
            _check_lanes(addresses, np.broadcast_to(value.data, active.shape)[active], program)
        owner = np.searchsorted(self.starts, addresses, side="right") - 1
        for number in np.unique(owner):
            places = self._places(int(number), addresses[owner == number], size, kind, program)
            if kind == "load":
                self.shadows[number].load(places, program)
            else:
                self.shadows[number].store(places, program, atomic=kind == "atomic")

    def _places(self, owner: int, addresses: Array, size: int, kind: str, program: int) -> Array:
        """The bytes touched, as offsets into the storage that owns them."""
        if owner < 0:
            raise OutOfBoundsError(f"program {program}: {kind} below every tensor of the launch")
        shadow = self.shadows[owner]
        offsets = (addresses - np.uint64(shadow.start)).astype(np.int64)
        outside = offsets + size > shadow.size
        if outside.any():
            raise OutOfBoundsError(
                f"program {program}: {kind} of {int(outside.sum())} elements at byte "
                f"{int(offsets[outside][0])} and on of a storage of {shadow.size} bytes"
            )
        return (offsets[:, None] + np.arange(size)).ravel()


def _check_lanes(addresses: Array, values: Array, program: int) -> None:
    order = np.argsort(addresses, kind="stable")
    same = addresses[order][1:] == addresses[order][:-1]
    if same.any():
        bits = np.ascontiguousarray(values[order]).view(f"u{values.dtype.itemsize}")
        if (bits[1:] != bits[:-1])[same].any():
            raise RaceError(
                f"program {program}: lanes of one store write different values to one place"
            )


def check_hint(name: str, promised: list[int], values: Array, step: int) -> None:
    """Raise FalseHintError where `values` break a promise of Triton's compiler hints.

    promised: for each axis. step: what the next value of a contiguous run adds (element size of
    pointers, 1 of integers).
    """
    for axis, promise in enumerate(promised):
        if promise <= 1:
            continue
        along = np.moveaxis(values, axis, -1).astype(np.int64) if values.ndim else values[None]
        if not _HINTS[name](along, promise, step):
            raise FalseHintError(
                f"{name} of {promise} on axis {axis} is not true of the values there"
            )


def _divisible(along: Array, promise: int, step: int) -> bool:
    """The first value of every contiguous run is a multiple, which is what the compiler assumes."""
    starts = np.ones(along.shape, bool)
    starts[..., 1:] = np.diff(along, axis=-1) != step
    return bool((along[starts] % promise == 0).all())


def _contiguous(along: Array, promise: int, step: int) -> bool:
    groups = _groups(along, promise)
    return bool((np.diff(groups, axis=-1) == step).all())


def _constant(along: Array, promise: int, _step: int) -> bool:
    return bool((np.diff(_groups(along, promise), axis=-1) == 0).all())


def _groups(along: Array, promise: int) -> Array:
    """Cut the last axis in groups; a promise longer than the axis is one group."""
    length = min(promise, along.shape[-1])
    return along.reshape(*along.shape[:-1], -1, length)


_HINTS = {"tt.divisibility": _divisible, "tt.contiguity": _contiguous, "tt.constancy": _constant}


class _Watch:
    """The sanitizer that launches report to, if any."""

    active: Sanitizer | None = None


@functools.cache
def _install() -> _Watch:
    """Let the interpreter report what it does. Costs nothing measurable while nobody watches."""
    watch = _Watch()
    _report_memory(watch)
    _report_launches(watch)
    _report_hints(watch)
    return watch


def _report_memory(watch: _Watch) -> None:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    update, exchange = builder.create_atomic_rmw, builder.create_atomic_cas

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        if watch.active:
            watch.active.access(pointers, mask, "load")
        return load(self, pointers, mask, *rest, **named)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if watch.active:
            watch.active.access(pointers, mask, "store", value)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *r: Any) -> Any:
        if watch.active:
            watch.active.access(pointers, mask, "atomic")
        return update(self, op, pointers, value, mask, *r)

    def create_atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        if watch.active:
            every = interpreter.TensorHandle(np.ones_like(pointers.data, bool), interpreter.tl.int1)
            watch.active.access(pointers, every, "atomic")
        return exchange(self, pointers, *rest)

    builder.create_masked_load, builder.create_masked_store = (
        create_masked_load,
        create_masked_store,
    )
    builder.create_atomic_rmw, builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


def _report_launches(watch: _Watch) -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    take_arguments, move_to = executor._init_args_hst, builder.set_grid_idx

    def _init_args_hst(self: Any, arguments: Any, named: Any) -> Any:
        taken, taken_named = take_arguments(self, arguments, named)
        if watch.active:
            watch.active.begin([*taken, *taken_named.values()])
        return taken, taken_named

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if watch.active:
            x, y, z = watch.active.place((x, y, z), self.grid_dim)
        move_to(self, x, y, z)

    executor._init_args_hst = _init_args_hst
    builder.set_grid_idx = set_grid_idx


def _report_hints(watch: _Watch) -> None:
    handle = interpreter.TensorHandle
    set_attr = handle.set_attr

    def checked_set_attr(self: Any, key: str, values: Any) -> None:
        if watch.active and key in _HINTS:
            is_pointer = isinstance(self.dtype.scalar, interpreter.tl.pointer_type)
            step = self.get_element_ty().primitive_bitwidth // 8 if is_pointer else 1
            check_hint(key, [int(value) for value in values], self.data, step)
        set_attr(self, key, values)

    handle.set_attr = checked_set_attr


@contextlib.contextmanager
def sanitized(*reachable: torch.Tensor, seed: int = 0) -> Iterator[None]:
    """Check every launch inside. Raises a KernelError as it is, not wrapped by the interpreter.

    reachable: tensors that the kernels reach without having them as arguments (through tables of
    addresses). seed: of the order in which programs run.
    """
    watch = _install()
    before, watch.active = watch.active, Sanitizer(reachable, seed)
    try:
        yield
    except InterpreterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KernelError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    finally:
        watch.active = before
