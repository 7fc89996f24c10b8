"""Repairs of Triton 3.7.1's interpreter, for tests alone.

As released it carries bfloat16 as raw uint16 and then computes with those integers: sums, products
and comparisons of bfloat16 are silently wrong, and float32 to bfloat16 truncates where hardware
rounds to nearest even. It also re-patches `triton.language` at every call of a nested function
(`tl.sum`, `tl.cdiv`, ...), milliseconds each. `install` mends both. Call it once, after setting
TRITON_INTERPRET=1 and before the first launch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Handle = Any  # interpreter.TensorHandle: a numpy array and Triton's name of its type
Array = NDArray[Any]

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def bfloat16_to_float32(bits: Array) -> Array:
    """The float32 values of bfloat16 held as uint16."""
    return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(bits.shape)


def float32_to_bfloat16(values: Array) -> Array:
    """float32 rounded to nearest even, as `cvt.rn.bf16.f32` does; uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    last_kept = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):  # NaN payloads may wrap; they are replaced below
        rounded = (bits + last_kept + np.uint32(0x7FFF)) >> np.uint32(16)
    quiet_nan = np.uint16(0x7FC0)
    chosen = np.where(np.isnan(values), quiet_nan, rounded.astype(np.uint16).reshape(values.shape))
    return chosen.astype(np.uint16)


@functools.cache
def install() -> None:
    """Repair the interpreter of this process. Further calls do nothing."""
    _repair_casts()
    _repair_arithmetic()
    _repair_reductions()
    _patch_language_once_a_launch()
    _look_up_dtypes_once()
    _skip_overflow_checks()


def _is_bfloat16(handle: Handle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: Handle) -> Handle:
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(bfloat16_to_float32(handle.data), tl.float32)


def _narrowed(handle: Handle) -> Handle:
    return interpreter.TensorHandle(float32_to_bfloat16(handle.data), tl.bfloat16)


def _repair_casts() -> None:
    builder = interpreter.InterpreterBuilder
    cast, convert = builder.cast_impl, builder.create_fp_to_fp
    truncate = interpreter._ir.ROUNDING_MODE.RTZ

    def cast_impl(self: Any, source: Handle, target: Any) -> Handle:
        if target.scalar == tl.bfloat16:
            if _is_bfloat16(source):
                return source
            return _narrowed(cast(self, source, tl.float32))
        return cast(self, _widened(source), target)

    def create_fp_to_fp(self: Any, source: Handle, target: Any, rounding: Any) -> Handle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return (
                convert(self, source, target, rounding)
                if rounding == truncate
                else (_narrowed(source))
            )
        return convert(self, source, target, rounding)

    def get_bf16(_self: Any, value: float) -> Handle:
        return _narrowed(interpreter.TensorHandle(np.array([value], np.float32), tl.float32))

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.get_bf16 = get_bf16


def _repair_arithmetic() -> None:
    """Compute on bfloat16 in float32 and round the result once."""
    builder = interpreter.InterpreterBuilder
    binary, unary, ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    dot, fma, rsqrt = builder.create_dot, builder.create_fma, builder.create_rsqrt

    def binary_op(self: Any, left: Handle, right: Handle, op: Any) -> Handle:
        if not (_is_bfloat16(left) or _is_bfloat16(right)):
            return binary(self, left, right, op)
        result = binary(self, _widened(left), _widened(right), op)
        return result if op in COMPARISONS else _narrowed(result)

    def unary_op(self: Any, value: Handle, op: Any) -> Handle:
        result = unary(self, _widened(value), op)
        return _narrowed(result) if _is_bfloat16(value) else result

    def ternary_op(self: Any, a: Handle, b: Handle, c: Handle, op: Any) -> Handle:
        if op is np.where or not _is_bfloat16(c):  # choosing between bit patterns is right as it is
            return ternary(self, a, b, c, op)
        return _narrowed(ternary(self, _widened(a), _widened(b), _widened(c), op))

    def create_fma(self: Any, x: Handle, y: Handle, z: Handle) -> Handle:
        result = fma(self, _widened(x), _widened(y), _widened(z))
        return _narrowed(result) if _is_bfloat16(z) else result

    def create_rsqrt(self: Any, value: Handle) -> Handle:
        result = rsqrt(self, _widened(value))
        return _narrowed(result) if _is_bfloat16(value) else result

    def create_dot(self: Any, a: Handle, b: Handle, sums: Handle, *how: Any) -> Handle:
        return dot(self, _widened(a), _widened(b), sums, *how)

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_fma, builder.create_rsqrt, builder.create_dot = (
        create_fma,
        create_rsqrt,
        create_dot,
    )


def _repair_reductions() -> None:
    """Reduce and scan bfloat16 in float32 and round each result once."""
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _in_float32(operation.apply_impl)


def _in_float32(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def applied(self: Any, inputs: Any) -> Any:
        narrow = [tensor.dtype == tl.bfloat16 for tensor in inputs]
        if not any(narrow):
            return apply(self, inputs)
        result = apply(self, tuple(_widened_tensor(tensor) for tensor in inputs))
        results = list(result) if isinstance(result, (list, tuple)) else [result]
        return [
            _narrowed_tensor(tensor) if was_narrow and tensor.dtype == tl.float32 else tensor
            for tensor, was_narrow in zip(results, narrow, strict=False)
        ]

    return applied


def _with_scalar(tensor: Any, handle: Handle, scalar: Any) -> Any:
    of_block = tensor.type.is_block()
    return tl.tensor(handle, tl.block_type(scalar, tensor.type.shape) if of_block else scalar)


def _widened_tensor(tensor: Any) -> Any:
    if tensor.dtype != tl.bfloat16:
        return tensor
    return _with_scalar(tensor, _widened(tensor.handle), tl.float32)


def _narrowed_tensor(tensor: Any) -> Any:
    return _with_scalar(tensor, _narrowed(tensor.handle), tl.bfloat16)


class _KeptPatches:
    """Stands in for the scope that the interpreter would restore too early."""

    def restore(self) -> None:
        """The whole launch restores its patches at its end."""


class _LaunchPatches:
    """What the running launch has patched in `triton.language`, by the modules a function sees."""

    def __init__(self) -> None:
        self.launches = 0  # running, the outermost included
        self.scopes: dict[tuple[int, ...], Any] = {}

    def restore(self) -> None:
        for scope in reversed(self.scopes.values()):
            scope.restore()
        self.scopes.clear()


def _patch_language_once_a_launch() -> None:
    patch_language, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patches = _LaunchPatches()
    languages = (tl, tl.core)

    def patch_unless_done(function: Any) -> Any:
        if not patches.launches:
            return patch_language(function)
        seen = {id(value) for value in function.__globals__.values()}
        key = tuple(id(language) for language in languages if id(language) in seen)
        if key not in patches.scopes:
            patches.scopes[key] = patch_language(function)
        return _KeptPatches()

    def launch_and_restore(self: Any, *arguments: Any, **named: Any) -> None:
        patches.launches += 1
        try:
            with np.errstate(all="ignore"):  # a GPU raises no warning for inf - inf or exp(1000)
                launch(self, *arguments, **named)
        finally:
            patches.launches -= 1
            if not patches.launches:
                patches.restore()

    interpreter._patch_lang = patch_unless_done
    interpreter.GridExecutor.__call__ = launch_and_restore


def _look_up_dtypes_once() -> None:
    """The original builds a table of 17 types at every operation."""
    look_up = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def looked_up(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(scalar, tl.pointer_type):
            return look_up(scalar)
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = looked_up


def _skip_overflow_checks() -> None:
    """Each integer sum is checked in int64, and the verdict dropped unless debugging."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
