"""EngineSettings: an EngineConfig resolved for one model on one device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.memory_plan import choose_num_pages, tree_bytes
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.step_inputs import StepLayout
from jaxserve.errors import ConfigError
from jaxserve.model_store import default_root
from models.config import ModelConfig
from models.ops.attention.registry import AttentionImplementation, select
from models.ops.attention.work import AttentionTiling
from models.registry import get_family


@dataclass(frozen=True, slots=True)
class PlatformDefaults:
    """What "auto" becomes."""

    dtype: str
    token_budget: int
    max_num_seqs: int
    max_model_len: int
    small_buckets: tuple[int, ...]
    """Buckets below max_num_seqs and the token budget: on a CPU a step of few
    rows is far cheaper than one of 32, on a GPU both read the same weights."""


CPU_DEFAULTS = PlatformDefaults("float32", 128, 32, 2048, (4,))
ACCELERATOR_DEFAULTS = PlatformDefaults("bfloat16", 512, 256, 8192, ())


@dataclass(frozen=True, slots=True)
class EngineSettings:
    device: jax.Device
    model_config: ModelConfig
    dtype: np.dtype
    attention: AttentionImplementation
    tiling: AttentionTiling
    scheduler: SchedulerConfig
    one_bucket: bool
    cache_dir: Path

    def layouts(self) -> tuple[StepLayout, ...]:
        """One static layout per bucket."""
        scheduler = self.scheduler
        return tuple(
            StepLayout(
                num_rows=rows,
                num_slots=scheduler.max_num_seqs,
                num_sample_rows=scheduler.max_sample_rows(rows),
                page_table_width=self.tiling.page_table_width(scheduler.max_pages_per_seq),
                num_pages=scheduler.num_pages,
                vocab_size=self.model_config.vocab_size,
                tiling=self.tiling,
                decodes_as_tiles=self.one_bucket,
            )
            for rows in scheduler.buckets
        )


def resolve_settings(
    config: EngineConfig, model_config: ModelConfig, device: jax.Device
) -> EngineSettings:
    """Fills in every "auto". Raises ConfigError naming the flag to change."""
    defaults = CPU_DEFAULTS if device.platform == "cpu" else ACCELERATOR_DEFAULTS
    dtype = jnp.dtype(defaults.dtype if config.dtype == "auto" else config.dtype)
    try:
        attention = select(config.attention, device.platform)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model_limit = model_config.max_position_embeddings
    max_model_len = config.max_model_len or min(model_limit, defaults.max_model_len)
    if max_model_len > model_limit:
        raise ConfigError(
            f"--max-model-len {max_model_len} is beyond the model's own limit of {model_limit}"
        )
    token_budget, max_num_seqs, buckets = _resolve_rows(config, defaults)
    weights_bytes = tree_bytes(get_family(model_config.family).abstract_params(model_config, dtype))
    num_pages = choose_num_pages(
        model_config,
        page_size=config.page_size,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=config.kv_cache_bytes,
        weights_bytes=weights_bytes,
        device=device,
    )
    scheduler = SchedulerConfig(
        num_pages=num_pages,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        buckets=buckets,
        page_size=config.page_size,
        watermark=config.watermark,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        prefix_caching=config.prefix_caching,
        policy=config.policy,
    )
    return EngineSettings(
        device=device,
        model_config=model_config,
        dtype=dtype,
        attention=attention,
        tiling=AttentionTiling(
            page_size=config.page_size, pages_per_block=max(1, 64 // config.page_size)
        ),
        scheduler=scheduler,
        one_bucket=len(buckets) == 1,
        cache_dir=config.compilation_cache_dir or default_root() / "xla",
    )


def _resolve_rows(
    config: EngineConfig, defaults: PlatformDefaults
) -> tuple[int, int, tuple[int, ...]]:
    """Token budget, slots and buckets."""
    asked = config.buckets
    if isinstance(asked, tuple):
        token_budget = config.token_budget or asked[-1]
    else:
        token_budget = config.token_budget or defaults.token_budget
    max_num_seqs = config.max_num_seqs or min(defaults.max_num_seqs, token_budget)
    if isinstance(asked, tuple):
        return token_budget, max_num_seqs, asked
    if asked == "one":
        return token_budget, max_num_seqs, (token_budget,)
    sizes = {rows for rows in (*defaults.small_buckets, max_num_seqs) if rows < token_budget}
    return token_budget, max_num_seqs, (*sorted(sizes), token_budget)
