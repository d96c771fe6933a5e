"""MemoryPlan: where the memory goes, checked before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.host_memory import read_host_memory
from models.config import ModelConfig
from models.mesh_shape import MeshShape
from models.ops.attention.kv_pool import page_bytes

CPU_POOL_SEQUENCES = 8
"""Full-length sequences that the default pool of a CPU holds..."""
CPU_POOL_FRACTION = 0.25
"""...but at most this share of the memory that is available."""
GPU_POOL_FRACTION = 0.85
"""Share of the device memory left after the weights."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All in bytes."""

    weights_bytes: int
    kv_pool_bytes: int
    slots_bytes: int
    temp_bytes: int
    available_bytes: int
    """Free on the device when the engine started."""
    num_pages: int
    adapters_bytes: int = 0
    """The pool of adapters, and one that is on its way into it."""
    advice: str = (
        "lower --kv-cache-bytes, --max-num-seqs, --max-model-len or --max-loras, or choose a "
        "smaller --dtype"
    )
    """What makes it fit."""

    @property
    def headroom_bytes(self) -> int:
        used = self.weights_bytes + self.kv_pool_bytes + self.slots_bytes + self.temp_bytes
        return self.available_bytes - used - self.adapters_bytes

    def check(self) -> None:
        """Raises ConfigError when it cannot fit."""
        if self.headroom_bytes < 0:
            raise ConfigError(
                f"the engine needs {format_bytes(self.available_bytes - self.headroom_bytes)} "
                f"(weights {format_bytes(self.weights_bytes)}, adapters "
                f"{format_bytes(self.adapters_bytes)}, KV pool "
                f"{format_bytes(self.kv_pool_bytes)}, slots {format_bytes(self.slots_bytes)}, "
                f"temporaries {format_bytes(self.temp_bytes)}) but only "
                f"{format_bytes(self.available_bytes)} are free: {self.advice}"
            )


def bytes_per_device(tree: object) -> int:
    """Bytes that a pytree of (abstract) arrays takes on one of its devices."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize
    return total


def available_bytes(device: jax.Device, num_sharing: int = 1) -> int:
    """Memory that can still be taken on this device.

    `num_sharing` virtual devices of a CPU have the host's memory between them.
    """
    if device.platform == "cpu":
        return read_host_memory().available_bytes // num_sharing
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))


def choose_num_pages(
    config: ModelConfig,
    *,
    page_size: int,
    dtype: np.dtype,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_bytes: int | None,
    weights_bytes: int,
    device: jax.Device,
    mesh: MeshShape,
) -> int:
    """Pages of a replica that fit the asked bytes, or the platform's default.

    Args:
        config: of the model, with as many KV heads as are kept.
        page_size, max_model_len, max_num_seqs: of a replica.
        dtype: of the pool.
        kv_cache_bytes: of a replica, on all of its devices together.
        weights_bytes: on each device.
        device: the first one.
        mesh: all of them.
    """
    one_page = page_bytes(config, page_size, dtype)
    pages_per_seq = -(-max_model_len // page_size)
    if kv_cache_bytes is None:
        # Every device of a replica holds an equal part of each page.
        num_devices = mesh.stage * mesh.tensor
        free = available_bytes(device, mesh.num_devices)
        if device.platform == "cpu":
            wanted = CPU_POOL_SEQUENCES * pages_per_seq * one_page
            kv_cache_bytes = min(wanted, int(CPU_POOL_FRACTION * free * num_devices))
        else:
            kv_cache_bytes = int(GPU_POOL_FRACTION * (free - weights_bytes)) * num_devices
        # Every slot at full length, and as much again for the prefix cache.
        kv_cache_bytes = min(kv_cache_bytes, 2 * max_num_seqs * pages_per_seq * one_page)
    # One page is spare, see `kv_pool`.
    return max(0, kv_cache_bytes // one_page - 1)


def format_bytes(num_bytes: int) -> str:
    """A size for people, e.g. `1.5 GiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
