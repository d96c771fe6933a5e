"""What can be trained: a loss, batches by number, and held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Params = Any
Batch = Any
PROBE_BATCHES = 3


@dataclass(frozen=True, eq=False)
class Task:
    """A training problem whose batches can be drawn again from numbers alone.

    Equal to itself alone, so that programs compiled for it can be found again.

    Attributes:
        name: What tables call it.
        init: key -> parameters.
        loss: (parameters, batch) -> float32[], the mean over the batch.
        draw: key -> batch of the train data.
        held_out: Batch of the data that no training sees.
        train_set: All of the train data as one batch, where that is small enough.
    """

    name: str
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Batch], jax.Array]
    draw: Callable[[jax.Array], Batch]
    held_out: Batch
    train_set: Batch = None

    def train_batch(self, seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike) -> Batch:
        """The batch of update `step` of the run with this seed."""
        return self.draw(_key(1, seed, step))

    def probe_batch(
        self,
        seed: jax.typing.ArrayLike,
        step: jax.typing.ArrayLike,
        position: jax.typing.ArrayLike,
    ) -> Batch:
        """`PROBE_BATCHES` batches in one, from a stream of its own."""
        key = jax.random.fold_in(_key(2, seed, step), position)
        drawn = [self.draw(part) for part in jax.random.split(key, PROBE_BATCHES)]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *drawn)

    def initial_params(self, seed: jax.typing.ArrayLike) -> Params:
        """The parameters that the run with this seed starts from."""
        return self.init(_key(0, seed, 0))


def _key(stream: int, seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(stream), seed), step)
