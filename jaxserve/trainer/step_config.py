"""How a step computes, as frozen values checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from jaxserve.errors import ConfigError

Sharding: TypeAlias = Literal["replicated", "zero1", "fsdp"]
OptimizerName: TypeAlias = Literal[
    "adamw",
    "adam",
    "nadamw",
    "lion",
    "sgd",
    "rmsprop",
    "adagrad",
    "radam",
    "adabelief",
    "amsgrad",
]
DecayedLeaves: TypeAlias = Literal["matrices", "all"]
Remat: TypeAlias = Literal["none", "dots", "full"]
FloatDtype: TypeAlias = Literal["float32", "bfloat16"]
IncidentPolicy: TypeAlias = Literal["off", "skip", "rollback"]

SHARDINGS: tuple[Sharding, ...] = ("replicated", "zero1", "fsdp")

OPTIMIZER_OPTIONS: dict[str, tuple[str, ...]] = {
    "adamw": ("b1", "b2", "eps"),
    "adam": ("b1", "b2", "eps"),
    "nadamw": ("b1", "b2", "eps"),
    "lion": ("b1", "b2"),
    "sgd": ("momentum", "nesterov"),
    "rmsprop": ("decay", "eps", "momentum", "nesterov"),
    "adagrad": ("eps", "initial_accumulator"),
    "radam": ("b1", "b2", "eps"),
    "adabelief": ("b1", "b2", "eps"),
    "amsgrad": ("b1", "b2", "eps"),
}
"""Optimizer -> the options of `OptimizerConfig` that it uses."""

_NOT_ELEMENTWISE = {
    "adafactor": "it keeps means over rows and columns",
    "muon": "it orthogonalises whole matrices",
    "lamb": "it scales by the norm of each array",
    "lars": "it scales by the norm of each array",
    "fromage": "it scales by the norm of each array",
    "shampoo": "it preconditions whole matrices",
    "sm3": "it keeps maxima over rows and columns",
    "novograd": "it keeps one moment an array",
    "lbfgs": "it searches along lines of whole gradients",
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer that treats every parameter by itself, so that any split of them is exact.

    An option that the optimizer does not use is refused. None takes optax's default.

    Attributes:
        name: see `OPTIMIZER_OPTIONS`.
        b1, b2: decay of the first and second moment.
        eps: added to the root of the second moment.
        momentum, nesterov: of sgd and rmsprop.
        decay: rmsprop: decay of the squares.
        initial_accumulator: adagrad: where the sum of squares starts.
        weight_decay: decoupled: each update also takes `lr * weight_decay * parameter` away.
        decayed: which leaves decay: matrices (embeddings and kernels; neither norms nor
            biases), or all.
        clip_norm: gradients are scaled down to this global norm; None: never.
        ema_decay: keeps an average of the parameters, `decay * old + (1 - decay) * new`.

    Raises:
        ConfigError: names the field, and what would do.
    """

    name: OptimizerName = "adamw"
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    decay: float | None = None
    initial_accumulator: float | None = None
    weight_decay: float = 0.0
    decayed: DecayedLeaves = "matrices"
    clip_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZER_OPTIONS:
            names = ", ".join(OPTIMIZER_OPTIONS)
            if self.name in _NOT_ELEMENTWISE:
                raise ConfigError(
                    f"optimizer.name is {self.name!r}, which is not supported: "
                    f"{_NOT_ELEMENTWISE[self.name]}, so its result would depend on how the "
                    f"parameters are split. Use one of {names}"
                )
            raise ConfigError(f"optimizer.name is {self.name!r}; it must be one of {names}")
        used = OPTIMIZER_OPTIONS[self.name]
        every = sorted({option for options in OPTIMIZER_OPTIONS.values() for option in options})
        for option in every:
            if getattr(self, option) is not None and option not in used:
                raise ConfigError(
                    f"optimizer.{option} has no effect with {self.name!r}: leave it out"
                )
        for option in ("b1", "b2", "momentum", "decay"):
            _require_share(f"optimizer.{option}", getattr(self, option))
        _require_share("optimizer.ema_decay", self.ema_decay)
        if self.decayed not in ("matrices", "all"):
            raise ConfigError(f"optimizer.decayed is {self.decayed!r}; use 'matrices' or 'all'")
        for option in ("eps", "clip_norm"):
            value = getattr(self, option)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"optimizer.{option} is {value}; it must be above 0")
        for option in ("weight_decay", "initial_accumulator"):
            value = getattr(self, option)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"optimizer.{option} is {value}; it must be 0 or above")


@dataclass(frozen=True, kw_only=True)
class IncidentConfig:
    """What happens when a loss or gradient is not finite, or the loss jumps.

    A loss is a spike when it lies more than `spike_sigmas` standard deviations above the mean
    of the last `window` losses of applied updates (once there are `min_history` of them).

    Attributes:
        policy: "skip" drops the update and goes on; "rollback" also asks for a generation
            that quarantines the examples; "off" applies whatever there is.
        spike_sigmas: None: only what is not finite counts.
        window: losses that are remembered.
        min_history: losses seen before any is called a spike.
        rollback_steps: how many steps before the incident a rollback goes back to.
    """

    policy: IncidentPolicy = "skip"
    spike_sigmas: float | None = 6.0
    window: int = 128
    min_history: int = 32
    rollback_steps: int = 0

    def __post_init__(self) -> None:
        if self.policy not in ("off", "skip", "rollback"):
            raise ConfigError(
                f"incidents.policy is {self.policy!r}; it must be off, skip or rollback"
            )
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            raise ConfigError(f"incidents.spike_sigmas is {self.spike_sigmas}; it must be above 0")
        if not 2 <= self.min_history <= self.window:
            raise ConfigError(
                f"incidents.min_history is {self.min_history}; it must be 2 to "
                f"incidents.window ({self.window})"
            )
        if self.rollback_steps < 0:
            raise ConfigError(f"incidents.rollback_steps is {self.rollback_steps}; least is 0")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything about a step but the model, the data and the logical world.

    Attributes:
        optimizer: see `OptimizerConfig`.
        incidents: see `IncidentConfig`.
        sharding: "replicated": every device has all parameters and moments. "zero1": moments
            and master parameters are split. "fsdp": also the parameters between two steps.
            No bit depends on it.
        compute_dtype: of activations and matrix products; sums are float32 in any case.
        param_dtype: of the parameters that the model reads; the master copy is float32.
        dropout: share of activations dropped.
        remat: which activations are computed again in the backward pass.
        replay_every: every so many steps each device recomputes a shard of its neighbour's
            and compares digests; 0: never.
        digest_every: every so many steps a record has a digest of the parameters; 0: never.
    """

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    incidents: IncidentConfig = field(default_factory=IncidentConfig)
    sharding: Sharding = "replicated"
    compute_dtype: FloatDtype = "float32"
    param_dtype: FloatDtype = "float32"
    dropout: float = 0.0
    remat: Remat = "none"
    replay_every: int = 0
    digest_every: int = 0

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise ConfigError(
                f"sharding is {self.sharding!r}; it must be one of {', '.join(SHARDINGS)}"
            )
        for name in ("compute_dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be float32 or bfloat16"
                )
        if self.remat not in ("none", "dots", "full"):
            raise ConfigError(f"remat is {self.remat!r}; it must be none, dots or full")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be 0 to less than 1")
        for name in ("replay_every", "digest_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; 0 is never, least is 0")


def _require_share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value < 1:
        raise ConfigError(f"{name} is {value}; it must be 0 to less than 1")
