"""A digest of the parameters that is the same for any number of devices and any split."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.trainer.device_state import DeviceState
from jaxserve.trainer.exchange import Exchange

_MIX = np.uint32(0x9E3779B1)


def params_digest(exchange: Exchange, states: Sequence[DeviceState], *, is_split: bool) -> str:
    """16 hex digits over the bits of all float32 master parameters and their places.

    Sums modulo 2**32, which parts can be added up to in any order; a changed bit changes the first.
    It finds mistakes, not malice. With `is_split` it holds a collective.

    Args:
        exchange: the devices.
        states: of each local one.
        is_split: whether a device holds a chunk of the vector only.
    """
    if not is_split:
        total = np.asarray(_part(states[0].moments.master, np.uint32(0)))
    else:
        parts = [_part(one.moments.master, np.uint32(one.blocks.first)) for one in states]
        gathered = np.asarray(exchange.gather_values(parts)[0])
        total = gathered.sum(axis=0, dtype=np.uint32)
    return "".join(f"{int(word):08x}" for word in total)


@jax.jit
def _part(blocks: jax.Array, first_block: jax.Array) -> jax.Array:
    """uint32[2] of float32[n, block_size]; blocks of zeros, as beyond the vector's end, add 0."""
    bits = jax.lax.bitcast_convert_type(blocks.reshape(-1), jnp.uint32)
    places = jax.lax.iota(jnp.uint32, bits.shape[0]) + first_block * np.uint32(blocks.shape[1])
    # Odd factors: a changed bit cannot vanish modulo 2**32, and places are told apart.
    by_place = bits * (2 * places + 1)
    mixed = (bits ^ (bits >> 15)) * _MIX
    by_mixed_place = (mixed ^ (mixed >> 13)) * (places * _MIX | 1)
    return jnp.stack([jnp.sum(by_place), jnp.sum(by_mixed_place)])
