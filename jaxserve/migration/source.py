"""SourceModel: a model in any format, opened for migration; no weights are read yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.formats.gguf import GgufFile
from checkpoint.formats.safetensors import SafetensorsFolder
from checkpoint.migrate.manifest import file_problems, load_manifest
from checkpoint.migrate.parts import FileParts, PartSource, StepParts
from checkpoint.name_table import NameTable, TensorRule, Transform
from checkpoint.param_loading import flatten
from checkpoint.store.plain_step import PlainStep
from checkpoint.store_source import StoreSource
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.migration.carried import Carried, files_to_carry, read_carried
from jaxserve.migration.plain_orbax import is_plain_orbax, open_plain_orbax
from jaxserve.trained_model import open_model
from models.config import ModelConfig
from models.loading import ModelSource
from models.model_path import split_step
from models.tokenizer import Tokenizer

MAX_LAYERS = 4096
"""More is a lie of the file's."""
EXTRA = "extra/"
FORMATS = {
    "hf": "safetensors",
    "hf_base": "safetensors",
    "gguf": "gguf",
    "own": "orbax",
    "own_unscanned": "orbax",
}


class DamagedSource(JaxserveError):
    """A source whose files are not those that its manifest describes."""


PieceKey: TypeAlias = tuple[str, tuple[int, ...]]
"""A leaf's dotted path, and which layer, or layer and expert."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One leaf of the parameters, or one layer of it, or one expert of a layer, in the source."""

    array: str
    """Name for the PartSource."""
    index: tuple[int, ...]
    """On the array's first axes, where those are layers or experts."""
    transform: Transform


@dataclass(frozen=True)
class SourceModel:
    """See the module."""

    model: ModelSource
    parts: PartSource
    leaf_shapes: Mapping[str, tuple[int, ...]]
    """Shape of every leaf, by its dotted path."""
    pieces: Mapping[PieceKey, Piece]
    stacked_axes: Mapping[str, int]
    """How many first axes of a leaf, by its path, count layers and experts."""
    extras: Mapping[str, str]
    """Tensors that belong to no leaf, e.g. buffers: file's name to array's name."""
    others: tuple[str, ...]
    """Arrays of a stored step beside parameters and extras, e.g. the optimizer's."""
    carried: Carried
    identity: Mapping[str, Any]
    """Sizes and times of the files; JSON values."""
    record: Mapping[str, Any]
    """What a manifest says of this source."""

    @property
    def format(self) -> str:
        """ "safetensors", "gguf" or "orbax"."""
        return FORMATS[self.model.convention]

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    def load_tokenizer(self) -> Tokenizer | None:
        """None if the source has none."""
        if self.format != "gguf" and "tokenizer.json" not in self.carried.files:
            return None
        gguf = self.model.tensors
        if isinstance(gguf, GgufFile) and "tokenizer.ggml.tokens" not in gguf.metadata:
            return None
        return self.model.load_tokenizer()

    def close(self) -> None:
        """Lets go of files."""
        self.parts.close()


class ConstantParts:
    """A PartSource with arrays of its own before those of another."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], rest: PartSource) -> None:
        self._arrays = arrays
        self._rest = rest

    def shape(self, name: str) -> tuple[int, ...]:
        """See PartSource."""
        return self._arrays[name].shape if name in self._arrays else self._rest.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """See PartSource."""
        return self._arrays[name].dtype if name in self._arrays else self._rest.dtype(name)

    def stored_dtype(self, name: str) -> str:
        """See PartSource."""
        if name in self._arrays:
            return self._arrays[name].dtype.name
        return self._rest.stored_dtype(name)

    def rows_at_once(self, name: str, axis: int) -> int:
        """See PartSource."""
        if name in self._arrays:
            return int(self._arrays[name].shape[axis])
        return self._rest.rows_at_once(name, axis)

    @property
    def can_cut(self) -> bool:
        """See PartSource."""
        return self._rest.can_cut

    def extra_bytes(self, name: str) -> int:
        """See PartSource."""
        return 0 if name in self._arrays else self._rest.extra_bytes(name)

    def read_part(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """See PartSource."""
        if name in self._arrays:
            return self._arrays[name][index]
        return self._rest.read_part(name, index)

    def read_into(self, name: str, index: tuple[slice, ...], out: npt.NDArray[Any]) -> None:
        """See PartSource."""
        if name in self._arrays:
            out[...] = self._arrays[name][index]
        else:
            self._rest.read_into(name, index, out)

    def close(self) -> None:
        """See PartSource."""
        self._rest.close()


def open_source(
    path: Path, *, config: Path | None = None, check_manifest: bool = True
) -> SourceModel:
    """Open a model for migration.

    Args:
        path: as for `jaxserve.trained_model.open_model`, or a checkpoint of Orbax alone.
        config: see `open_plain_orbax`.
        check_manifest: compare all files with the manifest, if the source has one.

    Raises:
        FormatError, StoreError, FileNotFoundError: as `open_model`.
        DamagedSource: a file is not what the manifest says.
        ConfigError: a `config` that is missing, or not needed.
    """
    folder, _ = split_step(path)
    manifest = load_manifest(folder)
    if manifest is not None and check_manifest:
        problems = file_problems(folder, manifest)
        if problems:
            raise DamagedSource(
                f"{folder} is damaged:\n  " + "\n  ".join(problems) + "\nFetch or make it anew"
            )
    if is_plain_orbax(folder):
        model, carried = open_plain_orbax(folder, config)
    elif config is not None:
        raise ConfigError(f"--config is for checkpoints of Orbax alone; {folder} has its own")
    else:
        model = open_model(path)
        carried = _carried(model)
    if model.config.num_layers > MAX_LAYERS:
        raise FormatError(f"{path} claims {model.config.num_layers} layers; at most {MAX_LAYERS}")
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in flatten(model.family.abstract_params(model.config, "float32")).items()
    }
    parts, array_name, others = _parts(model)
    stacked_axes = _stacked_axes(model)
    pieces = dict(_pieces(model.name_table, shapes, stacked_axes, array_name))
    return SourceModel(
        model=model,
        parts=parts,
        leaf_shapes=shapes,
        pieces=pieces,
        stacked_axes=stacked_axes,
        extras=_extras(model, pieces, array_name),
        others=tuple(name for name in others if not name.startswith(EXTRA)),
        carried=carried,
        identity=_identity(model),
        record={
            "path": str(model.path.absolute()),
            "format": FORMATS[model.convention],
            "manifest_sha256": None if manifest is None else manifest.sha256,
        }
        | ({} if model.lora is None else {"adapters": f"{folder.absolute()}@{model.step}"}),
    )


def _parts(model: ModelSource) -> tuple[PartSource, Callable[[str], str], tuple[str, ...]]:
    """The arrays, how a tensor's name becomes an array's, and what else a step holds."""
    tensors = model.tensors
    if isinstance(tensors, StoreSource):
        step = tensors.step
        mine = {tensors.array_name(name) for name in tensors.names()}
        others = tuple(name for name in step.arrays if name not in mine)
        return StepParts(step), tensors.array_name, others
    assert isinstance(tensors, GgufFile | SafetensorsFolder)
    return FileParts(tensors.location), lambda name: name, ()


def _stacked_axes(model: ModelSource) -> dict[str, int]:
    """Hugging Face folders divide most finely: a tensor for each layer, or for each expert."""
    rules = model.family.name_tables["hf"](model.config).rules
    return {rule.path: rule.num_stacked_axes for rule in rules}


def _pieces(
    table: NameTable,
    leaf_shapes: Mapping[str, tuple[int, ...]],
    stacked_axes: Mapping[str, int],
    array_name: Callable[[str], str],
) -> Iterator[tuple[PieceKey, Piece]]:
    for rule in table.rules:
        shape, num_axes = leaf_shapes[rule.path], stacked_axes[rule.path]
        transform = transform_of_one(rule, num_axes)
        for name, place in rule.parts(shape):
            try:
                array = array_name(name)
            except KeyError:
                array = name  # Missing: the check of the plan says so.
            for rest in np.ndindex(*shape[len(place) : num_axes]):
                yield (rule.path, (*place, *rest)), Piece(array, rest, transform)


def transform_of_one(rule: TensorRule, num_stacked_axes: int) -> Transform:
    """A rule's transform, of one layer or expert alone where its tensor holds many."""
    transform = rule.transform
    for _ in range(num_stacked_axes - max(1, rule.num_stacked_axes)):
        transform = transform.of_one or transform
    return transform


def _extras(
    model: ModelSource,
    pieces: Mapping[PieceKey, Piece],
    array_name: Callable[[str], str],
) -> dict[str, str]:
    tensors = model.tensors
    if isinstance(tensors, StoreSource):
        return {extra_tensor(name): name for name in tensors.step.arrays if name.startswith(EXTRA)}
    if isinstance(tensors, GgufFile):
        return {}  # What no parameter needs is said by the config.
    used = {piece.array for piece in pieces.values()}
    table = model.name_table  # Once: the model makes it anew each time.
    return {
        name: array_name(name)
        for name in tensors.names()
        if name not in used and name not in table.copies and table.is_ignored(name)
    }


def extra_array(tensor: str) -> str:
    """The array of a step that keeps a tensor of a file that is no parameter."""
    return f"{EXTRA}{tensor.replace('%', '%25').replace('/', '%2F').replace('.', '%2E')}"


def extra_tensor(array: str) -> str:
    """The inverse of `extra_array`."""
    name = array.removeprefix(EXTRA)
    return name.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


def _carried(model: ModelSource) -> Carried:
    tensors = model.tensors
    if isinstance(tensors, SafetensorsFolder):
        files = files_to_carry(model.path)
        return Carried(files, {file.path.name: file.header for file in tensors.files}, None)
    if isinstance(tensors, GgufFile):
        return Carried({}, {}, tensors.metadata)
    return read_carried(model.path)


def _identity(model: ModelSource) -> dict[str, Any]:
    if isinstance(model.tensors, StoreSource) and not isinstance(model.tensors.step, PlainStep):
        step = model.tensors.step
        return {"step": step.step, "folder": str(step.folder), "arrays": step.digest}
    if isinstance(model.tensors, GgufFile):
        paths = [model.path]
    else:
        is_step = isinstance(model.tensors, StoreSource)
        found = model.path.rglob("*") if is_step else model.path.iterdir()
        paths = [path for path in sorted(found) if path.is_file()]
    return {
        str(path.absolute()): [path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino]
        for path in paths
    }
