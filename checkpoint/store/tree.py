"""Pytrees as named host arrays, and back: the store keeps arrays by name, never objects.

A leaf's name is its path in the tree with slashes, `opt_state/0/mu/layers/wq`. NamedTuples,
tuples, lists and dicts only give names; what has no leaves (`optax.EmptyState()`, None)
leaves no trace. The tree handed to `fill` gives the structure back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt

from checkpoint.store.digests import array_hash
from checkpoint.store.errors import TreeMismatch, UnsupportedLeaf

PyTree: TypeAlias = Any
HostArray: TypeAlias = npt.NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in (
        *(np.bool_, np.int8, np.int16, np.int32, np.int64),
        *(np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
        *(ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.uint4),
        *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3b11fnuz),
    )
}
"""What can be stored, by name."""

_PYTHON_SCALARS = {bool: "bool", int: "int64", float: "float64", complex: "complex128"}
MAX_NAMES_IN_ERROR = 12


@dataclass(frozen=True)
class HostLeaf:
    """One leaf on the host.

    Attributes:
        array: the values, C-order, in the machine's byte order, owned by nobody else.
        key_impl: for PRNG keys, whose `array` is the key data: the name of the generator.
    """

    array: HostArray
    key_impl: str | None = None


def to_host(tree: PyTree) -> dict[str, HostLeaf]:
    """Copies every leaf to the host, so that the caller may at once donate or change it.

    Raises:
        UnsupportedLeaf: names the leaf, and what would do.
    """
    named = _named_leaves(tree)
    for leaf in named.values():
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and not _is_key(leaf):
            leaf.copy_to_host_async()
    return {name: _host_leaf(name, leaf) for name, leaf in named.items()}


def fill(
    abstract: PyTree, stored: Mapping[str, Stored], read: Callable[[str], HostArray]
) -> PyTree:
    """A tree like `abstract` with values from a store.

    Args:
        abstract: leaves say what becomes of each value: with a `sharding`
            (`jax.ShapeDtypeStruct`, `jax.Array`) a `jax.Array` placed so, otherwise a
            NumPy array; a Python number becomes one again.
        stored: what there is, by name.
        read: gives the verified values of one name, which become the caller's.

    Raises:
        TreeMismatch: before anything is read; lists all differences.
    """
    named = _named_leaves(abstract)
    problems = [*_differences(named, stored)]
    if problems:
        hidden = len(problems) - MAX_NAMES_IN_ERROR
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise TreeMismatch(
            "the checkpoint does not fit the tree asked for:\n  "
            + "\n  ".join(problems[:MAX_NAMES_IN_ERROR])
            + f"{more}\nRestore it with the model and optimizer that it was saved with"
        )
    leaves = [_place(name, leaf, read(name), stored[name]) for name, leaf in named.items()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), leaves)


@dataclass(frozen=True)
class Stored:
    """What a store knows of one leaf: see `HostLeaf`."""

    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None = None


def digest(array: HostArray) -> str:
    """BLAKE3 in hex of `DTYPE[DIM,DIM]`, a newline, and the little-endian C-order bytes.

    4-bit integers count one byte each, sign-extended.
    """
    hashed = array_hash(array.dtype.name, array.shape)
    if array.dtype.name in ("int4", "uint4"):
        array = array.astype(np.int8 if array.dtype.name == "int4" else np.uint8)
    little = array.dtype.newbyteorder("<")
    hashed.update(
        np.ascontiguousarray(array, dtype=little).reshape(-1).view(np.uint8).data
        if array.size
        else b""
    )
    return hashed.hexdigest()


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(_component(key) for key in path) or "value"
        if name in named:
            raise UnsupportedLeaf(
                f"two leaves are both called {name}; use keys that differ as text"
            )
        named[name] = leaf
    for name in named:
        parts = name.split("/")
        for length in range(1, len(parts)):
            if (parent := "/".join(parts[:length])) in named:
                raise UnsupportedLeaf(f"{parent} is a leaf and also holds {name}; rename one")
    return named


def _component(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            # A dot separates names in the array files.
            return quote(str(getattr(key, attribute)), safe=" ").replace(".", "%2E") or "%"
    raise UnsupportedLeaf(f"a node of the tree names its children by {key!r}, not by text")


def _is_here(leaf: jax.Array) -> bool:
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _host_leaf(name: str, leaf: Any) -> HostLeaf:
    if isinstance(leaf, jax.Array) and not _is_here(leaf):
        raise UnsupportedLeaf(
            f"{name} is spread over several processes ({leaf.sharding}); "
            "gather it in the process that saves"
        )
    if _is_key(leaf):
        data = np.array(jax.random.key_data(leaf), order="C", copy=True)
        return HostLeaf(data, str(jax.random.key_impl(leaf)))
    if type(leaf) in _PYTHON_SCALARS:
        try:
            return HostLeaf(np.array(leaf, dtype=_PYTHON_SCALARS[type(leaf)]))
        except OverflowError as error:
            raise UnsupportedLeaf(f"{name} = {leaf} needs more than 64 bits") from error
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise UnsupportedLeaf(
            f"{name} is a {type(leaf).__name__}; only arrays, numbers and PRNG keys are stored. "
            "Text and settings belong into `metadata`"
        )
    if np.dtype(leaf.dtype).newbyteorder("=").name not in DTYPES:
        raise UnsupportedLeaf(f"{name} has dtype {leaf.dtype}; stored are {', '.join(DTYPES)}")
    native = np.dtype(leaf.dtype).newbyteorder("=")
    return HostLeaf(np.array(leaf, dtype=native, order="C", copy=True))


def _differences(named: Mapping[str, Any], stored: Mapping[str, Stored]) -> list[str]:
    found = [f"{name}: not in the checkpoint" for name in named if name not in stored]
    found += [f"{name}: only in the checkpoint" for name in stored if name not in named]
    for name, leaf in named.items():
        if name in stored:
            wanted, there = _wanted(name, leaf), stored[name]
            shape = there.shape if there.key_impl is None else there.shape[:-1]
            dtype = there.dtype if there.key_impl is None else "PRNG key"
            if wanted != (shape, dtype):
                found.append(
                    f"{name}: {wanted[1]}{list(wanted[0])} is asked for, "
                    f"{dtype}{list(shape)} is stored"
                )
    return found


def _wanted(name: str, leaf: Any) -> tuple[tuple[int, ...], str]:
    if _is_key(leaf):
        return tuple(leaf.shape), "PRNG key"
    if type(leaf) in _PYTHON_SCALARS:
        return (), _PYTHON_SCALARS[type(leaf)]
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise UnsupportedLeaf(f"{name} is a {type(leaf).__name__}, not an array or a number")
    return tuple(leaf.shape), np.dtype(leaf.dtype).name


def _place(name: str, leaf: Any, array: HostArray, stored: Stored) -> Any:
    if type(leaf) in _PYTHON_SCALARS:
        return array.item()
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.Array) and not leaf.committed:
        sharding = None  # Free to follow the arrays it is computed with, as it was.
    if _is_key(leaf):
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=stored.key_impl)
        if key.dtype != leaf.dtype:
            raise TreeMismatch(f"{name}: a {leaf.dtype} is asked for, a {key.dtype} is stored")
        return key if sharding is None else jax.device_put(key, sharding)
    if isinstance(leaf, jax.Array) and sharding is None:
        placed: Any = jax.device_put(array)
    elif sharding is not None:
        placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    else:
        return array
    if placed.dtype != array.dtype:
        raise TreeMismatch(
            f"{name}: JAX would turn {array.dtype} into {placed.dtype}; "
            "enable jax_enable_x64, or ask for a NumPy array"
        )
    return placed
