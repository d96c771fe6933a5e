"""TrainConfig: all that a run is asked to do, as frozen values checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jaxserve.trainer.cadence import Cadence
from jaxserve.trainer.config_file import build, flat_fields, read_toml, with_settings
from jaxserve.trainer.errors import TrainConfigError
from jaxserve.trainer.schedule_section import parse_schedule, resolved
from jaxserve.trainer.step_config import (
    FloatDtype,
    IncidentConfig,
    OptimizerConfig,
    Remat,
    Sharding,
    StepConfig,
)
from jaxserve.trainer.world import Mode
from jaxserve.xc.config import XcSection
from models.config import ModelConfig
from schedules.config import ScheduleConfig
from schedules.tuner_config import TunerConfig

Task: TypeAlias = Literal["causal_lm", "extreme_classification"]

SMALL_STATE_BYTES = 8 << 20
LARGE_STATE_SNAPSHOT_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What is trained: exactly one of `source` and `shape`.

    Attributes:
        source: weights to start from: what `jaxserve serve --model` takes.
        shape: a model from scratch, by `models.config.ModelConfig`'s fields. Its tokenizer is
            the one that the data was prepared with.
    """

    source: str | None = None
    shape: ModelConfig | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.shape is None):
            raise TrainConfigError(
                "[model] needs either source (weights to start from) or a table [model.shape] "
                "(a new model)"
            )


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where examples come from.

    Attributes:
        path: folder that `jaxserve data prepare --out` wrote.
        seed: of the order of examples.
        log_reads: trainers write down which examples they really read, in `logs/reads-*.jsonl`.
    """

    path: str
    seed: int = 0
    log_reads: bool = False


@dataclass(frozen=True, kw_only=True)
class BatchSection:
    """The logical world's sizes; see `LogicalWorld`."""

    global_batch_size: int
    num_logical_shards: int
    micro_batch_size: int


@dataclass(frozen=True, kw_only=True)
class NumericsSection:
    """How a step computes; see `StepConfig` for what each does."""

    mode: Mode = "exact"
    seed: int = 0
    compute_dtype: FloatDtype = "float32"
    param_dtype: FloatDtype = "float32"
    dropout: float = 0.0
    remat: Remat = "none"
    replay_every: int = 0


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Train adapters of low rank and leave the model's own weights alone.

    Attributes:
        rank: of the adapters.
        alpha: they are scaled by `alpha / rank`.
        targets: projections that get one.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class PlacementSection:
    """Who computes; no bit depends on it.

    Attributes:
        processes: trainer processes.
        devices_per_process: devices of each; virtual ones on a CPU.
        sharding: what each device holds; see `StepConfig`.
    """

    processes: int = 1
    devices_per_process: int = 1
    sharding: Sharding = "replicated"

    def __post_init__(self) -> None:
        for name in ("processes", "devices_per_process"):
            _at_least(f"placement.{name}", getattr(self, name), 1)

    @property
    def num_devices(self) -> int:
        """N."""
        return self.processes * self.devices_per_process


@dataclass(frozen=True, kw_only=True)
class DurabilitySection:
    """What survives what.

    Attributes:
        snapshot_every: steps between snapshots in shared memory, which survive the death of
            trainers; "auto": 1 for a state of at most 8 MiB, else 10.
        checkpoint_every: steps between checkpoints on the disk.
        keep_last, keep_every: which checkpoints stay; see `RetentionPolicy`.
        on_save_failure: "continue" tries again at the next checkpoint; "stop" ends the run.
        ledger_retry_s: how long a full disk may hold up the ledger before the run ends.
    """

    snapshot_every: int | Literal["auto"] = "auto"
    checkpoint_every: int = 100
    keep_last: int = 3
    keep_every: int | None = None
    on_save_failure: Literal["continue", "stop"] = "continue"
    ledger_retry_s: float = 60.0

    def __post_init__(self) -> None:
        if self.snapshot_every != "auto":
            _at_least("durability.snapshot_every", self.snapshot_every, 1)
        _at_least("durability.checkpoint_every", self.checkpoint_every, 1)
        _at_least("durability.keep_last", self.keep_last, 1)


@dataclass(frozen=True, kw_only=True)
class SupervisionSection:
    """When trainers are given up.

    Attributes:
        watchdog_s: after the first step, a generation whose steps stop for the larger of this
            and 10 times the median step ends.
        start_timeout_s: the same for start, compilation and an evaluation.
        drain_timeout_s: how long a graceful end may take before trainers are killed and the
            newest snapshot counts.
        max_failures: generations in a row that may fail without a committed step.
        rebalance_gain: when one process is slower than the others, logical shards are shared anew
            if that would make steps so many times faster; None: never. Mode "exact" only.
        rebalance_after_s: for how long it must have been so: about 10 times what a restart costs.
    """

    watchdog_s: float = 60.0
    start_timeout_s: float = 1800.0
    drain_timeout_s: float = 60.0
    max_failures: int = 5
    rebalance_gain: float | None = 1.5
    rebalance_after_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("watchdog_s", "start_timeout_s", "drain_timeout_s", "rebalance_after_s"):
            if getattr(self, name) <= 0:
                raise TrainConfigError(f"supervision.{name} must be above 0")
        if self.rebalance_gain is not None and not self.rebalance_gain > 1:
            raise TrainConfigError(
                f"supervision.rebalance_gain is {self.rebalance_gain}; it must be above 1"
            )
        _at_least("supervision.max_failures", self.max_failures, 1)


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """Loss over the data set's eval split.

    Attributes:
        every: steps between two; the last step has one too.
        max_examples: at most so many, the first of the split; None: all.
    """

    every: int
    max_examples: int | None = None

    def __post_init__(self) -> None:
        _at_least("evaluation.every", self.every, 1)


@dataclass(frozen=True, kw_only=True)
class LoggingSection:
    """What is shown beside ledger and `metrics.jsonl`.

    Attributes:
        tensorboard: also write event files into `RUN/tensorboard`.
        plot: draw `plot.png` at the end; needs matplotlib.
        peak_flops: floating-point operations a second of all devices together, for the MFU
            estimate; None: no estimate.
        params_digest_every: steps between two lines of the ledger that have a digest of the
            parameters; 0: none has.
    """

    tensorboard: bool = False
    plot: bool = True
    peak_flops: float | None = None
    params_digest_every: int = 10

    def __post_init__(self) -> None:
        _at_least("logging.params_digest_every", self.params_digest_every, 0)
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise TrainConfigError(
                f"logging.peak_flops is {self.peak_flops}; it must be above 0, or be left out"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Paths are relative to the config file; `run_dir` is relative to where the command is started.

    Attributes:
        run_dir: the run's folder; made at the first start.
        total_steps: length of the run.
        task: "causal_lm": a language model, by [model]. "extreme_classification": texts to a few of
            very many labels, by [xc], with examples as `jaxserve data xc` makes them.
        schedule: `schedules.ScheduleConfig`'s fields, with `total` = `total_steps` unless given;
            or, with kind "auto" (or another variant of it), `schedules.TunerConfig`'s.
        compilation_cache_dir: where compiled programs are kept; None: in the user's cache.
    """

    run_dir: str
    total_steps: int
    data: DataSection
    batch: BatchSection
    schedule: Mapping[str, Any]
    task: Task = "causal_lm"
    model: ModelSection | None = None
    xc: XcSection | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    numerics: NumericsSection = field(default_factory=NumericsSection)
    incidents: IncidentConfig = field(default_factory=IncidentConfig)
    lora: LoraSection | None = None
    placement: PlacementSection = field(default_factory=PlacementSection)
    durability: DurabilitySection = field(default_factory=DurabilitySection)
    supervision: SupervisionSection = field(default_factory=SupervisionSection)
    evaluation: EvaluationSection | None = None
    logging: LoggingSection = field(default_factory=LoggingSection)
    compilation_cache_dir: str | None = None

    def __post_init__(self) -> None:
        _at_least("total_steps", self.total_steps, 1)
        if not self.run_dir:
            raise TrainConfigError("run_dir is empty; give the folder that the run shall have")
        self._check_task()
        if self.placement.num_devices > self.batch.num_logical_shards:
            raise TrainConfigError(
                f"placement asks for {self.placement.num_devices} devices, but "
                f"batch.num_logical_shards is {self.batch.num_logical_shards}: use fewer devices, "
                "or more logical shards (in a new run)"
            )

    @property
    def language_model(self) -> ModelSection:
        """[model], of a run that trains a language model.

        Raises:
            TrainConfigError: it trains something else.
        """
        if self.model is None:
            raise TrainConfigError(f"task is {self.task!r}: this run has no language model")
        return self.model

    def _check_task(self) -> None:
        sections = {"causal_lm": ("model", "xc"), "extreme_classification": ("xc", "model")}
        needed, foreign = sections[self.task]
        if getattr(self, needed) is None:
            raise TrainConfigError(f"task {self.task!r} needs a table [{needed}]")
        if getattr(self, foreign) is not None:
            raise TrainConfigError(f"[{foreign}] is not for task {self.task!r}: leave it out")
        if self.task == "extreme_classification":
            self._check_classification()

    def _check_classification(self) -> None:
        """What the steps of extreme classification cannot do is refused by name."""
        numerics = self.numerics
        fixed = {
            "numerics.mode": (numerics.mode, "exact"),
            "numerics.compute_dtype": (numerics.compute_dtype, "float32"),
            "numerics.param_dtype": (numerics.param_dtype, "float32"),
            "numerics.dropout": (numerics.dropout, 0.0),
            "numerics.remat": (numerics.remat, "none"),
            "numerics.replay_every": (numerics.replay_every, 0),
            "data.log_reads": (self.data.log_reads, False),
            "lora": (self.lora, None),
        }
        for name, (value, only) in fixed.items():
            if value != only:
                raise TrainConfigError(
                    f"{name} is {value!r}; task 'extreme_classification' knows only {only!r}"
                )
        if self.incidents.policy == "rollback":
            raise TrainConfigError(
                "incidents.policy is 'rollback', which bars examples, but every point is in every "
                "epoch of task 'extreme_classification': use 'skip' or 'off'"
            )
        if isinstance(self.parsed_schedule, TunerConfig):
            raise TrainConfigError(
                "schedule.kind: a rate that tunes itself is not supported with task "
                "'extreme_classification': give one with a peak_value, such as cosine"
            )

    @property
    def parsed_schedule(self) -> ScheduleConfig | TunerConfig:
        """The learning rate's schedule."""
        return parse_schedule(self.schedule, self.total_steps, "the config")

    def step_config(self) -> StepConfig:
        """How a step computes, as the numeric core takes it."""
        numerics = self.numerics
        return StepConfig(
            optimizer=self.optimizer,
            incidents=self.incidents,
            sharding=self.placement.sharding,
            compute_dtype=numerics.compute_dtype,
            param_dtype=numerics.param_dtype,
            dropout=numerics.dropout,
            remat=numerics.remat,
            replay_every=numerics.replay_every,
            digest_every=self.logging.params_digest_every,
        )

    def cadence(self, state_bytes: int) -> Cadence:
        """When snapshots and checkpoints are due, for a state of so many bytes."""
        every = self.durability.snapshot_every
        if every == "auto":
            every = 1 if state_bytes <= SMALL_STATE_BYTES else LARGE_STATE_SNAPSHOT_STEPS
        return Cadence(
            total_steps=self.total_steps,
            snapshot_every=every,
            checkpoint_every=self.durability.checkpoint_every,
            evaluate_every=self.evaluation.every if self.evaluation is not None else None,
        )

    def frozen_settings(self) -> dict[str, Any]:
        """The fields that decide the result beside the sizes of the logical world: they cannot
        change once a run has begun."""
        frozen = ["model", "optimizer", "numerics", "incidents", "lora", "total_steps"]
        if self.task != "causal_lm":  # Runs from before there were tasks have none in their world.
            frozen += ["task", "xc"]
        hidden = ("numerics.mode", "numerics.seed")  # Fields of the logical world themselves.
        settings = {
            name: value
            for name, value in flat_fields(self).items()
            if name.partition(".")[0] in frozen and name not in hidden
        }
        schedule = resolved(self.parsed_schedule)
        return settings | {f"schedule.{name}": value for name, value in schedule.items()}


def load_config(path: Path, settings: Iterable[str] = ()) -> TrainConfig:
    """Reads a training config.

    Args:
        path: a TOML file.
        settings: `a.b=VALUE`, applied over it in order.

    Raises:
        TrainConfigError: names the file, the field and the fix.
    """
    table = with_settings(read_toml(path), settings)
    return config_from_table(table, path)


def config_from_table(table: Mapping[str, Any], path: Path) -> TrainConfig:
    """A config from a file's tables; see `load_config`."""
    config = build(TrainConfig, table, str(path))
    parse_schedule(config.schedule, config.total_steps, str(path))
    base = path.absolute().parent
    model, xc = config.model, config.xc
    if model is not None:
        model = dataclasses.replace(model, source=_existing(base, model.source))
    if xc is not None:
        encoder = dataclasses.replace(xc.encoder, source=_existing(base, xc.encoder.source))
        run = _anchored(base, xc.encoder_run)
        xc = dataclasses.replace(xc, encoder=encoder, encoder_run=run)
    return dataclasses.replace(
        config,
        model=model,
        xc=xc,
        data=dataclasses.replace(config.data, path=_anchored(base, config.data.path)),
    )


def _anchored(base: Path, path: str | None) -> Any:
    return None if path is None else str((base / Path(path).expanduser()).resolve())


def _existing(base: Path, source: str | None) -> str | None:
    """A file beside the config, or else a name of the catalogue."""
    if source is None:
        return None
    anchored = Path(_anchored(base, source))
    return str(anchored) if anchored.exists() else source


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise TrainConfigError(f"{name} is {value}; it must be at least {least}")
