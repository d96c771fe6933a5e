"""StepDevice: the compiled programs and the arrays that they update in place.

It takes packed vectors alone. Whoever has these, the executor here or a process that is told of
them, can run the same steps in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxserve.engine.compilation import Programs
from jaxserve.engine.executor import StepOutOfMemory
from jaxserve.engine.step import Params
from jaxserve.engine.step_arrays import StepArrays, fresh
from models.adapter_pool import AdapterPool
from models.native_layout import PACKED_HEAD

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _names_lack_of_memory(
    method: Callable[Concatenate[StepDevice, _P], _T],
) -> Callable[Concatenate[StepDevice, _P], _T]:
    """Raises StepOutOfMemory for the runtime's own error, wherever that shows itself: in a call,
    or when the results of an earlier one are waited for."""

    @wraps(method)
    def call(device: StepDevice, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(device, *args, **kwargs)
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            # On a CPU, calls that use what a failed one was to give say INTERNAL and repeat it.
            if message.startswith("RESOURCE_EXHAUSTED") or "Out of memory" in message:
                raise StepOutOfMemory("the device has no memory for a step") from error
            raise

    return call  # type: ignore[return-value]  # Its first argument may also be named.


class StepDevice:
    """One device, or a mesh of D replicas with P stages each.

    Args:
        programs: compiled ahead of time.
        params: weights; an argument of the step, so a swap never recompiles.
        arrays: KV pool, slots and rows between stages, donated to every step; the pool of
            adapters, an argument like the weights.
    """

    def __init__(self, programs: Programs, params: Params, arrays: StepArrays) -> None:
        self.programs = programs
        self.params = params
        self.kv_pool = arrays.kv_pool
        self.slots = arrays.slots
        self._between_stages = arrays.between_stages
        self._adapters = arrays.adapters
        self._abstract = StepArrays(
            *jax.tree.map(
                lambda array: jax.ShapeDtypeStruct(
                    array.shape, array.dtype, sharding=array.sharding
                ),
                (arrays.kv_pool, arrays.slots, arrays.between_stages, None),
            )
        )

    @property
    def arrays(self) -> StepArrays:
        """As they are after what has been dispatched."""
        return StepArrays(self.kv_pool, self.slots, self._between_stages, self._adapters)

    @_names_lack_of_memory
    def renew(self) -> None:
        """Puts fresh arrays in place of what steps update: a failed one may have taken it.

        Compiles nothing, since start-up made the same ones. Raises StepOutOfMemory.
        """
        old = (self.kv_pool, self.slots, self._between_stages)
        for array in jax.tree.leaves(old):
            array.delete()
        is_native = PACKED_HEAD in self.params
        arrays = fresh(self._abstract, self.programs.inputs_sharding, is_native=is_native)
        self.kv_pool, self.slots = arrays.kv_pool, arrays.slots
        self._between_stages = arrays.between_stages

    @_names_lack_of_memory
    def load_slot(self, vectors: np.ndarray) -> None:
        """Loads a slot of each replica: int32 `[D, load_layout.size]`."""
        placed = self._put(vectors, self.programs.load_sharding)
        self.slots = self.programs.load_slot(self.slots, placed)

    @_names_lack_of_memory
    def load_masks(self, vectors: np.ndarray) -> None:
        """Loads masks of slots of each replica: int32 `[D, mask_layout.size]`."""
        placed = self._put(vectors, self.programs.load_sharding)
        allowed_mask = self.programs.load_masks(self.slots.allowed_mask, placed)
        self.slots = replace(self.slots, allowed_mask=allowed_mask)

    def write_adapter(self, index: int, adapter: AdapterPool) -> None:
        """Writes an adapter of one place into place `index` of the pool, counted from 1."""
        write = self.programs.write_adapter
        if write is None:
            raise ValueError("there is no pool of adapters")
        place = jax.device_put(np.int32(index - 1), self.programs.place_sharding)
        self._adapters = write(self._adapters, adapter, place)

    @_names_lack_of_memory
    def step(self, num_rows: int, vectors: np.ndarray) -> jax.Array:
        """Dispatches the step of a bucket: int32 `[D, P, layout.size]` to its outputs.

        These are int32 `[D, N, 3 + 2 * num_top]`, or without the first axis on one device, and
        are on their way to the host. In a pipeline they are those of the last stage's plan.
        """
        program = self.programs.steps[num_rows]
        placed = self._put(vectors, self.programs.inputs_sharding)
        outputs: jax.Array
        params = self.params
        if self._adapters is not None:
            params = {**params, "adapters": self._adapters}
        if self._between_stages is None:
            self.kv_pool, self.slots, outputs = program(params, self.kv_pool, self.slots, placed)
        else:
            self.kv_pool, self.slots, self._between_stages, outputs = program(
                params, self.kv_pool, self.slots, self._between_stages, placed
            )
        outputs.copy_to_host_async()
        return outputs

    @_names_lack_of_memory
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
