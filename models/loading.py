"""open_model: a GGUF file, a Hugging Face folder or one of our own, ready to load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike

from checkpoint.errors import FormatError
from checkpoint.formats.gguf import GgufFile
from checkpoint.formats.safetensors import SafetensorsFolder
from checkpoint.name_table import NameTable
from checkpoint.param_loading import (
    Place,
    Progress,
    flatten,
    load_params,
    put_on_device,
    unflatten,
)
from checkpoint.tensor_source import TensorSource
from models.checkpoint_model import is_model_folder, open_stored_model
from models.config import ModelConfig
from models.decoder import Params
from models.gguf_model import ROPE_TENSORS, config_from_gguf
from models.gguf_tokenizer import tokenizer_from_gguf
from models.hf_config import config_from_hf
from models.json_file import read_json
from models.lora import Lora, merge
from models.model_path import split_step
from models.own_names import SCANNED, UNSCANNED, own_name_table
from models.registry import ModelFamily, get_family
from models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelSource:
    """A model on disk whose config is known and whose weights are not read yet."""

    name: str
    """Short name for people: the folder's name, or the file's without its ending."""
    path: Path
    config: ModelConfig
    tensors: TensorSource
    convention: str
    """Key of the family's `name_tables`, "hf" or "gguf", or one of models.own_names."""
    read_tokenizer: Callable[[], Tokenizer]
    step: int | None = None
    """The checkpoint's number; None for a model that is not one of ours."""
    lora: Lora | None = None
    """Adapters that `load_params` adds to the weights in `tensors`."""

    @property
    def family(self) -> ModelFamily:
        """The family that runs this model."""
        return get_family(self.config.family)

    @property
    def name_table(self) -> NameTable:
        """Which tensor of the file is which parameter."""
        if self.convention in (SCANNED, UNSCANNED):
            return own_name_table(self.config, self.convention)
        return self.family.name_tables[self.convention](self.config)

    def load_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises FormatError if it is missing or not supported."""
        return self.read_tokenizer()

    def load_params(
        self,
        dtype: DTypeLike,
        progress: Progress | None = None,
        place: Place = put_on_device,
    ) -> Params:
        """All parameters in `dtype`, as the family's pytree.

        Args:
            dtype: of every leaf, e.g. `jnp.float32`.
            progress: called as `progress(done_bytes, total_bytes)`, from this thread.
            place: puts a leaf on the device or mesh, see `checkpoint.param_loading.Place`.

        Raises:
            FormatError: the tensors do not fit the config; the message lists them.
        """
        abstract = self.family.abstract_params(self.config, dtype)
        if self.lora is not None:
            return self._load_merged(self.lora, abstract, progress, place)
        return load_params(self.tensors, self.name_table, abstract, place=place, progress=progress)

    def _load_merged(
        self,
        lora: Lora,
        abstract: Params,
        progress: Progress | None,
        place: Place,
    ) -> Params:
        """Float32 sums, rounded once. The host holds all weights until they are placed."""
        wanted = flatten(abstract)
        read = dict(wanted)
        for name in flatten(lora.adapters):
            path = f"{name.rpartition('.')[0]}.kernel"
            read[path] = jax.ShapeDtypeStruct(wanted[path].shape, jnp.float32)
        base = load_params(
            self.tensors, self.name_table, unflatten(read), place=keep_on_host, progress=progress
        )
        leaves = flatten(merge(base, lora))
        return unflatten(
            {
                path: place(path, np.asarray(leaf).astype(wanted[path].dtype, copy=False))
                for path, leaf in leaves.items()
            }
        )


def open_model(path: str | Path) -> ModelSource:
    """Read a model's config and tensor headers, not its weights.

    Args:
        path: a `.gguf` file, a folder with `config.json` and safetensors files, or one with
            `model.json` and checkpoints, such as a training run. `DIR@STEP` names a
            checkpoint; else the newest one that is whole is taken.

    Raises:
        FormatError: not a model, or one that is not supported; the message says why.
        StoreError: the folder's checkpoints are missing or damaged.
        FileNotFoundError: nothing is there.
    """
    path, step = split_step(path)
    if path.is_dir():
        if is_model_folder(path):
            return _open_own(path, step)
        if step is not None:
            raise FormatError(f"{path} holds no model.json, so it has no step {step} to choose")
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}; give a GGUF file or a model's folder")
    if path.suffix.lower() != ".gguf":
        raise FormatError(
            f"{path.name} is not a model: give a .gguf file, or the folder that holds "
            "config.json and *.safetensors"
        )
    return _open_gguf(path)


def _open_gguf(path: Path) -> ModelSource:
    file = GgufFile(path)
    names = file.names()
    rope_tensors = {
        name: file.read(name).ravel().tolist() for name in ROPE_TENSORS if name in names
    }
    return ModelSource(
        name=path.stem,
        path=path,
        config=config_from_gguf(file.metadata, names, rope_tensors),
        tensors=file,
        convention="gguf",
        read_tokenizer=lambda: tokenizer_from_gguf(file.metadata),
    )


def _open_own(path: Path, step: int | None) -> ModelSource:
    stored = open_stored_model(path, step)
    return ModelSource(
        name=path.resolve().name,
        path=path,
        config=stored.config,
        tensors=stored.tensors,
        convention=stored.convention,
        read_tokenizer=stored.load_tokenizer,
        step=stored.step.step,
    )


def keep_on_host(path: str, host: npt.NDArray[Any]) -> Any:
    """For `place` of `ModelSource.load_params`: weights stay NumPy arrays."""
    del path
    return host


def _open_folder(path: Path) -> ModelSource:
    fields = read_json(path / "config.json")
    if fields is None:
        raise FormatError(
            f"{path} holds no config.json and no model.json, so it is not a model's folder"
        )
    config = config_from_hf(fields, read_json(path / "generation_config.json"))
    tensors = SafetensorsFolder(path)
    return ModelSource(
        name=path.resolve().name,
        path=path,
        config=config,
        tensors=tensors,
        convention=_hf_convention(config, tensors),
        read_tokenizer=lambda: Tokenizer.from_folder(path),
    )


def _hf_convention(config: ModelConfig, tensors: TensorSource) -> str:
    """Which table fits: "hf_base" for a family that has it, if no name is one of "hf"."""
    tables = get_family(config.family).name_tables
    if "hf_base" not in tables:
        return "hf"
    names = {name for rule in tables["hf"](config).rules for name, _ in rule.parts((1,))}
    return "hf" if names & set(tensors.names()) else "hf_base"
