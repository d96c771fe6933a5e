"""One compiled model, and an engine of any policy around it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from jaxserve.engine.compilation import use_compilation_cache
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.scheduler.budget import StepBudget
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.engine.settings import EngineSettings, resolve_settings
from jaxserve.engine.startup import build_executor
from jaxserve.engine.step_log import CompletedStep, ObservedExecutor
from models.loading import open_model
from models.tokenizer import Tokenizer
from tools.policy_evaluation.model import device_params, model_config, write_model
from tools.policy_evaluation.operating_point import OperatingPoint
from tools.policy_evaluation.placement import Placement


@dataclass(frozen=True, slots=True)
class Rig:
    """The executor is compiled once, for every policy: only the scheduler differs."""

    point: OperatingPoint
    placement: Placement
    model: Path
    """The model's folder."""
    settings: EngineSettings
    executor: JaxExecutor
    tokenizer: Tokenizer

    def scheduler_config(self, policy: str, token_budget: int | None = None) -> SchedulerConfig:
        """`token_budget` is the operating point's by default."""
        config = self.settings.scheduler
        token_budget = token_budget or self.point.token_budget
        if policy in ("sarathi", "slack"):
            # A step never takes a larger program than its budget needs.
            small = tuple(rows for rows in config.buckets if rows <= token_budget)
            config = replace(config, buckets=small, token_budget=token_budget)
        return replace(config, policy=policy, token_budget=token_budget)

    @contextmanager
    def engine(
        self,
        policy: str,
        *,
        token_budget: int | None = None,
        budget: StepBudget | None = None,
        steps: list[CompletedStep] | None = None,
    ) -> Iterator[Engine]:
        """A started engine; `steps` gets every step that it completes."""
        scheduler = Scheduler(self.scheduler_config(policy, token_budget), budget=budget)
        log = [] if steps is None else steps
        observed = ObservedExecutor(self.executor, time.monotonic, log.append)
        engine = Engine(scheduler, observed, self.tokenizer, self.settings.model_config)
        engine.start()
        try:
            yield engine
        finally:
            engine.stop()


def make_rig(
    point: OperatingPoint, placement: Placement, folder: Path, *, cache: Path | None = None
) -> Rig:
    """Writes the model to `folder` and compiles it for every bucket of the operating point.

    Args:
        cache: of compiled programs; the engine's own by default.
    """
    write_model(folder, point)
    model = model_config(point)
    largest = max(point.token_budgets)
    config = EngineConfig(
        model=str(folder),
        dtype=point.dtype,
        kernels="xla",
        max_num_seqs=point.max_num_seqs,
        max_model_len=point.context,
        token_budget=largest,
        buckets=(largest,),
        kv_cache_bytes=point.pool_bytes,
        prefix_caching=False,
        compilation_cache_dir=cache,
    )
    settings = resolve_settings(config, model, jax.devices()[0])
    settings = replace(
        settings,
        scheduler=replace(settings.scheduler, buckets=point.buckets),
        one_bucket=False,
    )
    use_compilation_cache(settings.cache_dir)
    if point.is_file:
        params = open_model(folder).load_params(settings.dtype)
    else:
        params = device_params(settings.model_config, settings.dtype)
    executor = build_executor(settings, params)
    return Rig(point, placement, folder, settings, executor, Tokenizer.from_folder(folder))
