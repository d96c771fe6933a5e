"""Silent corruption: devices that compute something else than their neighbours.

Every device computes one micro-batch of its neighbour's again. Gradients are the same bits
on every device, so a single other bit is a fault: there is nothing to tolerate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.errors import DeviceFault
from jaxserve.trainer.exchange import Exchange

Digests = npt.NDArray[np.uint32]


@jax.jit
def digest(vector: jax.Array) -> jax.Array:
    """Two sums over the bits of a float32 array, uint32[2]; one changed bit changes both."""
    bits = jax.lax.bitcast_convert_type(vector.reshape(-1), jnp.uint32)
    # Odd factors: a changed bit cannot vanish modulo 2**32, and places are told apart.
    factors = 2 * jax.lax.iota(jnp.uint32, bits.shape[0]) + 1
    return jnp.stack([jnp.sum(bits * factors), jnp.sum(bits ^ (bits >> 16))])


def find_fault(
    exchange: Exchange,
    own: Sequence[jax.Array],
    recompute: Callable[[int], list[jax.Array]],
) -> str | None:
    """The device whose gradient of its first leaf is not what others compute, if there is one.

    Args:
        exchange: the devices.
        own: of each local device the digest of its first leaf's gradient, as it went into
            the sum.
        recompute: for a shift s, each local device's digest of the first leaf of the device
            s places on.

    Returns:
        A text that names the device, or None. The same on all processes.
    """
    first = _gathered(exchange, own)
    replayed = _seen_by_owner(_gathered(exchange, recompute(1)), 1)
    if (first == replayed).all():
        return None
    opinions = [first, replayed, _gathered(exchange, recompute(0))]
    opinions += [
        _seen_by_owner(_gathered(exchange, recompute(shift)), shift)
        for shift in range(1, min(3, exchange.num_devices))
    ]
    return _verdict(exchange, opinions)


def check_replicas(exchange: Exchange, digests: Sequence[jax.Array], step: int) -> None:
    """Compares what all devices should hold alike.

    Args:
        exchange: the devices.
        digests: of each local device.
        step: the step that was just made.

    Raises:
        DeviceFault: names the devices that differ from most.
    """
    held = _gathered(exchange, digests)
    keys = [tuple(row) for row in held.tolist()]
    (usual, votes), *others = Counter(keys).most_common()
    if not others:
        return
    odd = [place for place, key in enumerate(keys) if key != usual]
    names = ", ".join(_name(exchange, place) for place in odd)
    if votes * 2 <= len(keys):
        names = "one of " + ", ".join(_name(exchange, place) for place in range(len(keys)))
    raise DeviceFault(
        f"after step {step} the parameters on {names} are not those of the other devices: "
        "silent corruption. Go on from an older snapshot or checkpoint, without that device"
    )


def _gathered(exchange: Exchange, values: Sequence[jax.Array]) -> Digests:
    """uint32[num_devices, 2]"""
    return np.asarray(exchange.gather_values(values)[0])


def _seen_by_owner(digests: Digests, shift: int) -> Digests:
    """Row p: what the device `shift` places before p computed of p's leaf."""
    return np.roll(digests, shift, axis=0)


def _verdict(exchange: Exchange, opinions: Sequence[Digests]) -> str:
    """opinions: of the owner when it counted, its neighbour, the owner again, others."""
    faulty = []
    for place in range(exchange.num_devices):
        rows = [tuple(opinion[place].tolist()) for opinion in opinions]
        if len(set(rows)) == 1:
            continue
        usual, votes = Counter(rows).most_common(1)[0]
        if 2 * votes <= len(rows):
            return f"{_name(exchange, place)} or {_name(exchange, place - 1)}"
        faulty.append(place if rows[0] != usual else place - 1)
    return ", ".join(_name(exchange, place) for place in dict.fromkeys(faulty))


def _name(exchange: Exchange, place: int) -> str:
    device = exchange.devices[place]
    return f"device {place % exchange.num_devices} ({device}, process {device.process_index})"
