"""The model families that can be run, by the name that `ModelConfig.family` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from checkpoint.name_table import NameTable
from models import (
    falcon_names,
    gemma3_names,
    gpt2_names,
    llama_names,
    moe_names,
    phi3_names,
    qwen_names,
)
from models.config import ModelConfig
from models.decoder import Attend, Cache, Decoder, Params
from models.falcon import FALCON_DECODER
from models.gemma3 import GEMMA3_DECODER
from models.gpt2 import GPT2_DECODER
from models.llama import LLAMA_DECODER
from models.moe import MIXTRAL_DECODER, QWEN3_MOE_DECODER
from models.ops.tensor_shard import TensorShard
from models.phi3 import PHI3_DECODER
from models.qwen import QWEN2_DECODER, QWEN3_DECODER
from models.training_hooks import TrainingHooks


class Embed(Protocol):
    """See `models.decoder.Decoder.embed`."""

    def __call__(
        self,
        params: Params,
        config: ModelConfig,
        token_ids: jax.Array,
        shard: TensorShard | None = ...,
    ) -> jax.Array: ...


class RunLayers(Protocol):
    """See `models.decoder.Decoder.run_layers`."""

    def __call__(
        self,
        params: Params,
        config: ModelConfig,
        x: jax.Array,
        positions: jax.Array,
        cache: Cache,
        attend: Attend[Cache],
        hooks: TrainingHooks = ...,
        shard: TensorShard | None = ...,
        first_layer: int | jax.Array = ...,
        num_live: jax.Array | None = ...,
        adapter_of_row: jax.Array | None = ...,
    ) -> tuple[jax.Array, Cache]: ...


class Logits(Protocol):
    """See `models.decoder.Decoder.logits`."""

    def __call__(
        self,
        params: Params,
        config: ModelConfig,
        x: jax.Array,
        shard: TensorShard | None = ...,
        num_live: jax.Array | None = ...,
    ) -> jax.Array: ...


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One family's pure functions and its name tables."""

    name: str
    init_params: Callable[[ModelConfig, jax.Array, DTypeLike], Params]
    abstract_params: Callable[[ModelConfig, DTypeLike], Any]
    embed: Embed
    run_layers: RunLayers
    logits: Logits
    logits_params: Callable[[ModelConfig], tuple[str, ...]]
    """The top-level entries of the parameters that `logits` reads."""
    name_tables: Mapping[str, Callable[[ModelConfig], NameTable]]
    """File convention to the table for a config: "hf", "gguf", and "hf_base" where Hugging Face
    folders of the model without its head are common."""


def _family(
    name: str,
    decoder: Decoder,
    hf: Callable[[ModelConfig], NameTable],
    gguf: Callable[[ModelConfig], NameTable],
    **others: Callable[[ModelConfig], NameTable],
) -> ModelFamily:
    return ModelFamily(
        name=name,
        init_params=decoder.init_params,
        abstract_params=decoder.abstract_params,
        embed=decoder.embed,
        run_layers=decoder.run_layers,
        logits=decoder.logits,
        logits_params=decoder.logits_params,
        name_tables={"hf": hf, "gguf": gguf, **others},
    )


LLAMA = _family("llama", LLAMA_DECODER, llama_names.hf_name_table, llama_names.gguf_name_table)

FAMILIES: Mapping[str, ModelFamily] = {
    family.name: family
    for family in (
        LLAMA,
        _family(
            "qwen2",
            QWEN2_DECODER,
            qwen_names.qwen2_hf_name_table,
            qwen_names.qwen2_gguf_name_table,
        ),
        _family(
            "qwen3",
            QWEN3_DECODER,
            qwen_names.qwen3_hf_name_table,
            qwen_names.qwen3_gguf_name_table,
        ),
        _family("gemma3", GEMMA3_DECODER, gemma3_names.hf_name_table, gemma3_names.gguf_name_table),
        _family("phi3", PHI3_DECODER, phi3_names.hf_name_table, phi3_names.gguf_name_table),
        _family(
            "gpt2",
            GPT2_DECODER,
            gpt2_names.hf_name_table,
            gpt2_names.gguf_name_table,
            hf_base=gpt2_names.hf_base_name_table,
        ),
        _family("falcon", FALCON_DECODER, falcon_names.hf_name_table, falcon_names.gguf_name_table),
        _family(
            "mixtral",
            MIXTRAL_DECODER,
            moe_names.mixtral_hf_name_table,
            moe_names.mixtral_gguf_name_table,
        ),
        _family(
            "qwen3_moe",
            QWEN3_MOE_DECODER,
            moe_names.qwen3_moe_hf_name_table,
            moe_names.qwen3_moe_gguf_name_table,
        ),
    )
}


def get_family(name: str) -> ModelFamily:
    """The family called `name`.

    Raises:
        ValueError: no such family; the message lists those there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"model family {name!r} is not supported; use one of {sorted(FAMILIES)}")
    return FAMILIES[name]
