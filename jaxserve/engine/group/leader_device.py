"""LeaderDevice: the devices of all processes, as the leader drives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from jaxserve.engine.group.errors import GroupError
from jaxserve.engine.group.leader import Leader
from jaxserve.engine.step_device import StepDevice

_T = TypeVar("_T")


class LeaderDevice(StepDevice):
    """A `StepDevice` whose every call the followers make too, in the same order.

    Where a call fails because the group has lost a process, GroupError names it.
    """

    def __init__(self, leader: Leader, device: StepDevice) -> None:
        """
        Args:
            leader: of a group that is ready.
            device: this process's part of the model; not to be used by itself any more.
        """
        super().__init__(device.programs, device.params, device.arrays)
        self._leader = leader

    def renew(self) -> None:
        """Raises GroupError: the followers have arrays of their own, which nothing renews."""
        raise GroupError(
            "a device of the group ran out of memory in a step, and a group does not recover from "
            "that: lower --kv-cache-bytes, or see what else runs there"
        )

    def load_slot(self, vectors: np.ndarray) -> None:
        self._leader.tell_slot_load(vectors)
        self._guarded(lambda: super(LeaderDevice, self).load_slot(vectors))

    def load_masks(self, vectors: np.ndarray) -> None:
        self._leader.tell_mask_load(vectors)
        self._guarded(lambda: super(LeaderDevice, self).load_masks(vectors))

    def step(self, num_rows: int, vectors: np.ndarray) -> jax.Array:
        self._leader.tell_step(num_rows, vectors)
        return self._guarded(lambda: super(LeaderDevice, self).step(num_rows, vectors))

    def fetch(self, outputs: jax.Array) -> np.ndarray:
        return self._guarded(lambda: super(LeaderDevice, self).fetch(outputs))

    def _guarded(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except Exception as error:
            loss = self._leader.wait_for_loss()
            if loss is None:
                raise
            raise GroupError(loss.message) from error
