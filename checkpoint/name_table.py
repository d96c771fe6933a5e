"""NameTable: which tensor of a file is which leaf of the parameters, in both directions.

A table is data. One rule pairs a file's name, with `{layer}` for a layer's number, with a
path in the parameters' pytree; a named, invertible transform says how the arrays differ.
Rules with `{layer}` fill, layer by layer, a leaf that is stacked on a leading axis; where a
file has a tensor for each expert, `{expert}` stands for its number and the second axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
LAYER, EXPERT = "{layer}", "{expert}"


@dataclass(frozen=True, slots=True)
class Transform:
    """How a file's array becomes a leaf, and back, without loss.

    Both functions return views where they can; neither changes its argument.
    """

    name: str
    to_leaf: Callable[[Array], Array]
    to_file: Callable[[Array], Array]
    file_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """The file's shape for a leaf's shape."""
    swaps_axes: bool = False
    """Whether the leaf's first axis is the file's last one."""
    num_groups: int | None = None
    """Equal groups of the file's rows, such as heads, of which each is transformed as a whole;
    None when each row is on its own."""
    for_groups: Callable[[int], Transform] | None = None
    """The same transform of an array that has only so many of the groups."""
    of_one: Transform | None = None
    """The same transform of one of those that the first axis counts."""

    def of_groups(self, num_groups: int) -> Transform:
        """The transform for a part of the file's rows that has `num_groups` of its groups."""
        return self if self.for_groups is None else self.for_groups(num_groups)


IDENTITY = Transform("identity", lambda a: a, lambda a: a, lambda shape: shape)
TRANSPOSE = Transform(
    "transpose", lambda a: a.T, lambda a: a.T, lambda shape: shape[::-1], swaps_axes=True
)
TRANSPOSE_EACH = Transform(
    "transpose_each",
    lambda a: a.swapaxes(-1, -2),
    lambda a: a.swapaxes(-1, -2),
    lambda shape: (*shape[:-2], shape[-1], shape[-2]),
    of_one=TRANSPOSE,
)
"""Of an array that stacks matrices on leading axes."""


def unpermute_rope(num_heads: int) -> Transform:
    """Rows of a rotary projection from neighbouring pairs to the half-split layout.

    A file with neighbouring pairs holds a head's output rows as `0, D/2, 1, D/2 + 1, ...`;
    ours are `0, 1, ..., D-1`. Works on `[heads * D, in]` and on a bias `[heads * D]`.
    """

    def regroup(array: Array, pair_axes: tuple[int, int]) -> Array:
        rows = array.reshape(num_heads, *pair_axes, *array.shape[1:])
        return rows.swapaxes(1, 2).reshape(array.shape)

    def half(array: Array) -> int:
        return int(array.shape[0]) // num_heads // 2

    return Transform(
        f"unpermute_rope({num_heads})",
        lambda a: regroup(a, (half(a), 2)),
        lambda a: regroup(a, (2, half(a))),
        lambda shape: shape,
        num_groups=num_heads,
        for_groups=unpermute_rope,
    )


def chain(first: Transform, second: Transform) -> Transform:
    """`first`, then `second`, on the way from the file to the leaf.

    Only `first` may have groups: they are groups of the file's rows.
    """
    if second.num_groups is not None:
        raise AssertionError(f"{second.name} after {first.name}: groups are of the file's rows")
    names = [transform.name for transform in (first, second) if transform is not IDENTITY]
    return Transform(
        ", ".join(names) or IDENTITY.name,
        lambda a: second.to_leaf(first.to_leaf(a)),
        lambda a: first.to_file(second.to_file(a)),
        lambda shape: first.file_shape(second.file_shape(shape)),
        swaps_axes=first.swaps_axes != second.swaps_axes,
        num_groups=first.num_groups,
        for_groups=None
        if first.for_groups is None
        else lambda num_groups: chain(first.of_groups(num_groups), second),
    )


@dataclass(frozen=True, slots=True)
class TensorRule:
    """One line of a table."""

    name: str
    """Name in the file; `{layer}` and `{expert}` stand for numbers."""
    path: str
    """Path of the leaf, keys joined by dots, e.g. `layers.attention.q_proj.kernel`."""
    transform: Transform = IDENTITY

    @property
    def num_stacked_axes(self) -> int:
        """How many leading axes of the leaf are numbers in the name: none, layers, or layers
        and experts."""
        return (LAYER in self.name) + (EXPERT in self.name)

    @property
    def is_stacked(self) -> bool:
        """Whether the leaf has a leading axis of layers."""
        return self.num_stacked_axes > 0

    def parts(self, leaf_shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The file's tensors that make up the leaf, in order.

        Args:
            leaf_shape: of the whole leaf.

        Yields:
            `(name, index)`: the tensor called `name` is `leaf[index]`, transformed.
        """
        for index in np.ndindex(*leaf_shape[: self.num_stacked_axes]):
            name = self.name
            for placeholder, number in zip((LAYER, EXPERT), index, strict=False):
                name = name.replace(placeholder, str(number))
            yield name, index


@dataclass(frozen=True, slots=True)
class NameTable:
    """All rules of one family for one file convention."""

    rules: tuple[TensorRule, ...]
    ignored: tuple[str, ...] = ()
    """Regular expressions (whole name) of tensors that files carry and nobody needs."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that may be present, and must then equal another one, e.g. a tied head."""

    def is_ignored(self, name: str) -> bool:
        """Whether `name` may be present and is not read."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)
