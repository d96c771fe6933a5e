"""One compiled model, and an engine of any policy around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from models.loading import ModelSource, open_model
from models.tokenizer import Tokenizer
from tools.policy_evaluation.model import CONTEXT

TOKEN_BUDGET = 64
MAX_NUM_SEQS = 20
SMALL_BUCKETS = (4, 20)
LARGE_BUCKETS = (256, 1024, 1360)
"""For whole prompts: what `jaxserve serve` adds for policies that need them."""
POOL_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Rig:
    """The executor is compiled once, for every policy: only the scheduler differs."""

    settings: EngineSettings
    executor: JaxExecutor
    tokenizer: Tokenizer
    source: ModelSource

    def scheduler_config(self, policy: str, token_budget: int = TOKEN_BUDGET) -> SchedulerConfig:
        config = self.settings.scheduler
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
        token_budget: int = TOKEN_BUDGET,
        budget: StepBudget | None = None,
        steps: list[CompletedStep] | None = None,
    ) -> Iterator[Engine]:
        """A started engine; `steps` gets every step that it completes."""
        scheduler = Scheduler(self.scheduler_config(policy, token_budget), budget=budget)
        log = [] if steps is None else steps
        observed = ObservedExecutor(self.executor, time.monotonic, log.append)
        engine = Engine(scheduler, observed, self.tokenizer, self.source.config)
        engine.start()
        try:
            yield engine
        finally:
            engine.stop()


def make_rig(
    model: Path,
    token_budgets: Sequence[int] = (TOKEN_BUDGET,),
    *,
    cache: Path | None = None,
) -> Rig:
    """Compiles the model for every token budget and for whole prompts.

    Args:
        cache: of compiled programs; the engine's own by default.
    """
    source = open_model(model)
    config = EngineConfig(
        model=str(model),
        dtype="float32",
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=CONTEXT,
        token_budget=max(token_budgets),
        buckets=(max(token_budgets),),
        kv_cache_bytes=POOL_BYTES,
        prefix_caching=False,
        compilation_cache_dir=cache,
    )
    settings = resolve_settings(config, source.config, jax.devices()[0])
    buckets = tuple(sorted({*SMALL_BUCKETS, *token_budgets, *LARGE_BUCKETS}))
    settings = replace(
        settings, scheduler=replace(settings.scheduler, buckets=buckets), one_bucket=False
    )
    use_compilation_cache(settings.cache_dir)
    params = source.load_params(settings.dtype)
    return Rig(settings, build_executor(settings, params), source.load_tokenizer(), source)
