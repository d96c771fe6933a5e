"""Adapters in PEFT's format, to be merged while a model is converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from checkpoint.migrate.plan import LowRank
from checkpoint.param_loading import flatten
from models.config import ModelConfig
from models.lora_peft import load_peft


def low_rank_updates(folder: Path, config: ModelConfig) -> dict[tuple[str, int | None], LowRank]:
    """The updates of an adapter folder, by path and layer of the kernels that they change.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: of the model that it is for.

    Raises:
        FormatError: not an adapter of this model.
    """
    lora = load_peft(folder, config)
    factors = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(lora.adapters).items()}
    updates: dict[tuple[str, int | None], LowRank] = {}
    for name in factors:
        path, _, part = name.rpartition(".")
        if part != "a":
            continue
        low, high = factors[f"{path}.a"], factors[f"{path}.b"]
        for layer in range(low.shape[0]):
            updates[f"{path}.kernel", layer] = LowRank(low[layer], high[layer], lora.scale)
    return updates
