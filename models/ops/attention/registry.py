"""Which `ragged_paged_attention` a platform runs: chosen once, at start-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from models.ops.attention import reference
from models.ops.attention.kv_pool import write_rows
from models.ops.attention.work import AttentionTiling, AttentionWork

if TYPE_CHECKING:
    from models.ops.attention.triton_attention import TritonAttention


def _reference_tiling(page_size: int, num_heads: int, num_kv_heads: int) -> AttentionTiling:
    del num_heads, num_kv_heads
    return AttentionTiling(page_size=page_size, pages_per_block=max(1, 64 // page_size))


def _as_it_is(work: AttentionWork, **_: Any) -> AttentionWork:
    return work


@dataclass(frozen=True, slots=True)
class AttentionImplementation:
    name: str
    platforms: tuple[str, ...]
    """JAX platform names on which it runs."""
    call: Callable[..., jax.Array]
    """The signature of `reference.ragged_paged_attention`, with `work` as prepared."""
    write: Callable[..., jax.Array] = write_rows
    """The signature of `kv_pool.write_rows`, with `work` as prepared."""
    prepare: Callable[..., Any] = _as_it_is
    """`prepare(work, tiling=..., dtype=..., head_dim=...)`: the work list as the two above take
    it, computed once a step, before the layers."""
    choose_tiling: Callable[[int, int, int], AttentionTiling] = _reference_tiling
    """By page size, query heads and KV heads."""
    takes_quantized_pool: bool = False
    """Whether it knows the formats of `kv_quantization`."""


IMPLEMENTATIONS = (
    AttentionImplementation(
        "reference",
        ("cpu", "gpu", "tpu"),
        reference.ragged_paged_attention,
        takes_quantized_pool=True,
    ),
)
"""Those that run on any machine, best first within a platform."""


def _triton(compute_capability: int) -> AttentionImplementation:
    from models.ops.attention.triton_attention import TritonAttention
    from models.ops.attention.triton_call import check_installed

    check_installed()
    return triton_implementation(TritonAttention(compute_capability))


def triton_implementation(attention: TritonAttention) -> AttentionImplementation:
    """The Triton kernels for one kind of GPU, whether they can be launched here or not."""
    return AttentionImplementation(
        "triton",
        ("gpu",),
        call=attention,
        write=attention.write,
        prepare=attention.prepare,
        choose_tiling=attention.tiling,
    )


def _native() -> AttentionImplementation:
    from models.ops.attention.native_attention import native_attention, native_write
    from models.ops.native import load_library

    load_library()
    return AttentionImplementation(
        "native", ("cpu",), call=native_attention, write=native_write, choose_tiling=_native_tiling
    )


def _native_tiling(page_size: int, num_heads: int, num_kv_heads: int) -> AttentionTiling:
    """A tile copies the keys that it reads, so it has many rows."""
    del num_heads, num_kv_heads
    return AttentionTiling(page_size=page_size, tile_rows=32, tile_group=1)


def select(name: str, platform: str, compute_capability: int = 0) -> AttentionImplementation:
    """Looks up `name`, or the platform's best for "auto".

    Args:
        name: of an implementation, or "auto"; the native kernels are taken only by their name.
        platform: JAX's name of it.
        compute_capability: of an NVIDIA GPU, 80 for A100 and 90 for H100.

    Raises ValueError that lists what the platform has, or says what must be installed.
    """
    has_triton = platform == "gpu" and compute_capability > 0
    if has_triton and name in ("auto", "triton"):
        return _triton(compute_capability)
    if platform == "cpu" and name == "native":
        return _native()
    candidates = [impl for impl in IMPLEMENTATIONS if platform in impl.platforms]
    if name == "auto" and candidates:
        return candidates[0]
    for implementation in candidates:
        if implementation.name == name:
            return implementation
    own = ["triton"] if has_triton else ["native"] if platform == "cpu" else []
    names = ", ".join(["auto", *own, *(impl.name for impl in candidates)])
    raise ValueError(f"--attention {name!r} is not available on {platform}; choose from: {names}")
