"""Digests of what a store or a migrated model holds: BLAKE3.

BLAKE3 is collision-resistant as SHA-256 is, and some twenty times as fast on processors without
instructions for SHA-256, so that hashing every byte several times costs less than moving it.
Records that are small (manifests, commits, plans) keep SHA-256 of the standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

READ_BLOCK_BYTES = 1 << 20


def blake3_of_file(path: Path, between_blocks: Callable[[], None] | None = None) -> str:
    """BLAKE3 of a file's bytes, in hex; `between_blocks` may raise to stop."""
    digest = blake3()
    block = bytearray(READ_BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(block):
            digest.update(view[:num_read])
            if between_blocks is not None:
                between_blocks()
    return digest.hexdigest()


def array_hash(dtype: str, shape: tuple[int, ...]) -> blake3:
    """A hash that has taken in an array's dtype and shape; its little-endian bytes come next."""
    sizes = ",".join(str(size) for size in shape)
    return blake3(f"{dtype}[{sizes}]\n".encode())
