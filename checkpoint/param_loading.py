"""Parameters from a TensorSource through a NameTable, and back to named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.name_table import NameTable, TensorRule
from checkpoint.tensor_source import TensorSource

Leaf: TypeAlias = Any
Progress: TypeAlias = Callable[[int, int], None]
"""Called as `progress(done_bytes, total_bytes)`, in bytes of the loaded parameters."""

Place: TypeAlias = Callable[[str, npt.NDArray[Any]], Leaf]
"""`place(path, host)` puts a host array, which nobody else holds, where the leaf of that path
shall live."""

MAX_NAMES_IN_ERROR = 20
NOT_FLOATING = ("int", "uint", "bool", "complex")


def put_on_device(path: str, host: npt.NDArray[Any]) -> jax.Array:
    """A `Place`: the default device."""
    del path
    placed: jax.Array = jax.device_put(host)
    return placed


def load_params(
    source: TensorSource,
    table: NameTable,
    abstract: Mapping[str, Any],
    *,
    place: Place = put_on_device,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read every leaf of `abstract`.

    Each leaf is filled layer by layer in its final dtype and then handed to `place`, so
    that beside the parameters no more than one leaf and one tensor are held.

    Args:
        source: the file or folder.
        table: which tensor is which leaf.
        abstract: nested dict of `jax.ShapeDtypeStruct`; gives shapes and dtypes.
        place: see `Place`.
        progress: see `Progress`.

    Returns:
        A nested dict like `abstract`, with the arrays that `place` returned.

    Raises:
        FormatError: tensors that are missing, unexpected, mis-shaped or that should be
            copies and are not; all of them in one message.
    """
    leaves = flatten(abstract)
    rules = {rule.path: rule for rule in table.rules}
    if rules.keys() != leaves.keys():
        raise AssertionError(f"name table and parameters differ: {rules.keys() ^ leaves.keys()}")
    problems = list(_problems(source, table, leaves))
    if problems:
        raise FormatError(_problem_text(problems))
    total_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
    done_bytes = 0
    loaded: dict[str, Leaf] = {}
    for path, leaf in leaves.items():
        host = np.empty(leaf.shape, leaf.dtype)
        for name, part in _parts(rules[path], host):
            part[...] = rules[path].transform.to_leaf(source.read(name))
            done_bytes += part.nbytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        loaded[path] = place(path, host)
    return unflatten(loaded)


def export_tensors(
    params: Mapping[str, Any], table: NameTable
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The file's view of parameters: `(name, array)` for each tensor, in the leaves' dtype.

    The inverse of `load_params`: loading what this yields gives the same bits.
    """
    leaves = flatten(params)
    for rule in table.rules:
        for name, part in _parts(rule, np.asarray(leaves[rule.path])):
            yield name, np.ascontiguousarray(rule.transform.to_file(part))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Leaf]:
    """Nested dicts to one dict whose keys are joined by dots."""
    flat: dict[str, Leaf] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Leaf]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _parts(rule: TensorRule, leaf: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The tensors that make up one leaf, each with its view of the leaf."""
    for name, index in rule.parts(leaf.shape):
        yield name, leaf[index]


def _expected_shapes(table: NameTable, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in table.rules:
        shape = leaves[rule.path].shape
        file_shape = rule.transform.file_shape(shape[rule.num_stacked_axes :])
        shapes.update({name: file_shape for name, _ in rule.parts(shape)})
    return shapes


def _problems(source: TensorSource, table: NameTable, leaves: Mapping[str, Any]) -> Iterator[str]:
    present = set(source.names())
    expected = _expected_shapes(table, leaves)
    for name in sorted(expected.keys() - present):
        yield f"missing: {name}"
    for name in sorted(present - expected.keys() - table.copies.keys()):
        if not table.is_ignored(name):
            yield f"unexpected: {name}"
    for name in sorted(expected.keys() & present):
        info = source.info(name)
        if info.shape != expected[name]:
            yield f"wrong shape: {name} is {info.shape}, the config needs {expected[name]}"
        if info.dtype.startswith(NOT_FLOATING):
            yield f"wrong dtype: {name} is {info.dtype}, not a floating-point type"
    for copy, original in table.copies.items():
        if {copy, original} <= present and not _same_values(source, copy, original):
            yield f"not tied: {copy} differs from {original}, yet the config ties them"


def _same_values(source: TensorSource, first: str, second: str) -> bool:
    if source.info(first).shape != source.info(second).shape:
        return False
    return bool(np.array_equal(source.read(first), source.read(second)))


def _problem_text(problems: list[str]) -> str:
    shown = problems[:MAX_NAMES_IN_ERROR]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    return (
        "the tensors do not fit the model's config; is the download whole, and is it this "
        "model's config?\n  " + "\n  ".join(shown)
    )
