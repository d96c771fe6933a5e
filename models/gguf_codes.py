"""The codes of a GGUF file's quantised matrices, as they are.

Q8_0, Q4_0 and Q4_1 group 32 inputs of an output, with a float16 scale each, and Q4_1 a float16
minimum; ggml's `block_q8_0`, `block_q4_0` and `block_q4_1`. Matrices of other types are loaded as
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.formats.gguf import GgufFile
from checkpoint.name_table import NameTable, TensorRule
from checkpoint.param_loading import flatten, load_params, unflatten
from models.decoder import Params
from models.loading import ModelSource, keep_on_host
from models.native_layout import HEAD
from models.ops.packed import GROUP, Codes, Kind

Array = npt.NDArray[Any]

_KINDS = {"Q8_0": Kind.Q8, "Q4_0": Kind.Q4, "Q4_1": Kind.Q4}
_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
_Q4_0_ZERO = 8
"""The code of weight 0."""


def kinds_in_file(source: ModelSource) -> tuple[tuple[str, Kind], ...]:
    """The kernels, by path, whose codes can be kept, and `HEAD` if the head's can.

    A kernel's can if its tensors of all layers have types of one kind.

    Raises:
        FormatError: not a GGUF file, or one with adapters to merge.
    """
    file = _file(source)
    kinds = {}
    for path, rule in _coded_rules(source).items():
        types = {file.info(name).dtype for name, _ in _parts(source, rule)}
        held = {_KINDS.get(name) for name in types}
        if len(held) == 1 and None not in held:
            kinds[path] = _KINDS[types.pop()]
    return tuple(kinds.items())


def load_codes(source: ModelSource, dtype: npt.DTypeLike) -> tuple[Params, Any]:
    """All parameters on the host, with `Codes` for the kernels of `kinds_in_file`, and the head.

    Returns:
        `(params, head [1, E, V])`; leaves that are not codes have `dtype`. An untied head is left
        out of the parameters, a tied one stands among them as the embedding.

    Raises:
        FormatError: as `ModelSource.load_params` and `kinds_in_file`.
    """
    file, rules = _file(source), _coded_rules(source)
    kinds = dict(kinds_in_file(source))
    leaves = {
        path: _stack(file, source, rule, kinds[path])
        for path, rule in rules.items()
        if path in kinds and path != HEAD
    }
    floats = _load_others(source, [rules[path] for path in leaves], dtype)
    head: Any
    if HEAD in kinds:
        codes, scales, minima = _fields(_transformed(_read(file, rules[HEAD].name), np.transpose))
        head = Codes(codes[None], scales[None], None if minima is None else minima[None])
    elif source.config.tie_word_embeddings:
        head = floats["embed"].T[None]
    else:
        head = floats["lm_head"][None]
    floats.pop("lm_head", None)
    return unflatten({**flatten(floats), **leaves}), head


def _file(source: ModelSource) -> GgufFile:
    if not isinstance(source.tensors, GgufFile):
        raise FormatError(
            f"{source.name} is no GGUF file, so it holds no codes to keep: leave --weights-format "
            "out, or choose --quantization int8"
        )
    if source.lora is not None:
        raise FormatError("adapters cannot be added to codes: leave --weights-format out")
    return source.tensors


def _coded_rules(source: ModelSource) -> dict[str, TensorRule]:
    """The rules of the projections' kernels and, as `HEAD`, of the head."""
    head = "embed" if source.config.tie_word_embeddings else "lm_head"
    rules = {}
    for rule in source.name_table.rules:
        if rule.path.startswith("layers.") and rule.path.endswith(".kernel"):
            rules[rule.path] = rule
        elif rule.path == head:
            rules[HEAD] = rule
    return rules


def _parts(source: ModelSource, rule: TensorRule) -> Iterator[tuple[str, tuple[int, ...]]]:
    return rule.parts((source.config.num_layers,))


def _load_others(source: ModelSource, coded: Sequence[TensorRule], dtype: npt.DTypeLike) -> Params:
    """All leaves but those of the rules in `coded`, as host arrays."""
    table, paths = source.name_table, {rule.path for rule in coded}
    names = [re.escape(name) for rule in coded for name, _ in _parts(source, rule)]
    others = NameTable(
        tuple(rule for rule in table.rules if rule.path not in paths),
        (*table.ignored, *names),
        table.copies,
    )
    abstract = flatten(source.family.abstract_params(source.config, np.dtype(dtype)))
    for path in paths:
        del abstract[path]
    return load_params(source.tensors, others, unflatten(abstract), place=keep_on_host)


def _stack(file: GgufFile, source: ModelSource, rule: TensorRule, kind: Kind) -> Codes:
    """A kernel's codes of all layers."""
    layers = [
        _fields(_transformed(_read(file, name), rule.transform.to_leaf))
        for name, _ in _parts(source, rule)
    ]
    codes, scales, minima = zip(*layers, strict=True)
    has_minima = kind == Kind.Q4
    return Codes(np.stack(codes), np.stack(scales), np.stack(minima) if has_minima else None)


def _fields(codes: Codes) -> tuple[Array, Array, Array | None]:
    return codes.codes, codes.scales, codes.minima


def _transformed(codes: Codes, transform: Any) -> Codes:
    """Each array `[out, ...]` through what turns the file's matrix into `[in, out]`.

    Such transforms move rows and swap axes, so they do to groups what they do to inputs.
    """
    minima = None if codes.minima is None else transform(codes.minima)
    return replace(
        codes, codes=transform(codes.codes), scales=transform(codes.scales), minima=minima
    )


def _read(file: GgufFile, name: str) -> Codes:
    """One matrix as the file has it: codes `[out, in]`, scales and minima `[out, in / 32]`."""
    info = file.info(name)
    type_name, (num_out, num_in) = info.dtype, info.shape
    blocks = file.raw(name).reshape(num_out, num_in // GROUP, _BLOCK_BYTES[type_name])
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if type_name == "Q8_0":
        codes = blocks[..., 2:] ^ np.uint8(128)  # from signed to + 128
        return Codes(codes.reshape(num_out, num_in), scales, None)
    if type_name == "Q4_1":
        minima, packed = blocks[..., 2:4].copy().view(np.float16)[..., 0], blocks[..., 4:]
    else:
        # A power of two times a float16 is exact.
        minima, packed = (scales * np.float16(-_Q4_0_ZERO)), blocks[..., 2:]
    # A byte's low four bits are an input of the group's first half.
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return Codes(codes.reshape(num_out, num_in), scales, minima)
