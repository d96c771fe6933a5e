"""Low-rank adapters of many requests in one product: each row gets its own, or none.

All N adapters of a projection lie side by side, so that a step has one shape whatever its rows
ask for: `x` is multiplied by all `a` at once, what is not a row's own is set to zero, and the rest
is multiplied by all `b`. A row costs `N * R * (in + out)` products beside the `in * out` of the
projection itself (Hu et al. 2021, section 4.1, for one adapter; Chen et al., "Punica", 2023, gather
each row's matrices instead, which takes less for many adapters and a kernel of its own).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from models.ops.precision import matmul_precision


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Which adapter each of T rows gets."""

    is_own: jax.Array
    """`bool [T, N * R]`: the ranks of the row's adapter."""
    has_one: jax.Array
    """`bool [T, 1]`"""

    @classmethod
    def of(cls, adapter_of_row: jax.Array, num_adapters: int, max_rank: int) -> AdapterRows:
        """Of `int32 [T]`, where n > 0 is the n-th of `num_adapters` and 0 none."""
        adapter_of_rank = 1 + jnp.arange(num_adapters * max_rank, dtype=jnp.int32) // max_rank
        return cls(adapter_of_row[:, None] == adapter_of_rank, adapter_of_row[:, None] > 0)


@dataclass(frozen=True, slots=True)
class StackedAdapters:
    """N adapters of one projection."""

    a: jax.Array
    """`[in, N, R]`, zero beyond an adapter's own rank."""
    b: jax.Array
    """`[N, R, out]`, with the adapter's scale in it."""

    def __call__(self, x: jax.Array, rows: AdapterRows) -> jax.Array:
        """What each of the rows `x [T, in]` gets, `[T, out]`; zero for a row without one."""
        precision = matmul_precision(self.a.dtype)
        low = jnp.matmul(x, self.a.reshape(self.a.shape[0], -1), precision=precision)
        # Not a product with a mask: another adapter's infinity would become NaN.
        own = jnp.where(rows.is_own, low, jnp.zeros_like(low))
        return jnp.matmul(own, self.b.reshape(-1, self.b.shape[-1]), precision=precision)


@dataclass(frozen=True, slots=True)
class RowAdapters:
    """The adapters of one projection, or of several that it holds side by side."""

    parts: tuple[StackedAdapters, ...]
    rows: AdapterRows

    def add_to(self, out: jax.Array, x: jax.Array) -> jax.Array:
        """`out [T, out]` and what the rows `x [T, in]` get beside it. A row without an adapter
        keeps its bits."""
        deltas = [part(x, self.rows) for part in self.parts]
        delta = deltas[0] if len(deltas) == 1 else jnp.concatenate(deltas, axis=-1)
        return jnp.where(self.rows.has_one, out + delta.astype(out.dtype), out)
