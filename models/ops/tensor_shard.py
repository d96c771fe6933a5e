"""TensorShard: what the devices that share a layer exchange, inside `shard_map`.

Each of them holds some columns or rows of a projection. Columns need no exchange; products over
some rows are partial sums, which `sum` adds up in the order of the devices. The order is ours and
not the transport's, so a mesh gives the same bits whether its devices lie in one process or in
several.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True, slots=True)
class TensorShard:
    """The place of a device among those that share its layers."""

    axis: str
    """Name of the mesh's axis."""
    size: int
    """Devices along it, at least 2."""

    def index(self) -> jax.Array:
        """This device's place, an int32 scalar."""
        return lax.axis_index(self.axis)

    def sum(self, partial: jax.Array) -> jax.Array:
        """The sum of all devices' `partial [T, E]`, the same bits on each, in its dtype.

        Each device adds up its part of the columns, first device first, in float32, and all
        gather the sums: the bytes of a ring all-reduce.
        """
        num_rows, width = partial.shape
        padded = jnp.pad(partial, ((0, 0), (0, -width % self.size)))
        parts = padded.reshape(num_rows, self.size, -1)
        received = lax.all_to_all(parts, self.axis, split_axis=1, concat_axis=0)
        total = received[0].astype(jnp.float32)
        for part in received[1:]:
            total = total + part.astype(jnp.float32)
        return self.gather(total.astype(partial.dtype))[:, :width]

    def gather(self, columns: jax.Array) -> jax.Array:
        """All devices' `columns [T, n]` side by side, `[T, size * n]`."""
        gathered: jax.Array = lax.all_gather(columns, self.axis, axis=1, tiled=True)
        return gathered
