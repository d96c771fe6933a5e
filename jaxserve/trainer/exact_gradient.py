"""Gradients in mode "exact": one program a micro-batch, summed along the tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.batches import Batch
from jaxserve.trainer.errors import DeviceFault
from jaxserve.trainer.exchange import Exchange, add
from jaxserve.trainer.gradient_tree import Node, TreeSum
from jaxserve.trainer.replay import digest, find_fault
from jaxserve.trainer.shard_gradient import GradientSpec, Tree, shard_gradient

Gradients: TypeAlias = tuple[list[jax.Array], list[jax.Array]]
"""On each local device its chunk of the gradient, and the losses of all leaves."""


class ExactGradient:
    """The gradient of a global batch, the same bits on any number of devices.

    Args:
        spec: the model and its dtypes.
        exchange: devices and their leaves.
        read_leaf: rows of any leaf of a batch, for replays.
    """

    def __init__(
        self,
        spec: GradientSpec,
        exchange: Exchange,
        read_leaf: Callable[[Batch, int], npt.NDArray[np.int32]],
    ) -> None:
        self._spec = spec
        self._exchange = exchange
        self._read_leaf = read_leaf
        self.on_exchange: Callable[[], None] | None = None
        """Called when the local sums are there, before those of others are waited for."""

    def __call__(
        self, params: Sequence[Tree], base: Sequence[Tree | None], batch: Batch, step: int
    ) -> Gradients:
        """Chunks and losses; waits for nothing unless `on_exchange` is set."""
        sums, losses, _ = self._sums(params, base, batch, step, with_digests=False)
        return self._reduce(sums, losses)

    def checked(
        self, params: Sequence[Tree], base: Sequence[Tree | None], batch: Batch, step: int
    ) -> tuple[Gradients, str | None]:
        """As a call, with replays: also the device that was found wrong, if one was.

        What it had spoilt is computed again.

        Raises:
            DeviceFault: the second time it was wrong again.
        """
        found: str | None = None
        for _ in range(2):
            sums, losses, digests = self._sums(params, base, batch, step, with_digests=True)

            def recompute(shift: int) -> list[jax.Array]:
                return self._replayed(params, base, batch, step, shift)

            fault = find_fault(self._exchange, digests, recompute)
            if fault is None:
                return self._reduce(sums, losses), found
            found = fault
        raise DeviceFault(
            f"step {step}: {found} computes other gradients than the other devices, twice in a "
            "row. Go on without that device"
        )

    def leaf_maxima(
        self, params: Sequence[Tree], base: Sequence[Tree | None], batch: Batch, step: int
    ) -> npt.NDArray[np.float32]:
        """The largest absolute value in the gradient of each leaf, float32[num_leaves].

        Computes all gradients again: for finding out what went wrong.
        """
        exchange = self._exchange
        maxima: list[list[jax.Array]] = []
        for slot, place in enumerate(exchange.local):
            leaves = exchange.leaf_ranges[place]
            own = [
                self._leaf_gradient(slot, params, base, batch.packed[leaf], batch.num_tokens, step)
                for leaf in range(leaves.first, leaves.end)
            ]
            maxima.append([_largest(vector) for vector, _ in own])
        return np.asarray(exchange.gather_leaves(maxima)[0])[:, 0]

    def _reduce(
        self, sums: Sequence[TreeSum[jax.Array]], losses: Sequence[Sequence[jax.Array]]
    ) -> Gradients:
        if self.on_exchange is not None:
            jax.block_until_ready([vector for own in sums for _, vector in own.parts])
            self.on_exchange()
        return self._exchange.reduce(sums, losses)

    def _sums(
        self,
        params: Sequence[Tree],
        base: Sequence[Tree | None],
        batch: Batch,
        step: int,
        *,
        with_digests: bool,
    ) -> tuple[list[TreeSum[jax.Array]], list[list[jax.Array]], list[jax.Array]]:
        """Of each local device the sum of its leaves, their losses, and a digest of the first."""
        exchange = self._exchange
        own_leaves = [exchange.leaf_ranges[place] for place in exchange.local]
        sums: list[TreeSum[jax.Array]] = [TreeSum(add) for _ in own_leaves]
        losses: list[list[jax.Array]] = [[] for _ in own_leaves]
        digests: list[jax.Array] = []
        # In turns, so that all devices begin at once.
        for turn in range(max(map(len, own_leaves))):
            for slot, leaves in enumerate(own_leaves):
                leaf = leaves.first + turn
                if leaf >= leaves.end:
                    continue
                vector, loss = self._leaf_gradient(
                    slot, params, base, batch.packed[leaf], batch.num_tokens, step
                )
                if with_digests and turn == 0:
                    digests.append(digest(vector))
                sums[slot].push(Node(0, leaf), vector)
                losses[slot].append(loss)
        return sums, losses, digests

    def _replayed(
        self,
        params: Sequence[Tree],
        base: Sequence[Tree | None],
        batch: Batch,
        step: int,
        shift: int,
    ) -> list[jax.Array]:
        exchange = self._exchange
        digests = []
        for slot, place in enumerate(exchange.local):
            leaf = exchange.leaf_ranges[(place + shift) % exchange.num_devices].first
            rows = self._read_leaf(batch, leaf)
            vector, _ = self._leaf_gradient(slot, params, base, rows, batch.num_tokens, step)
            digests.append(digest(vector))
        return digests

    def _leaf_gradient(
        self,
        slot: int,
        params: Sequence[Tree],
        base: Sequence[Tree | None],
        rows: npt.NDArray[np.int32],
        num_tokens: int,
        step: int,
    ) -> tuple[jax.Array, jax.Array]:
        device = self._exchange.devices[self._exchange.local[slot]]
        gradient: tuple[jax.Array, jax.Array] = shard_gradient(
            self._spec,
            params[slot],
            base[slot],
            jax.device_put(rows, device),
            np.int32(step),
            np.float32(max(num_tokens, 1)),
        )
        return gradient


@jax.jit
def _largest(vector: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(vector))[None]
