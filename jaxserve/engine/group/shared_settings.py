"""What the leader decides for all: the settings that programs are compiled for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.group.errors import GroupError
from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.step_arrays import abstract_arrays
from models.mesh_shape import parse_mesh
from models.ops.attention.kv_pool import page_bytes

_AS_GIVEN = (
    "quantization",
    "kv_cache_dtype",
    "policy",
    "page_size",
    "watermark",
    "prefix_caching",
    "speculative_method",
    "num_speculative_tokens",
    "prompt_lookup_max",
    "prompt_lookup_min",
)


def shared_settings(config: EngineConfig, settings: EngineSettings) -> dict[str, Any]:
    """The leader's settings, with every "auto" resolved, as JSON values.

    Objectives are left out: only the scheduler, which the leader has, goes by them.
    """
    scheduler, sharding = settings.scheduler, settings.sharding
    model_config = settings.model_config if sharding is None else sharding.served_config
    one_page = page_bytes(model_config, scheduler.page_size, settings.pool_dtype)
    return {
        **{name: getattr(config, name) for name in _AS_GIVEN},
        "mesh": str(config.mesh),
        "dtype": settings.dtype.name,
        "attention": settings.attention.name,
        "token_budget": scheduler.token_budget,
        "buckets": list(scheduler.buckets),
        "max_num_seqs": scheduler.max_num_seqs,
        "max_model_len": scheduler.max_model_len,
        # One page is spare, see `kv_pool`.
        "kv_cache_bytes": (scheduler.num_pages + 1) * one_page,
    }


def with_shared_settings(config: EngineConfig, shared: Mapping[str, Any]) -> EngineConfig:
    """A follower's config: its own model and cache, all else as the leader says.

    Raises GroupError for what this version does not know, ConfigError for values that no config
    takes.
    """
    known = {*_AS_GIVEN, "mesh", "dtype", "attention", "token_budget", "buckets"}
    known |= {"max_num_seqs", "max_model_len", "kv_cache_bytes"}
    if shared.keys() != known:
        names = ", ".join(sorted(shared.keys() ^ known))
        raise GroupError(f"the leader is of another version, which differs in {names}")
    values = {**shared, "mesh": parse_mesh(shared["mesh"]), "buckets": tuple(shared["buckets"])}
    own = EngineConfig(model=config.model, compilation_cache_dir=config.compilation_cache_dir)
    return replace(own, **values)


def fingerprint(settings: EngineSettings) -> str:
    """Equal for two processes only if they have compiled the same programs for one model."""
    arrays = abstract_arrays(settings)
    shapes = jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype.name),
        (settings.abstract_params(), arrays.kv_pool, arrays.slots),
    )
    facts = (
        settings.model_config,
        settings.dtype.name,
        settings.attention.name,
        settings.quantization,
        str(settings.mesh),
        settings.layouts(),
        settings.scheduler.max_model_len,
        shapes,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()
