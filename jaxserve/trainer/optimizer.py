"""Optimizers of optax on blocks of the flat vector, element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxserve.trainer.decision import Decision
from jaxserve.trainer.flat_vector import FlatVector
from jaxserve.trainer.state_layout import Scalar
from jaxserve.trainer.step_config import FloatDtype, OptimizerConfig

OptState: TypeAlias = Any
OPT_STATE = "opt_state"

_BUILDERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adam": optax.scale_by_adam,
    "nadamw": partial(optax.scale_by_adam, nesterov=True),
    "lion": optax.scale_by_lion,
    "adagrad": optax.scale_by_rss,
    "radam": optax.scale_by_radam,
    "adabelief": optax.scale_by_belief,
    "amsgrad": optax.scale_by_amsgrad,
}


@lru_cache(maxsize=32)
def descent_of(config: OptimizerConfig) -> optax.GradientTransformation:
    """What turns a gradient into the direction to subtract, for a learning rate of 1.

    Weight decay and the rate itself are not in it. rmsprop's momentum gathers updates
    before the rate scales them, as sgd's does.
    """

    def given(*names: str, **renamed: str) -> dict[str, Any]:
        options = {name: getattr(config, name) for name in names}
        options |= {target: getattr(config, name) for target, name in renamed.items()}
        return {name: value for name, value in options.items() if value is not None}

    if config.name == "sgd":
        return optax.trace(config.momentum or 0.0, nesterov=bool(config.nesterov))
    if config.name == "rmsprop":
        scaled = optax.scale_by_rms(**given("decay", "eps"))
        if not config.momentum:
            return scaled
        return optax.chain(scaled, optax.trace(config.momentum, nesterov=bool(config.nesterov)))
    if config.name == "adagrad":
        return _BUILDERS["adagrad"](**given("eps", initial_accumulator_value="initial_accumulator"))
    return _BUILDERS[config.name](**given("b1", "b2", "eps"))


@dataclass(frozen=True)
class OptimizerState:
    """The leaves of an optimizer's state: vectors like the parameters, and scalars.

    Attributes:
        vectors: name -> value that the vector starts with, such as `opt_state/mu`.
        scalars: name -> value that the scalar starts with, such as `opt_state/count`.
        names: names of all leaves in jax's order.
        structure: of optax's state.
    """

    vectors: dict[str, float]
    scalars: dict[str, np.ndarray[Any, Any]]
    names: tuple[str, ...]
    structure: Any

    def scalar_specs(self) -> tuple[Scalar, ...]:
        """The scalars as segments of a state."""
        return tuple(
            Scalar(name, value.shape, value.dtype.name) for name, value in self.scalars.items()
        )


def optimizer_state(config: OptimizerConfig) -> OptimizerState:
    """What the optimizer keeps, by the names of its leaves."""
    state = descent_of(config).init(jnp.zeros((1, 1), jnp.float32))
    vectors: dict[str, float] = {}
    scalars: dict[str, np.ndarray[Any, Any]] = {}
    names: list[str] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = "/".join([OPT_STATE, *(_component(key) for key in path)])
        names.append(name)
        if leaf.shape == (1, 1):
            vectors[name] = float(leaf[0, 0])
        else:
            scalars[name] = np.asarray(leaf)
    return OptimizerState(vectors, scalars, tuple(names), jax.tree.structure(state))


def _component(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"optimizer state with an unknown kind of node: {key!r}")


class Moments(NamedTuple):
    """What an update changes beside scalars of the decision, of one device.

    Attributes:
        master: parameters, float32[blocks, block_size].
        opt_state: optax's, its vectors like `master`.
        ema: average of the parameters like `master`, or None.
    """

    master: jax.Array
    opt_state: OptState
    ema: jax.Array | None


@dataclass(frozen=True)
class UpdateSpec:
    """What the update is compiled for."""

    optimizer: OptimizerConfig
    flat: FlatVector
    param_dtype: FloatDtype


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def apply_update(
    spec: UpdateSpec,
    moments: Moments,
    gradient: jax.Array,
    decision: Decision,
    first_block: jax.Array,
) -> tuple[Moments, jax.Array | None]:
    """One update of whole blocks, each element by itself.

    Args:
        spec: what to compile for.
        moments: donated.
        gradient: float32[blocks, block_size].
        decision: rate, factor of the gradient, and whether the update is applied at all.
        first_block: int32[], place of the first of these blocks in the vector.

    Returns:
        The new moments, and a copy of the parameters in `param_dtype` unless that is float32.
    """
    direction, opt_state = _descend(spec, moments, gradient, decision, first_block)
    moved = moments.master - decision.lr * direction
    ema = moments.ema
    if ema is not None:
        decay = jnp.float32(spec.optimizer.ema_decay or 0.0)
        ema = decay * ema + (1.0 - decay) * moved
    updated = Moments(moved, opt_state, ema)
    kept: Moments = jax.tree.map(partial(jnp.where, decision.applied), updated, moments)
    copy = None if spec.param_dtype == "float32" else kept.master.astype(spec.param_dtype)
    return kept, copy


def _descend(
    spec: UpdateSpec,
    moments: Moments,
    gradient: jax.Array,
    decision: Decision,
    first_block: jax.Array,
) -> tuple[jax.Array, OptState]:
    direction, opt_state = descent_of(spec.optimizer).update(
        gradient * decision.scale, moments.opt_state, moments.master
    )
    direction = cast(jax.Array, direction)
    if spec.optimizer.weight_decay:
        decayed = _is_decayed(spec.flat, direction.shape, first_block)
        # The rate is selected, not the product: LLVM can take a selection apart in a program of
        # many blocks and leave it in one of few, and would then round the product in one of them.
        rate = jnp.where(decayed, jnp.float32(spec.optimizer.weight_decay), 0.0)
        direction = direction + rate * moments.master
    return direction, opt_state


def _is_decayed(flat: FlatVector, shape: tuple[int, ...], first_block: jax.Array) -> jax.Array:
    """bool of `shape`: the leaves that decay come first in the vector."""
    full_blocks, rest = divmod(flat.num_decayed, flat.block_size)
    blocks = first_block + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (blocks < full_blocks) | ((blocks == full_blocks) & (columns < rest))
