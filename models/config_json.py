"""ModelConfig as JSON, and back without loss."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeVar

from checkpoint.errors import FormatError
from models.config import ModelConfig, RopeScaling
from models.registry import FAMILIES

MAX_SIZE = 2**31 - 1
SIZES = {
    "vocab_size": MAX_SIZE,
    "hidden_size": MAX_SIZE,
    "intermediate_size": MAX_SIZE,
    "num_layers": 4096,
    "num_heads": 1 << 16,
    "num_kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": MAX_SIZE,
}
"""The most that each may be."""

T = TypeVar("T", ModelConfig, RopeScaling)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """JSON values; tuples become lists."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `config_to_json`.

    Raises:
        FormatError: a field is unknown, missing or of the wrong type; the message names it.
    """
    scaling = values.get("rope_scaling")
    if scaling is not None:
        if not isinstance(scaling, Mapping):
            raise FormatError("model.json: config.rope_scaling must be an object or null")
        scaling = _build(RopeScaling, scaling, "config.rope_scaling")
    config = _build(ModelConfig, {**values, "rope_scaling": scaling}, "config")
    _check(config)
    return config


def _check(config: ModelConfig) -> None:
    """What a damaged file may claim, and no model is."""
    for name in SIZES:
        if not 1 <= getattr(config, name) <= SIZES[name]:
            raise FormatError(
                f"model.json: config.{name} is {getattr(config, name)}, not from 1 to {SIZES[name]}"
            )
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise FormatError(
            f"model.json: config has {config.num_heads} heads, {config.num_kv_heads} KV heads and "
            f"a head of {config.head_dim}: heads must be a multiple of KV heads, heads even"
        )
    if config.family not in FAMILIES:
        raise FormatError(
            f"model.json: config.family {config.family!r} is not one of {sorted(FAMILIES)}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise FormatError(
            f"model.json: {where} has the unknown field {unknown[0]!r}; it was written by "
            "another version of jaxserve, use that one or a newer one"
        )
    arguments = {}
    for field in fields(kind):
        if field.name in values:
            name = f"{where}.{field.name}"
            arguments[field.name] = _typed(values[field.name], hints[field.name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise FormatError(f"model.json: {where} lacks the field {field.name!r}")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise FormatError(f"model.json: {where}: {error}") from error


def _typed(value: Any, hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    for option in options:
        if option is types.NoneType:
            if value is None:
                return None
        elif typing.get_origin(option) is tuple:
            (item, _) = typing.get_args(option)
            if isinstance(value, list | tuple):
                return tuple(_typed(inner, item, name) for inner in value)
        elif option is float:
            if type(value) in (int, float) and math.isfinite(value):
                return float(value)
        elif type(value) is option:
            return value
    raise FormatError(f"model.json: {name} cannot be {str(value)[:80]!r}")
