"""Name tables of our own checkpoints: a parameter is called by its path in the pytree."""

from __future__ import annotations

from checkpoint.name_table import LAYER, NameTable, TensorRule
from checkpoint.param_loading import flatten
from models.config import ModelConfig
from models.registry import get_family

SCANNED = "own"
"""Layers stacked on a leading axis, as in memory: `layers.mlp.up_proj.kernel`."""
UNSCANNED = "own_unscanned"
"""One array a layer: `layers.0.mlp.up_proj.kernel`."""
LAYERS = "layers."


def own_name_table(config: ModelConfig, convention: str) -> NameTable:
    """The table for `SCANNED` or `UNSCANNED`; nothing is transformed."""
    paths = flatten(get_family(config.family).abstract_params(config, "float32"))
    return NameTable(tuple(TensorRule(own_name(path, convention), path) for path in paths))


def own_name(path: str, convention: str) -> str:
    """What the leaf at `path` is called, with `{layer}` where there is one array a layer."""
    if convention == UNSCANNED and path.startswith(LAYERS):
        return f"{LAYERS}{LAYER}.{path.removeprefix(LAYERS)}"
    return path
