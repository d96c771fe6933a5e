"""Gradients between devices: sums along the fixed tree, and the gathering of what was split.

The programs here are partitioned over the mesh, which is harmless: they hold additions of
two operands in a fixed order, squares of inputs and copies, and nothing of it can be
regrouped or contracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.trainer.flat_vector import FlatVector
from jaxserve.trainer.gradient_tree import Node, TreeSum, subtrees, sum_nodes
from jaxserve.trainer.world import Range

AXIS = "devices"


@partial(jax.jit, donate_argnums=0)
def add(left: jax.Array, right: jax.Array) -> jax.Array:
    """`left + right`, in the place of `left`."""
    return left + right


@jax.jit
def square(values: jax.Array) -> jax.Array:
    """A program of its own: with the sums that follow, it would become fused multiply-adds."""
    return values * values


def block_sums(squares: jax.Array) -> jax.Array:
    """Sums of the rows of `[n, block_size]`, by halving: `[n]`."""
    size = squares.shape[1]
    while size > 1:
        size //= 2
        squares = squares[:, :size] + squares[:, size:]
    return squares[:, 0]


class Exchange:
    """The collectives of one set of devices.

    Each device owns the same number of whole blocks, its *chunk*; the last ones may own
    blocks beyond the vector's end, which are zero.

    Args:
        devices: all devices of all processes, in order.
        leaf_ranges: the leaves of the gradient tree that each of them computes.
        flat: the vector.
        num_leaves: leaves of the tree.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device],
        leaf_ranges: Sequence[Range],
        flat: FlatVector,
        num_leaves: int,
    ) -> None:
        self.devices = tuple(devices)
        self.num_devices = len(self.devices)
        self.flat = flat
        self.leaf_ranges = tuple(leaf_ranges)
        self.num_leaves = num_leaves
        self.chunk_blocks = -(-flat.num_blocks // self.num_devices)
        self.mesh = Mesh(np.asarray(self.devices, dtype=object), (AXIS,))
        process = jax.process_index()
        self.local = [
            place for place, device in enumerate(self.devices) if device.process_index == process
        ]
        self._split = NamedSharding(self.mesh, P(AXIS))

    def chunk_of(self, place: int) -> Range:
        """Blocks of the vector that the device at `place` owns, cut at the vector's end."""
        first = min(place * self.chunk_blocks, self.flat.num_blocks)
        return Range(first, min(first + self.chunk_blocks, self.flat.num_blocks))

    @cached_property
    def nodes(self) -> tuple[tuple[Node, ...], ...]:
        """For each device the sub-trees that its leaves add up to."""
        return tuple(subtrees(part.first, part.end) for part in self.leaf_ranges)

    def reduce(
        self, parts: Sequence[TreeSum[jax.Array]], losses: Sequence[Sequence[jax.Array]]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The root of the tree.

        Args:
            parts: of each local device its finished sum of gradients.
            losses: of each local device float32[1] of each of its leaves.

        Returns:
            For each local device its chunk of the gradient, float32[chunk_blocks, block_size],
            and the losses of all leaves, float32[num_leaves, 1].
        """
        if self.num_devices == 1:
            return [parts[0].parts[0][1]], self.gather_leaves(losses)
        num_slots = max(len(nodes) for nodes in self.nodes)
        slots = []
        for slot in range(num_slots):
            vectors = [
                part.parts[slot][1] if slot < len(part.parts) else self._zeros(place)
                for place, part in zip(self.local, parts, strict=True)
            ]
            slots.append(self.join(vectors))
        chunks = self.parts_of(self._reduce(tuple(slots)))
        return chunks, self.gather_leaves(losses)

    def gather_leaves(self, values: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
        """Small arrays `[n]` of each local device's leaves as `[num_leaves, n]` on each of them."""
        if self.num_devices == 1:
            return [_stack(self.num_leaves, tuple(values[0]))]
        max_leaves = max(len(part) for part in self.leaf_ranges)
        stacked = self.join([_stack(max_leaves, tuple(own)) for own in values])
        return self.parts_of(self._gather_leaves(stacked))

    def norm_squares(self, chunks: Sequence[jax.Array]) -> list[jax.Array]:
        """Sums of squares of all blocks, float32[num_blocks], on each local device."""
        if self.num_devices == 1:
            return [_block_sums(square(chunks[0]))]
        squares = self.join([square(chunk) for chunk in chunks])
        return self.parts_of(self._gather_sums(squares))

    def gather(self, chunks: Sequence[jax.Array]) -> list[jax.Array]:
        """Whole vectors `[num_blocks, block_size]` on each local device from chunks."""
        if self.num_devices == 1:
            return list(chunks)
        return self.parts_of(self._gather(self.join(chunks)))

    def gather_values(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """One small array of each device, `[n]`, as `[num_devices, n]` on each local one."""
        return self.parts_of(self._gather_small(self.join(values)))

    def _zeros(self, place: int) -> jax.Array:
        shape = (self.flat.num_blocks, self.flat.block_size)
        if place not in self._zeros_by_place:
            zeros = np.zeros(shape, np.float32)
            self._zeros_by_place[place] = jax.device_put(zeros, self.devices[place])
        return self._zeros_by_place[place]

    @cached_property
    def _zeros_by_place(self) -> dict[int, jax.Array]:
        return {}

    def replicate(self, trees: Sequence[Any]) -> Any:
        """One tree of arrays of the mesh from equal trees on each local device."""
        whole = NamedSharding(self.mesh, P())

        def joined(*arrays: jax.Array) -> jax.Array:
            return jax.make_array_from_single_device_arrays(arrays[0].shape, whole, list(arrays))

        return jax.tree.map(joined, *trees)

    def join(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """One array of the mesh whose parts along the first axis are those of the devices."""
        first = arrays[0].shape
        shape = (first[0] * self.num_devices, *first[1:])
        return jax.make_array_from_single_device_arrays(shape, self._split, list(arrays))

    def parts_of(self, array: jax.Array) -> list[jax.Array]:
        """The parts of an array of the mesh on each local device."""
        by_device = {shard.device: shard.data for shard in array.addressable_shards}
        return [by_device[self.devices[place]] for place in self.local]

    def _program(self, function: Any, out_specs: Any) -> Any:
        return jax.jit(
            jax.shard_map(
                function, mesh=self.mesh, in_specs=P(AXIS), out_specs=out_specs, check_vma=False
            )
        )

    @cached_property
    def _reduce(self) -> Any:
        num_devices, chunk = self.num_devices, self.chunk_blocks
        padding = num_devices * chunk - self.flat.num_blocks

        def reduce(slots: tuple[jax.Array, ...]) -> jax.Array:
            received: list[tuple[Node, jax.Array]] = []
            for slot, vector in enumerate(slots):
                padded = jnp.pad(vector, ((0, padding), (0, 0)))
                outgoing = padded.reshape(num_devices, chunk, self.flat.block_size)
                incoming = jax.lax.all_to_all(outgoing, AXIS, 0, 0)
                received += [
                    (nodes[slot], incoming[sender])
                    for sender, nodes in enumerate(self.nodes)
                    if slot < len(nodes)
                ]
            return sum_nodes(received, lambda left, right: left + right)

        return self._program(reduce, P(AXIS))

    @cached_property
    def _gather_leaves(self) -> Any:
        def gather_leaves(values: jax.Array) -> jax.Array:
            gathered = jax.lax.all_gather(values, AXIS)
            ordered = [gathered[place, : len(part)] for place, part in enumerate(self.leaf_ranges)]
            return jnp.concatenate(ordered)

        return self._program(gather_leaves, P())

    @cached_property
    def _gather_sums(self) -> Any:
        def gather_sums(squares: jax.Array) -> jax.Array:
            sums: jax.Array = jax.lax.all_gather(block_sums(squares), AXIS, tiled=True)
            return sums[: self.flat.num_blocks]

        return self._program(gather_sums, P())

    @cached_property
    def _gather(self) -> Any:
        def gather(chunk: jax.Array) -> jax.Array:
            whole: jax.Array = jax.lax.all_gather(chunk, AXIS, tiled=True)
            return whole[: self.flat.num_blocks]

        return self._program(gather, P())

    @cached_property
    def _gather_small(self) -> Any:
        return self._program(lambda value: jax.lax.all_gather(value, AXIS), P())


@jax.jit
def _block_sums(squares: jax.Array) -> jax.Array:
    return block_sums(squares)


@partial(jax.jit, static_argnums=0)
def _stack(num_rows: int, values: tuple[jax.Array, ...]) -> jax.Array:
    stacked = jnp.stack(values)
    return jnp.pad(stacked, ((0, num_rows - len(values)), (0, 0)))
