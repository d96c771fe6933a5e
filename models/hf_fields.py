"""Typed access to the fields of a Hugging Face `config.json`.

Each miss is a FormatError that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from checkpoint.errors import FormatError
from models.config import RopeScaling

Fields: TypeAlias = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Name in the file to `ModelConfig.hidden_act`."""
WINDOWED, WHOLE = "sliding_attention", "full_attention"
DEFAULT_ROPE_THETA = 10000.0
MAX_LAYERS = 4096


def positive_int(
    fields: Fields, name: str, default: int | None = None, at_most: int = 2**31 - 1
) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
        raise FormatError(
            f"config.json: {name} must be a whole number from 1 to {at_most}, got {value!r}"
        )
    return value


def num_layers(fields: Fields, name: str) -> int:
    return positive_int(fields, name, at_most=MAX_LAYERS)


def positive_float(fields: Fields, name: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    if not _is_positive(value):
        raise FormatError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def boolean(fields: Fields, name: str, default: bool = False) -> bool:
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise FormatError(f"config.json: {name} must be true or false, got {value!r}")
    return value


def activation(fields: Fields, name: str, default: str = "silu") -> str:
    """The MLP's activation, as `ModelConfig.hidden_act` calls it."""
    value = fields.get(name, default)
    if value not in ACTIVATIONS:
        raise FormatError(
            f"config.json: {name} {value!r} is not supported; supported are "
            f"{', '.join(map(repr, ACTIVATIONS))}"
        )
    return ACTIVATIONS[str(value)]


def refuse(fields: Fields, values: Mapping[str, Any], family: str) -> None:
    """Refuse fields whose value changes what is computed and is not supported.

    Args:
        fields: the parsed file.
        values: name to the only value that is supported; absent and null are supported too.
        family: for the message.
    """
    for name, only in values.items():
        value = fields.get(name)
        if value is not None and value != only:
            raise FormatError(
                f"config.json: {name} {value!r} is not supported for {family}, only {only!r}"
            )


def num_kv_heads(fields: Fields, num_heads: int, *, may_be_absent: bool) -> int:
    """K; a file that may leave it out means one KV head a query head."""
    if may_be_absent and fields.get("num_key_value_heads") is None:
        return num_heads
    value = positive_int(fields, "num_key_value_heads")
    if num_heads % value:
        raise FormatError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {value}"
        )
    return value


def head_dim(fields: Fields, hidden_size: int, num_heads: int, default: int | None = None) -> int:
    """D, from the field, `default`, or E / H."""
    if fields.get("head_dim") is not None or default is not None:
        value = positive_int(fields, "head_dim", default)
    elif hidden_size % num_heads:
        raise FormatError(
            f"config.json: hidden_size {hidden_size} is not a multiple of "
            f"num_attention_heads {num_heads}, and head_dim is not given"
        )
    else:
        value = hidden_size // num_heads
    if value % 2:
        raise FormatError(f"config.json: head_dim {value} is odd; rotary needs pairs")
    return value


def layer_windows(
    fields: Fields, count: int, window: int | None, default_types: Sequence[str]
) -> tuple[int | None, ...]:
    """The windows of `count` layers, by `layer_types` or, without it, `default_types`."""
    types = fields.get("layer_types")
    types = default_types if types is None else types
    if not isinstance(types, Sequence) or len(types) != count:
        raise FormatError(f"config.json: layer_types must name the kind of {count} layers")
    unknown = sorted({str(kind) for kind in types} - {WINDOWED, WHOLE})
    if unknown:
        raise FormatError(
            f"config.json: layer_types names {unknown[0]!r}, which is not supported; supported "
            f"are {WHOLE!r} and {WINDOWED!r}"
        )
    if window is None and WINDOWED in types:
        raise FormatError("config.json: layer_types has sliding layers, but sliding_window is null")
    return tuple(window if kind == WINDOWED else None for kind in types)


def windows_as_config(windows: tuple[int | None, ...]) -> dict[str, Any]:
    """`sliding_window` and `layer_windows` of ModelConfig, whichever says it."""
    if len(set(windows)) == 1:
        return {"sliding_window": windows[0]}
    return {"layer_windows": windows}


def rope_parameters(fields: Fields) -> tuple[str, Fields]:
    """Name and value of the object with the rotary scaling, newer or older."""
    newer, older = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    if newer and older and newer != older:
        raise FormatError("config.json: rope_parameters and rope_scaling differ; remove one")
    name, scaling = ("rope_parameters", newer) if newer else ("rope_scaling", older)
    if not isinstance(scaling, Mapping):
        raise FormatError(f"config.json: {name} must be an object, not {scaling!r}")
    return name, scaling


def rope(
    fields: Fields, default_theta: float = DEFAULT_ROPE_THETA
) -> tuple[float, RopeScaling | None]:
    """Base and scaling where all layers are alike and whole heads are rotated."""
    name, scaling = rope_parameters(fields)
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise FormatError(
            f"config.json: {name} differs between layers, which is not supported; all layers "
            "must be alike"
        )
    theta_holder = scaling if scaling.get("rope_theta") is not None else fields
    theta = positive_float(theta_holder, "rope_theta", default_theta)
    refuse_partial_rotation(fields, scaling, name)
    return theta, rope_scaling(scaling, name)


def refuse_partial_rotation(fields: Fields, scaling: Fields, name: str) -> None:
    for holder, prefix in ((fields, ""), (scaling, f"{name}.")):
        value = holder.get("partial_rotary_factor")
        if value not in (None, 1, 1.0):
            raise FormatError(
                f"config.json: {prefix}partial_rotary_factor {value!r} is not supported, only 1.0"
            )


def rope_kind(scaling: Fields) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))


def rope_scaling(scaling: Fields, name: str) -> RopeScaling | None:
    """Scaling of the kinds that most families have."""
    kind = rope_kind(scaling)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", positive_float(scaling, "factor"))
    if kind == "llama3":
        return _llama3_scaling(scaling, name)
    raise FormatError(
        f"config.json: {name}.rope_type {kind!r} is not supported; supported are 'default', "
        "'linear' and 'llama3', for phi3 'longrope'"
    )


def _llama3_scaling(scaling: Fields, name: str) -> RopeScaling:
    llama3 = RopeScaling(
        kind="llama3",
        factor=positive_float(scaling, "factor"),
        low_freq_factor=positive_float(scaling, "low_freq_factor"),
        high_freq_factor=positive_float(scaling, "high_freq_factor"),
        original_max_position_embeddings=positive_int(scaling, "original_max_position_embeddings"),
    )
    if llama3.high_freq_factor <= llama3.low_freq_factor:
        raise FormatError(
            f"config.json: {name}.high_freq_factor must be above low_freq_factor, "
            f"got {llama3.high_freq_factor} and {llama3.low_freq_factor}"
        )
    return llama3


def long_rope_factors(scaling: Fields, name: str, num_pairs: int) -> tuple[float, ...]:
    """`num_pairs` positive numbers."""
    values = scaling.get(name)
    if (
        not isinstance(values, list)
        or len(values) != num_pairs
        or not all(map(_is_positive, values))
    ):
        raise FormatError(f"config.json: {name} must hold {num_pairs} positive numbers")
    return tuple(map(float, values))


def token_ids(value: Any) -> tuple[int, ...]:
    """None, an id or a list of ids, as a tuple."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in values:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise FormatError(
                f"config.json: bos_token_id and eos_token_id must be token ids, got {value!r}"
            )
    return tuple(values)


def _is_positive(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0
