"""Adapters: merged while a model is converted, and in PEFT's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from checkpoint.migrate.plan import LowRank
from checkpoint.param_loading import flatten
from jaxserve.errors import ConfigError
from jaxserve.trained_model import open_model
from models.lora import Lora
from models.lora_peft import save_peft


def low_rank_updates(lora: Lora | None) -> dict[tuple[str, tuple[int, ...]], LowRank]:
    """What adapters add, by path and layer of the kernels that they change; None adds nothing."""
    if lora is None:
        return {}
    factors = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(lora.adapters).items()}
    updates: dict[tuple[str, tuple[int, ...]], LowRank] = {}
    for name in factors:
        path, _, part = name.rpartition(".")
        if part != "a":
            continue
        low, high = factors[f"{path}.a"], factors[f"{path}.b"]
        for layer in range(low.shape[0]):
            updates[f"{path}.kernel", (layer,)] = LowRank(low[layer], high[layer], lora.scale)
    return updates


def export_adapter(run: Path, folder: Path, *, overwrite: bool) -> None:
    """Write the adapters of a training run in PEFT's format.

    Args:
        run: a run with `[lora]`; `DIR@STEP` names a checkpoint.
        folder: is made if it is missing.
        overwrite: whether an adapter that is there may be replaced.

    Raises:
        ConfigError: the run has no adapters; else as `jaxserve.trained_model.open_model`.
        FormatError: the folder holds an adapter, or the format cannot express these.
    """
    source = open_model(run)
    if source.lora is None:
        raise ConfigError(
            f"{run} has no adapters beside its weights: give a training run with [lora], or export "
            "the weights with `jaxserve checkpoint convert`"
        )
    save_peft(folder, source.lora, source.config, base_model=str(source.path), overwrite=overwrite)
