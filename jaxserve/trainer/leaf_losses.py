"""Losses of a batch without gradients: for evaluation and for probes of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.decision import sum_losses
from jaxserve.trainer.exchange import Exchange
from jaxserve.trainer.shard_gradient import GradientSpec, Tree, shard_loss


def batch_loss(
    spec: GradientSpec,
    exchange: Exchange,
    params: Sequence[Tree],
    base: Sequence[Tree | None],
    packed: Mapping[int, npt.NDArray[np.int32]],
    num_tokens: int,
) -> list[jax.Array]:
    """The loss of a global batch, summed along the tree.

    Args:
        spec: the model and its dtypes.
        exchange: devices and their leaves.
        params: of each local device.
        base: of each local device.
        packed: rows of the local leaves.
        num_tokens: what the sum of losses is divided by.

    Returns:
        float32[] on each local device, the same on all devices.
    """
    divisor = np.float32(max(num_tokens, 1))
    losses: list[list[jax.Array]] = []
    for place, own_params, own_base in zip(exchange.local, params, base, strict=True):
        leaves, device = exchange.leaf_ranges[place], exchange.devices[place]
        losses.append(
            [
                shard_loss(
                    spec, own_params, own_base, jax.device_put(packed[leaf], device), divisor
                )
                for leaf in range(leaves.first, leaves.end)
            ]
        )
    return [sum_losses(shares[:, 0]) for shares in exchange.gather_leaves(losses)]
