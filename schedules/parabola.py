"""Least-squares parabolas through losses at a few rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Parabola(NamedTuple):
    """a x^2 + b x + c, x in terms of the current rate.

    Attributes:
        coefficients: float32[3]: a, b, c.
        r_squared: float32[]: share of the losses' variance that it explains; 0 if they are flat.
        vertex: float32[]: where it is lowest; infinite unless a > 0.
    """

    coefficients: jax.Array
    r_squared: jax.Array
    vertex: jax.Array


def fit_parabola(rate_multiples: Sequence[float], losses: jax.Array) -> Parabola:
    """The parabola nearest to `losses` in the sense of least squares.

    The abscissae are constants, so the fit is one product with a matrix made
    beforehand in float64. Give losses as differences from that at rate 0: they
    are then small numbers, and float32 keeps their digits.

    Args:
        rate_multiples: [G] abscissae, three or more different ones.
        losses: float32[G].

    Returns:
        The fit. Its fields are not finite where the losses are not.
    """
    x = np.asarray(rate_multiples, np.float64)
    design = np.stack([x * x, x, np.ones_like(x)], axis=1)
    # Sums of products written out: a dot may be computed at lower precision on accelerators.
    solve = jnp.asarray(np.linalg.pinv(design), jnp.float32)
    coefficients = jnp.sum(solve * losses, axis=1)
    fitted = jnp.sum(jnp.asarray(design, jnp.float32) * coefficients, axis=1)
    residual = jnp.sum((losses - fitted) ** 2)
    total = jnp.sum((losses - jnp.mean(losses)) ** 2)
    r_squared = jnp.where(total > 0, 1.0 - residual / jnp.where(total > 0, total, 1.0), 0.0)
    r_squared = jnp.where(jnp.isfinite(total), r_squared, jnp.nan)
    a, b = coefficients[0], coefficients[1]
    vertex = jnp.where(a > 0, -b / (2.0 * jnp.where(a > 0, a, 1.0)), jnp.inf)
    return Parabola(coefficients, r_squared, jnp.where(jnp.isfinite(a), vertex, jnp.nan))
