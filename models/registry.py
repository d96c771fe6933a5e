"""The model families that can be run, by the name that `ModelConfig.family` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from checkpoint.name_table import NameTable
from models import llama, llama_names
from models.config import ModelConfig
from models.llama import Attend, Cache, Params
from models.training_hooks import TrainingHooks


class RunLayers(Protocol):
    """See `models.llama.run_layers`."""

    def __call__(
        self,
        params: Params,
        config: ModelConfig,
        x: jax.Array,
        positions: jax.Array,
        cache: Cache,
        attend: Attend[Cache],
        hooks: TrainingHooks = ...,
    ) -> tuple[jax.Array, Cache]: ...


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One family's pure functions and its name tables."""

    name: str
    init_params: Callable[[ModelConfig, jax.Array, DTypeLike], Params]
    abstract_params: Callable[[ModelConfig, DTypeLike], Any]
    embed: Callable[[Params, ModelConfig, jax.Array], jax.Array]
    run_layers: RunLayers
    logits: Callable[[Params, ModelConfig, jax.Array], jax.Array]
    logits_params: Callable[[ModelConfig], tuple[str, ...]]
    """The top-level entries of the parameters that `logits` reads."""
    name_tables: Mapping[str, Callable[[ModelConfig], NameTable]]
    """File convention ("hf" or "gguf") to the table for a config."""


LLAMA = ModelFamily(
    name="llama",
    init_params=llama.init_params,
    abstract_params=llama.abstract_params,
    embed=llama.embed,
    run_layers=llama.run_layers,
    logits=llama.logits,
    logits_params=llama.logits_params,
    name_tables={"hf": llama_names.hf_name_table, "gguf": llama_names.gguf_name_table},
)

FAMILIES: Mapping[str, ModelFamily] = {LLAMA.name: LLAMA}


def get_family(name: str) -> ModelFamily:
    """The family called `name`.

    Raises:
        ValueError: no such family; the message lists those there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"model family {name!r} is not supported; use one of {sorted(FAMILIES)}")
    return FAMILIES[name]
