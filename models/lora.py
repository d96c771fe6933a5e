"""Low-rank adapters: their pytree, their start, and merging them into the weights.

LoRA (Hu et al. 2021): a frozen projection W gets `scale * A @ B` beside it, with A `[in, r]`
random and B `[r, out]` zero at the start, so that training begins at the base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from checkpoint.param_loading import flatten, unflatten

Adapters: TypeAlias = dict[str, Any]
"""Nested like the parameters, with `{"a": [L, in, r], "b": [L, r, out]}` where those have a
projection's `{"kernel": [L, in, out]}`."""

PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)
"""Of all families; a family has some of them. Experts' matrices get no adapters."""

NUM_KERNEL_AXES = 3
"""Of a stacked projection: layers, in, out."""


@partial(jax.tree_util.register_dataclass, data_fields=["adapters"], meta_fields=["scale"])
@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters and the factor that they are applied with."""

    adapters: Adapters
    scale: float
    """alpha / r"""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Which projections get adapters, and how large.

    Raises:
        ValueError: a rank or alpha that is not positive, or no or unknown targets.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS
    """Names of projections."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora: rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora: alpha is {self.alpha}; it must be greater than 0")
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown or not self.targets:
            raise ValueError(
                f"lora: targets is {list(self.targets)}; name one or more of "
                f"{', '.join(PROJECTIONS)}"
            )

    @property
    def scale(self) -> float:
        """The factor of `A @ B`."""
        return self.alpha / self.rank


def init_adapters(
    abstract_params: Any, config: LoraConfig, key: jax.Array, dtype: DTypeLike = jnp.float32
) -> Adapters:
    """Adapters that change nothing yet: A uniform within `1 / sqrt(in)`, B zero.

    Args:
        abstract_params: the base model's parameters, or their shapes.
        config: what gets adapters.
        key: PRNG key; the same key gives the same values.
        dtype: of every leaf.
    """
    adapters: dict[str, jax.Array] = {}
    for index, (path, kernel) in enumerate(_target_kernels(abstract_params, config).items()):
        num_layers, num_in, num_out = kernel.shape
        bound = num_in**-0.5
        adapters[f"{path}.a"] = jax.random.uniform(
            jax.random.fold_in(key, index),
            (num_layers, num_in, config.rank),
            dtype,
            minval=-bound,
            maxval=bound,
        )
        adapters[f"{path}.b"] = jnp.zeros((num_layers, config.rank, num_out), dtype)
    return unflatten(adapters)


def merge(params: dict[str, Any], lora: Lora) -> dict[str, Any]:
    """Parameters with the adapters added in: the same model without adapters.

    The products are float32; the sum is rounded once, to the kernel's dtype.
    """
    leaves = flatten(params)
    factors = flatten(lora.adapters)
    for path in [name.removesuffix(".a") for name in factors if name.endswith(".a")]:
        kernel = leaves[f"{path}.kernel"]
        low, high = (factors[f"{path}.{part}"].astype(jnp.float32) for part in "ab")
        update = jnp.einsum("lir,lro->lio", low, high, precision=lax.Precision.HIGHEST)
        merged = kernel.astype(jnp.float32) + lora.scale * update
        leaves[f"{path}.kernel"] = merged.astype(kernel.dtype)
    return unflatten(leaves)


def _target_kernels(params: Any, config: LoraConfig) -> dict[str, Any]:
    """Path of each chosen projection, sorted, to its kernel."""
    return {
        path.removesuffix(".kernel"): leaf
        for path, leaf in sorted(flatten(params).items())
        if path.endswith(".kernel")
        and path.split(".")[-2] in config.targets
        and len(leaf.shape) == NUM_KERNEL_AXES
    }
