"""All trainable parameters as one float32 vector, cut into blocks of one size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

BLOCK_SIZE = 4096
"""Values of a block: devices own whole blocks, and norms are summed block by block. A part of
every run's arithmetic: another size is another order of sums."""


@dataclass(frozen=True)
class Leaf:
    """One parameter array in the vector.

    Attributes:
        name: its path in the model's tree, such as `layers/attention/q_proj/kernel`.
        shape: as in the model.
        is_decayed: whether weight decay acts on it.
    """

    name: str
    shape: tuple[int, ...]
    is_decayed: bool

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FlatVector:
    """Where each leaf lies: those that decay first, each group in the order of the model.

    The vector is padded with zeros to whole blocks, whatever the number of devices.

    Attributes:
        leaves: in the order of the vector.
        block_size: values of a block.
    """

    leaves: tuple[Leaf, ...]
    block_size: int = BLOCK_SIZE

    @classmethod
    def of(cls, leaves: Sequence[Leaf], block_size: int = BLOCK_SIZE) -> FlatVector:
        """The vector of `leaves`, given in the model's order."""
        return cls(tuple(sorted(leaves, key=lambda leaf: not leaf.is_decayed)), block_size)

    @cached_property
    def num_values(self) -> int:
        """Values without the padding."""
        return sum(leaf.size for leaf in self.leaves)

    @cached_property
    def num_decayed(self) -> int:
        """Weight decay acts on the first so many values."""
        return sum(leaf.size for leaf in self.leaves if leaf.is_decayed)

    @property
    def num_blocks(self) -> int:
        """Blocks, the last one padded."""
        return max(1, -(-self.num_values // self.block_size))

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """Leaf name -> place of its first value."""
        places: dict[str, int] = {}
        offset = 0
        for leaf in self.leaves:
            places[leaf.name] = offset
            offset += leaf.size
        return places

    def to_json(self) -> dict[str, Any]:
        """`from_json` is its inverse."""
        leaves = [[leaf.name, list(leaf.shape), leaf.is_decayed] for leaf in self.leaves]
        return {"leaves": leaves, "block_size": self.block_size}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FlatVector:
        """The inverse of `to_json`."""
        leaves = tuple(Leaf(name, tuple(shape), bool(d)) for name, shape, d in value["leaves"])
        return cls(leaves, int(value["block_size"]))
