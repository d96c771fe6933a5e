"""Runs the Triton kernels on a CPU, in Triton's interpreter: the same source, no compiler."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from models.ops.attention import triton_kernels

_TRITON_DTYPES = {
    "bfloat16": tl.bfloat16,
    "float32": tl.float32,
    "int32": tl.int32,
    "uint16": tl.uint16,
}


class HostArray:
    """What the interpreter asks of a tensor, over a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = _TRITON_DTYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> HostArray:
        return self

    def cpu(self) -> HostArray:
        return self

    def new_empty(self, *_: object, device: str) -> HostArray:
        assert device == "cpu"
        return HostArray(np.empty(0, self.array.dtype))

    def set_(self, storage: HostArray, *_: object) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def copy_(self, other: HostArray) -> None:
        assert other.array is self.array


@functools.cache
def interpreted_kernels() -> ModuleType:
    """A second copy of the module, whose functions are interpreted."""
    name = "interpreted_triton_kernels"
    spec = importlib.util.spec_from_file_location(name, triton_kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


def interpret(
    kernel: str,
    arrays: Sequence[jax.Array],
    out_types: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    constants: Mapping[str, Any],
    aliases: Mapping[int, int] | None = None,
    **_: object,
) -> list[jax.Array]:
    """In the place of `triton_call`; memory that it would leave uninitialised holds NaN."""
    aliases = aliases or {}
    inputs = [np.array(array) for array in arrays]
    outputs = [_poisoned(out) for out in out_types]
    for argument, result in aliases.items():
        outputs[result] = inputs[argument]
    values = {
        name: getattr(tl, value) if name.endswith("_DTYPE") else value
        for name, value in constants.items()
    }
    function = getattr(interpreted_kernels(), kernel)
    with (
        patch.object(interpreter, "_patch_lang_tensor", _patch_tensor),
        patch.object(interpreter, "_convert_float", _convert),
        patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
        patch.object(interpreter.InterpreterBuilder, "create_fma", _fma),
        patch.multiple(tl, max=_max, sum=_sum, zeros=_zeros),
    ):
        function[grid](*(HostArray(array) for array in [*inputs, *outputs]), **values)
    return [jnp.asarray(output) for output in outputs]


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """NumPy 2.4 and later do not convert an array of one element to an index, as Triton does."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter keeps bfloat16 as its bits, and would multiply those."""
    return _create_dot(self, _widened(a), _widened(b), *rest)


def _widened(handle: Any) -> Any:
    if handle.dtype != tl.bfloat16:
        return handle
    values = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """Rounds once, as GPUs do; the interpreter rounds the product too."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)


_convert_float = interpreter._convert_float


def _convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """To the nearest bfloat16, as GPUs do; the interpreter cuts off."""
    if source == tl.float32 and target == tl.bfloat16:
        return data.astype(ml_dtypes.bfloat16).view(np.uint16)
    return _convert_float(data, source, target, rounding)


# Triton compiles these functions of its own, unless an environment switch is set at import.
def _max(values: Any, axis: int) -> Any:
    return tl.reduce(values, axis, tl.standard._elementwise_max)


def _sum(values: Any, axis: int) -> Any:
    return tl.reduce(values, axis, tl.standard._sum_combine)


def _zeros(shape: Any, dtype: Any) -> Any:
    return tl.full(shape, 0, dtype)


def _poisoned(out: jax.ShapeDtypeStruct) -> np.ndarray:
    if out.dtype == jnp.int32:
        return np.full(out.shape, -1, np.int32)
    return np.full(out.shape, np.nan, out.dtype)
