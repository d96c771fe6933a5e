"""Adapters with random numbers for tiny models, as peft's files or beside weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoint.param_loading import unflatten
from models.config import ModelConfig
from models.lora import Lora
from models.lora_peft import adapted_projections, save_peft
from models.registry import get_family


def random_lora(
    config: ModelConfig,
    seed: int,
    *,
    rank: int = 2,
    scale: float = 1.5,
    targets: tuple[str, ...] = (),
    size: float = 0.4,
) -> Lora:
    """An adapter that changes what the model says; of all projections, or of `targets`."""
    rng = np.random.default_rng(seed)
    shapes = get_family(config.family).abstract_params(config, jnp.float32)
    leaves: dict[str, jax.Array] = {}
    for path in adapted_projections(config):
        if targets and path.split(".")[-1] not in targets:
            continue
        node = shapes
        for name in path.split("."):
            node = node[name]
        num_layers, num_in, num_out = node["kernel"].shape
        for part, shape in (("a", (num_layers, num_in, rank)), ("b", (num_layers, rank, num_out))):
            leaves[f"{path}.{part}"] = jnp.asarray(rng.normal(0, size, shape), jnp.float32)
    return Lora(unflatten(leaves), scale)


def write_adapter(folder: Path, lora: Lora, config: ModelConfig) -> Path:
    """The files of `lora`."""
    save_peft(folder, lora, config)
    return folder
