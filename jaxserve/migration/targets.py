"""From a source and a request to a Migration: what each format's files will hold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import jaxserve
from checkpoint.formats.gguf_blocks import WRITABLE
from checkpoint.formats.gguf_writer import GgufTensor
from checkpoint.formats.gguf_writer import make_header as make_gguf_header
from checkpoint.formats.safetensors import INDEX_FILE
from checkpoint.formats.safetensors_writer import (
    ShardTensor,
    make_header,
    make_index,
    shard_names,
    split_shards,
)
from checkpoint.migrate.plan import Plan, PlannedArray, PlannedPart
from checkpoint.migrate.run import Migration, StepTarget
from checkpoint.migrate.target import FileLayout
from jaxserve.migration.arrays import Updates, file_arrays, planned, raw_array, step_arrays
from jaxserve.migration.request import ConversionRequest
from jaxserve.migration.shards import original_shards
from jaxserve.migration.source import ConstantParts, SourceModel, extra_array
from models.checkpoint_model import MODEL_FILE, TOKENIZER, model_json
from models.gguf_config_export import KEPT_IN_F32, rope_tensors
from models.gguf_export import gguf_metadata
from models.hf_config import config_from_hf
from models.hf_export import config_to_hf
from models.tokenizer_files import save_tokenizer

STEP_OF_CONVERTED = 0
WITHOUT_BIASES = ("falcon", "qwen3", "qwen3_moe")
"""Families whose published models have none in their projections, and so llama.cpp has none."""
WITHOUT_WINDOWS = ("llama", "phi3")
"""Families whose sliding windows llama.cpp ignores: exact within a window's length only."""
FLOAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def make_migration(source: SourceModel, request: ConversionRequest, updates: Updates) -> Migration:
    """The whole conversion as a value; no weights are read.

    Raises:
        FormatError: the target's format cannot express the model; the message says what.
    """
    make = {"safetensors": _safetensors, "gguf": _gguf, "orbax": _orbax}[request.to]
    return make(source, request, updates)


def _safetensors(source: SourceModel, request: ConversionRequest, updates: Updates) -> Migration:
    table = source.model.family.name_tables["hf"](source.config)
    arrays = {
        wanted.name: planned(source, wanted, request.dtype, updates)
        for wanted in file_arrays(source, table)
    }
    arrays |= {name: raw_array(source, name, array) for name, array in source.extras.items()}
    copies = {copy: replace(arrays[original], name=copy) for copy, original in table.copies.items()}
    shards = original_shards(source.carried, {**copies, **arrays}, arrays.keys())
    if shards is None:
        tensors = [_shard_tensor(array) for array in arrays.values()]
        split = split_shards(tensors, request.max_shard_bytes)
        named = dict(zip(shard_names(len(split)), split, strict=True))
        headers = {name: make_header(tensors, {"format": "pt"}) for name, tensors in named.items()}
        ordered = list(arrays.values())
    else:
        named, headers = dict(shards.tensors), dict(shards.headers)
        ordered = list(shards.arrays)
    layouts = tuple(_layout(name, headers[name], tensors) for name, tensors in named.items())
    carried = _hf_files(source, request, arrays)
    if len(named) > 1 or (INDEX_FILE in source.carried.files and shards is not None):
        carried[INDEX_FILE] = _index(source, named, is_original=shards is not None)
    return _migration(source, request, ordered, layouts, carried, _others_left_out(source))


def _shard_tensor(array: PlannedArray) -> ShardTensor:
    return ShardTensor(array.name, array.dtype, array.shape, array.num_bytes)


def _layout(name: str, header: bytes, tensors: list[ShardTensor]) -> FileLayout:
    offsets = {}
    offset = len(header)
    for tensor in tensors:
        offsets[tensor.name] = offset
        offset += tensor.num_bytes
    return FileLayout(name, header, offset, offsets)


def _index(
    source: SourceModel, shards: Mapping[str, list[ShardTensor]], *, is_original: bool
) -> bytes:
    if is_original and INDEX_FILE in source.carried.files:
        return source.carried.files[INDEX_FILE]
    weight_map = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
    return make_index(weight_map, total).encode()


def _hf_files(
    source: SourceModel, request: ConversionRequest, arrays: Mapping[str, PlannedArray]
) -> dict[str, bytes]:
    """config.json and the tokenizer: those that were there if they still say the truth."""
    dtype = next(iter(arrays.values())).dtype
    files = dict(source.carried.tokenizer_files)
    if not files:
        files = _tokenizer_files(source)
    original = source.carried.files.get("config.json")
    generation = json.loads(files.get("generation_config.json", b"{}"))
    if original is not None and config_from_hf(json.loads(original), generation) == source.config:
        fields = json.loads(original)
        changed = {
            key: dtype
            for key in ("dtype", "torch_dtype")
            if request.dtype is not None and fields.get(key) not in (None, dtype)
        }
        files["config.json"] = (
            (json.dumps({**fields, **changed}, indent=2) + "\n").encode() if changed else original
        )
    else:
        fields = config_to_hf(source.config, dtype)
        files["config.json"] = (json.dumps(fields, indent=2) + "\n").encode()
    return files


def _tokenizer_files(source: SourceModel) -> dict[str, bytes]:
    tokenizer = source.load_tokenizer()
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        save_tokenizer(tokenizer, Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _gguf(source: SourceModel, request: ConversionRequest, updates: Updates) -> Migration:
    table = source.model.family.name_tables["gguf"](source.config)
    notes = _others_left_out(source)
    arrays = []
    kinds = []
    for wanted in file_arrays(source, table):
        array = planned(source, wanted, request.dtype, updates)
        kind = _gguf_type(array, request, notes)
        kinds.append(kind)
        arrays.append(replace(array, dtype=_dtype_of(kind)))
    if source.extras:
        notes.append(f"left out, GGUF has no place for them: {', '.join(source.extras)}")
    factors = rope_tensors(source.config)
    parts = ConstantParts(factors, source.parts) if factors else source.parts
    for name, values in factors.items():
        part = PlannedPart(name, (), values.shape)
        arrays.append(PlannedArray(name, values.shape, "float32", (part,)))
        kinds.append("F32")
    tokenizer = None if source.carried.gguf is not None else source.load_tokenizer()
    has_tokenizer = tokenizer is not None or "tokenizer.ggml.tokens" in (source.carried.gguf or {})
    if not has_tokenizer:
        notes.append("the source has no tokenizer: llama.cpp will not load the file")
    if source.config.family in WITHOUT_WINDOWS and source.config.sliding_window is not None:
        notes.append(f"llama.cpp ignores the sliding window of a {source.config.family} file")
    if source.config.family in WITHOUT_BIASES and source.config.attention_bias:
        notes.append(
            f"llama.cpp knows no biases of {source.config.family}'s projections: it will not load "
            "the file"
        )
    common = request.quantization or _most_common(arrays, kinds)
    metadata = gguf_metadata(
        source.config,
        common,
        name=source.model.name,
        tokenizer=tokenizer,
        carried=source.carried.gguf,
    )
    tensors = [
        GgufTensor(array.name, array.shape, GGMLQuantizationType[kind], array.num_bytes)
        for array, kind in zip(arrays, kinds, strict=True)
    ]
    header, offsets = make_gguf_header(metadata, tensors)
    end = offsets[-1] + -(-tensors[-1].num_bytes // 32) * 32
    name = "model.gguf"
    layout = FileLayout(
        name, header, end, {t.name: o for t, o in zip(tensors, offsets, strict=True)}
    )
    migration = _migration(source, request, arrays, (layout,), {}, notes)
    return replace(migration, source=parts, single_file=name)


def _gguf_type(array: PlannedArray, request: ConversionRequest, notes: list[str]) -> str:
    if len(array.shape) < 2 or any(part in array.name for part in KEPT_IN_F32):
        return "F32"  # As llama.cpp wants its norms and biases.
    kind = request.quantization or FLOAT_NAMES[array.dtype]
    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    if array.shape[-1] % block:
        notes.append(f"{array.name}: F16, its rows are no multiple of the {block} of {kind}")
        return "F16"
    return kind


def _dtype_of(kind: str) -> str:
    return {name: dtype for dtype, name in FLOAT_NAMES.items()}.get(kind, kind)


def _most_common(arrays: list[PlannedArray], kinds: list[str]) -> str:
    bytes_of = dict.fromkeys(WRITABLE, 0)
    for array, kind in zip(arrays, kinds, strict=True):
        bytes_of[kind] += array.num_bytes
    return max(bytes_of, key=lambda kind: bytes_of[kind])


def _orbax(source: SourceModel, request: ConversionRequest, updates: Updates) -> Migration:
    arrays = [
        planned(source, wanted, request.dtype, updates)
        for wanted in step_arrays(source, request.layers)
    ]
    arrays += [raw_array(source, extra_array(name), array) for name, array in source.extras.items()]
    carried = source.carried.to_folder()
    carried[MODEL_FILE] = model_json(source.config)
    if not any(name.startswith(f"{TOKENIZER}/") for name in carried):
        files = _tokenizer_files(source)
        carried |= {f"{TOKENIZER}/{name}": content for name, content in files.items()}
    form = StepTarget(STEP_OF_CONVERTED, {"converted_from": dict(source.record)}, {})
    return _migration(source, request, arrays, form, carried, _others_left_out(source))


def _others_left_out(source: SourceModel) -> list[str]:
    if not source.others:
        return []
    roots = ", ".join(sorted({name.split("/")[0] for name in source.others}))
    return [f"left out: {len(source.others)} arrays beside the parameters ({roots})"]


def _migration(
    source: SourceModel,
    request: ConversionRequest,
    arrays: list[PlannedArray],
    form: tuple[FileLayout, ...] | StepTarget,
    carried: Mapping[str, bytes],
    notes: list[str],
) -> Migration:
    settings: dict[str, Any] = {
        "to": request.to,
        "dtype": request.dtype,
        "quantization": request.quantization,
        "tool": jaxserve.__version__,
    }
    return Migration(
        plan=Plan(tuple(arrays), settings, tuple(notes), request.window_bytes),
        source=source.parts,
        source_id=source.identity,
        source_record=source.record,
        target=request.target,
        form=form,
        carried=carried,
        single_file=None,
        tool=f"jaxserve {jaxserve.__version__}",
    )
