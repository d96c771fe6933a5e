"""Name tables from a family's parameters and what its file convention calls each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import jax.numpy as jnp
from jax.typing import DTypeLike

from checkpoint.name_table import (
    IDENTITY,
    TRANSPOSE,
    NameTable,
    TensorRule,
    Transform,
    chain,
)
from checkpoint.param_loading import flatten
from models.config import ModelConfig
from models.decoder import Params

SUFFIXES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


@dataclass(frozen=True, slots=True)
class FileNames:
    """What one file convention calls a family's parts.

    A file may have a bias where our parameters have none: it is then unexpected, and refused.
    """

    embed: str
    layer_prefix: str
    """With `{layer}`; comes before each of `layer_names`."""
    layer_names: Mapping[str, str]
    """Part, e.g. `attention.q_proj`, to its name, without the ending."""
    lm_head: str = ""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """Outside the layers: part, e.g. `final_norm`, to its name, without the ending."""
    embeddings: Mapping[str, str] = field(default_factory=dict)
    """Other tables of rows: leaf, e.g. `position_embed`, to its name."""
    kernels: Transform = TRANSPOSE
    """How files hold matrices."""
    orders: Mapping[str, Transform] = field(default_factory=dict)
    """Part to what is done to its matrix's rows, and to its bias, before `kernels`."""
    kernel_transforms: Mapping[str, Transform] = field(default_factory=dict)
    """Part to what is done to its matrix instead of all that."""
    scales: Transform = IDENTITY
    """How files hold the norms' scales."""
    ignored: tuple[str, ...] = ()
    suffixes: Mapping[str, str] = field(default_factory=lambda: SUFFIXES)


class HasParams(Protocol):
    """A family's decoder, or another model."""

    def abstract_params(self, config: ModelConfig, dtype: DTypeLike) -> Params:
        """See `models.decoder.Decoder.abstract_params`."""
        ...


def make_name_table(model: HasParams, config: ModelConfig, names: FileNames) -> NameTable:
    """The table for one config of `model`.

    Raises:
        KeyError: `names` lacks a part of the family.
    """
    return NameTable(
        rules=tuple(_rules(model, config, names)),
        ignored=names.ignored,
        # Some files of tied models write the head out; it must then be the embedding.
        copies={names.lm_head: names.embed} if config.tie_word_embeddings else {},
    )


def _rules(model: HasParams, config: ModelConfig, names: FileNames) -> Iterator[TensorRule]:
    whole = {"embed": names.embed, **names.embeddings}
    for path in flatten(model.abstract_params(config, jnp.float32)):
        if path in whole:
            yield TensorRule(whole[path], path)
        elif path == "lm_head":
            yield TensorRule(names.lm_head, path, TRANSPOSE)
        else:
            yield _part_rule(path, names)


def _part_rule(path: str, names: FileNames) -> TensorRule:
    part, _, kind = path.rpartition(".")
    if part.startswith("layers."):
        part = part.removeprefix("layers.")
        name = names.layer_prefix + names.layer_names[part]
    else:
        name = names.other_names[part]
    order = names.orders.get(part, IDENTITY)
    if kind == "scale":
        transform = names.scales
    elif kind == "bias":
        transform = order
    elif part in names.kernel_transforms:
        transform = names.kernel_transforms[part]
    else:
        transform = names.kernels if order is IDENTITY else chain(order, names.kernels)
    return TensorRule(name + names.suffixes[kind], path, transform)
