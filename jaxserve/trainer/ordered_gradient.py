"""Gradients in mode "ordered": one partitioned program, summed in whatever order is quick."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxserve.trainer.batches import Batch
from jaxserve.trainer.exact_gradient import Gradients
from jaxserve.trainer.exchange import AXIS, Exchange
from jaxserve.trainer.shard_gradient import GradientSpec, Tree, shard_gradient


class OrderedGradient:
    """The gradient of a global batch as one program of all devices.

    Args:
        spec: the model and its dtypes.
        exchange: devices; each has equally many leaves.
    """

    def __init__(self, spec: GradientSpec, exchange: Exchange) -> None:
        self._spec = spec
        self._exchange = exchange
        self._base: Any = None
        self._program = jax.jit(
            jax.shard_map(
                partial(_gradient, spec, exchange),
                mesh=exchange.mesh,
                in_specs=(P(), P(), P(AXIS), P(), P()),
                out_specs=(P(AXIS), P()),
                check_vma=False,
            )
        )

    def __call__(
        self,
        params: Sequence[Tree],
        base: Sequence[Tree | None],
        batch: Batch,
        step: int,
    ) -> Gradients:
        """Chunks of the gradient and losses of all leaves, as `Exchange.reduce` has them."""
        exchange = self._exchange
        rows = []
        for place in exchange.local:
            leaves = exchange.leaf_ranges[place]
            stacked = np.stack([batch.packed[leaf] for leaf in range(leaves.first, leaves.end)])
            rows.append(jax.device_put(stacked, exchange.devices[place]))
        if self._base is None and base[0] is not None:
            self._base = exchange.replicate(base)
        chunks, losses = self._program(
            exchange.replicate(params),
            self._base,
            exchange.join(rows),
            np.int32(step),
            np.float32(max(batch.num_tokens, 1)),
        )
        return exchange.parts_of(chunks), exchange.parts_of(losses)


def _gradient(
    spec: GradientSpec,
    exchange: Exchange,
    params: Tree,
    base: Tree | None,
    rows: jax.Array,
    step: jax.Array,
    num_tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    flat = spec.flat

    def added(total: jax.Array, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        vector, loss = shard_gradient(spec, params, base, leaf, step, num_tokens)
        return total + vector, loss

    zeros = jnp.zeros((flat.num_blocks, flat.block_size), jnp.float32)
    total, losses = jax.lax.scan(added, zeros, rows)
    padding = exchange.num_devices * exchange.chunk_blocks - flat.num_blocks
    padded = jnp.pad(total, ((0, padding), (0, 0)))
    chunk = jax.lax.psum_scatter(padded, AXIS, tiled=True)
    return chunk, jax.lax.all_gather(losses, AXIS, tiled=True)
