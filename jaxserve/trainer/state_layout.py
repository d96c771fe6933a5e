"""A training state as one flat buffer of bytes, the same for every number of devices.

Imports no jax: the supervisor keeps such buffers and knows neither models nor devices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from jaxserve.trainer.errors import StateMismatch
from jaxserve.trainer.flat_vector import FlatVector

Buffer: TypeAlias = memoryview | bytearray | npt.NDArray[np.uint8]
"""Writable bytes of the layout's size; they are viewed, never copied."""
Array: TypeAlias = npt.NDArray[Any]

PARAMS = "params"
ALIGNMENT_BYTES = 64
SCALAR_DTYPES = ("float32", "int32", "uint32", "int64", "bool")


@dataclass(frozen=True)
class Scalar:
    """A small array that every device holds whole: a count, a ring of losses.

    Attributes:
        name: its path, such as `opt_state/0/count`.
        shape: of the array.
        dtype: one of `SCALAR_DTYPES`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class StateLayout:
    """Segments of the buffer: vectors of the parameters' size first, then the scalars.

    Attributes:
        flat: where each parameter lies in a vector.
        vectors: names of the vectors, float32 each: `params` (the master copy) first, then
            one for each moment of the optimizer (`opt_state/0/mu`), then `ema` if there is one.
        scalars: the rest.
    """

    flat: FlatVector
    vectors: tuple[str, ...]
    scalars: tuple[Scalar, ...]

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector with its padding."""
        return self.flat.num_blocks * self.flat.block_size * 4

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """Segment name -> its first byte."""
        places: dict[str, int] = {}
        offset = 0
        sizes = [(name, self.vector_bytes) for name in self.vectors]
        sizes += [(scalar.name, scalar.size_bytes) for scalar in self.scalars]
        for name, size in sizes:
            places[name] = offset
            offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        places[""] = offset
        return places

    @property
    def size_bytes(self) -> int:
        """Bytes of a buffer."""
        return self.offsets[""]

    def vector(self, buffer: Buffer, name: str) -> npt.NDArray[np.float32]:
        """A view of one vector, float32[num_blocks, block_size]."""
        first = self.offsets[name]
        part = _bytes_of(buffer, self.size_bytes)[first : first + self.vector_bytes]
        return part.view(np.float32).reshape(self.flat.num_blocks, self.flat.block_size)

    def scalar(self, buffer: Buffer, name: str) -> Array:
        """A view of one scalar, in its shape and dtype."""
        spec = self._scalars_by_name[name]
        first = self.offsets[name]
        part = _bytes_of(buffer, self.size_bytes)[first : first + spec.size_bytes]
        return part.view(np.dtype(spec.dtype)).reshape(spec.shape)

    def tree(self, buffer: Buffer) -> dict[str, Any]:
        """Nested dicts of views into the buffer, in the models' leaf shapes.

        A leaf is named `params/<path>`, `ema/<path>`, `opt_state/<place>/<path>`, or as the
        scalar is. Padding is not in it.
        """
        root: dict[str, Any] = {}
        for name, view in self._views(buffer):
            node = root
            *parents, last = name.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = view
        return root

    def fill(self, buffer: Buffer, tree: Mapping[str, Any]) -> None:
        """Copies the leaves of `tree` into the buffer and zeros the padding.

        Args:
            buffer: where to.
            tree: nested mappings with the leaves of `self.tree`, in any nesting or flat by name.

        Raises:
            StateMismatch: a leaf is missing, superfluous, or has another shape or dtype;
                the buffer is untouched then.
        """
        given = dict(_named_leaves(tree))
        views = dict(self._views(buffer))
        problems = [f"{name} is missing" for name in sorted(views.keys() - given.keys())]
        problems += [f"{name} is unknown" for name in sorted(given.keys() - views.keys())]
        for name in sorted(views.keys() & given.keys()):
            mine, theirs = _kind(views[name]), _kind(given[name])
            if mine != theirs:
                problems.append(f"{name} is {theirs}, not {mine}")
        if problems:
            more = "" if len(problems) < 9 else f", and {len(problems) - 8} more"
            raise StateMismatch(
                f"these arrays are another state: {'; '.join(problems[:8])}{more}. "
                "Use the model, optimizer and sizes that they were saved with"
            )
        for name, view in views.items():
            view[...] = given[name]
        for vector in self.vectors:
            self.vector(buffer, vector).reshape(-1)[self.flat.num_values :] = 0.0

    def digest(self) -> str:
        """sha256 in hex of the layout: buffers of equal digests have equal segments."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A value to hand to another process; `from_json` is its inverse."""
        scalars = [[one.name, list(one.shape), one.dtype] for one in self.scalars]
        return {"flat": self.flat.to_json(), "vectors": list(self.vectors), "scalars": scalars}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StateLayout:
        """The inverse of `to_json`."""
        scalars = tuple(
            Scalar(name, tuple(shape), dtype) for name, shape, dtype in value["scalars"]
        )
        return cls(FlatVector.from_json(value["flat"]), tuple(value["vectors"]), scalars)

    @cached_property
    def _scalars_by_name(self) -> Mapping[str, Scalar]:
        return {scalar.name: scalar for scalar in self.scalars}

    def _views(self, buffer: Buffer) -> Iterator[tuple[str, Array]]:
        for vector in self.vectors:
            values = self.vector(buffer, vector).reshape(-1)
            for leaf in self.flat.leaves:
                first = self.flat.offsets[leaf.name]
                yield f"{vector}/{leaf.name}", values[first : first + leaf.size].reshape(leaf.shape)
        for scalar in self.scalars:
            yield scalar.name, self.scalar(buffer, scalar.name)


def _bytes_of(buffer: Buffer, size_bytes: int) -> npt.NDArray[np.uint8]:
    view = np.frombuffer(buffer, np.uint8) if not isinstance(buffer, np.ndarray) else buffer
    if view.size != size_bytes:
        raise StateMismatch(f"a buffer of {view.size} bytes for a state of {size_bytes} bytes")
    return view


def _named_leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Array]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _named_leaves(value, f"{name}/")
        else:
            yield name, np.asarray(value)


def _kind(array: Array) -> str:
    return f"{array.dtype.name}{list(array.shape)}"
