"""StepDevice: the compiled programs and the arrays that they update in place.

It takes packed vectors alone. Whoever has these, the executor here or a process that is told of
them, can run the same steps in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxserve.engine.slots import SlotState
from jaxserve.engine.step import Params

if TYPE_CHECKING:
    from jaxserve.engine.compilation import Programs


class StepDevice:
    """One device, or a mesh of D replicas with P stages each.

    Args:
        programs: compiled ahead of time.
        params: weights; an argument of the step, so a swap never recompiles.
        kv_pool: `[L, D * (P + 1), page_size, 2, K, D]` for P pages a replica; donated to
            every step.
        slots: of all replicas; donated to every step.
    """

    def __init__(
        self, programs: Programs, params: Params, kv_pool: jax.Array, slots: SlotState
    ) -> None:
        self.programs = programs
        self.params = params
        self.kv_pool = kv_pool
        self.slots = slots

    def load_slot(self, vectors: np.ndarray) -> None:
        """Loads a slot of each replica: int32 `[D, load_layout.size]`."""
        placed = self._put(vectors, self.programs.load_sharding)
        self.slots = self.programs.load_slot(self.slots, placed)

    def step(self, num_rows: int, vectors: np.ndarray) -> jax.Array:
        """Dispatches the step of a bucket: int32 `[D, P, layout.size]` to its outputs.

        These are int32 `[D, N, 3 + 2 * num_top]`, or without the first axis on one device, and
        are on their way to the host.
        """
        placed = self._put(vectors, self.programs.inputs_sharding)
        self.kv_pool, self.slots, outputs = self.programs.steps[num_rows](
            self.params, self.kv_pool, self.slots, placed
        )
        outputs.copy_to_host_async()
        array: jax.Array = outputs
        return array

    def fetch(self, outputs: jax.Array) -> np.ndarray:
        """Waits for a step's outputs on the host."""
        return np.asarray(outputs)

    def _put(self, vectors: np.ndarray, sharding: Sharding) -> jax.Array:
        if isinstance(sharding, SingleDeviceSharding):
            vectors = vectors.reshape(-1)
        elif not sharding.is_fully_addressable:
            # `device_put` would have all processes compare what they put.
            return jax.make_array_from_callback(vectors.shape, sharding, vectors.__getitem__)
        placed: jax.Array = jax.device_put(vectors, sharding)
        return placed
