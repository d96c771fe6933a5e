"""Weights laid out for the native kernels, kept in files between starts.

Laying them out takes seconds of a start that else takes few. A file lies beside the compiled
programs, in a folder that only its owner enters; its name is a digest of all that its bytes follow
from: the model's files, the kinds of its kernels, and the code that reads and packs them. What it
holds is mapped into memory, so that processes share it and rows that nobody reads are not loaded.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import blake3
import jax
import numpy as np
import numpy.typing as npt
import xxhash

import checkpoint
import models
from checkpoint.formats.gguf import GgufFile
from checkpoint.formats.safetensors import SafetensorsFolder
from checkpoint.param_loading import Place
from jaxserve.engine.native_settings import NativeSettings
from jaxserve.engine.served_params import load_served_params, make_place
from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.step import Params
from models.loading import ModelSource, keep_on_host

MAX_FILES = 4
"""Those used last; older ones are removed when another one is written."""
_MAGIC = b"jaxserve kept weights 1\n"
_ALIGNMENT = 4096
_PIECE_BYTES = 1 << 20

_log = logging.getLogger(__name__)


def load_kept_params(source: ModelSource, settings: EngineSettings) -> Params:
    """As `load_served_params`, from a kept file if there is one; else one is written.

    Only the layout of the native kernels is kept, of models in GGUF or safetensors files. A file
    that is damaged is written anew; if there is no room for one, a warning says so.
    """
    files = _model_files(source)
    if settings.native is None or files is None:
        return load_served_params(source, settings)
    place = make_place(settings)
    name = _digest(files, settings, settings.native)
    path = settings.cache_dir / "weights" / f"{name}.packed"
    abstract = settings.abstract_params()
    found = read_kept(path, abstract)
    if found is None:
        found = load_served_params(source, settings, keep_on_host)
        try:
            write_kept(path, found)
        except OSError as error:
            _log.warning("weights are not kept for the next start: %s", error)
        else:
            # From here on as at the next start; what is in memory twice goes.
            found = read_kept(path, abstract) or found
    return _placed(found, place)


def read_kept(path: Path, abstract: Params) -> Params | None:
    """What the file holds, as read-only views of it; None if there is none or it is damaged.

    Args:
        path: of the file.
        abstract: the parameters as `jax.ShapeDtypeStruct`.
    """
    try:
        with path.open("rb") as file:
            entries = _read_entries(file)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for entry in entries.values():
                _check(file, entry)
        os.utime(path)

        def view(key_path: Any, leaf: jax.ShapeDtypeStruct) -> npt.NDArray[Any]:
            offset = entries[jax.tree_util.keystr(key_path)]["offset"]
            return np.frombuffer(mapped, leaf.dtype, leaf.size, offset).reshape(leaf.shape)

        found: Params = jax.tree.map_with_path(view, abstract)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        _log.warning("%s is not used, and written anew: %s", path, error)
        return None
    return found


def write_kept(path: Path, params: Params) -> None:
    """Writes host parameters; the file is there whole or not at all. Raises OSError."""
    leaves = {
        jax.tree_util.keystr(key_path): np.ascontiguousarray(leaf)
        for key_path, leaf in jax.tree.leaves_with_path(params)
    }
    path.parent.mkdir(mode=0o700, exist_ok=True)
    _check_room(path.parent, sum(leaf.nbytes for leaf in leaves.values()))
    entries, offset = {}, _ALIGNMENT * -(-_header_bytes(leaves) // _ALIGNMENT)
    for name, leaf in leaves.items():
        digest = xxhash.xxh3_64_intdigest(_bytes(leaf))
        entries[name] = {"offset": offset, "num_bytes": leaf.nbytes, "xxh3": digest}
        offset += _ALIGNMENT * -(-leaf.nbytes // _ALIGNMENT)
    staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with staged.open("xb") as file:
            file.write(_MAGIC + json.dumps(entries).encode() + b"\n")
            for name, leaf in leaves.items():
                file.seek(entries[name]["offset"])
                file.write(_bytes(leaf))
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    _remove_old(path.parent)


def _placed(params: Params, place: Place) -> Params:
    return jax.tree.map_with_path(
        lambda key_path, leaf: place(jax.tree_util.keystr(key_path), leaf), params
    )


def _model_files(source: ModelSource) -> Sequence[Path] | None:
    """All that its weights come from; None if that is not a few files that stay as they are."""
    if source.lora is not None:
        return None
    if isinstance(source.tensors, GgufFile):
        return (source.tensors.path,)
    if isinstance(source.tensors, SafetensorsFolder):
        return [file.path for file in source.tensors.files]
    return None


def _digest(files: Sequence[Path], settings: EngineSettings, native: NativeSettings) -> str:
    digest = blake3.blake3()
    kinds = (native.float_kind, native.is_int8, native.file_kinds)
    digest.update(repr((settings.model_config, settings.dtype.name, kinds)).encode())
    for path in (*_code_files(), *files):
        digest.update(blake3.blake3().update_mmap(path).digest())
    return digest.hexdigest()


def _code_files() -> Iterator[Path]:
    """The modules that read and lay out weights: whatever changes there may change their bytes."""
    for package in (checkpoint, models):
        yield from sorted(Path(package.__path__[0]).rglob("*.py"))


def _read_entries(file: IO[bytes]) -> dict[str, dict[str, int]]:
    """Leaf -> `offset`, `num_bytes`, `xxh3`."""
    if file.readline() != _MAGIC:
        raise ValueError("it does not begin as such a file does")
    entries: dict[str, dict[str, int]] = json.loads(file.readline())
    return entries


def _check(file: IO[bytes], entry: dict[str, int]) -> None:
    """Reads past the mapping, so that what only the check needs does not stay in memory."""
    file.seek(entry["offset"])
    digest, rest = xxhash.xxh3_64(), entry["num_bytes"]
    while rest and (piece := file.read(min(rest, _PIECE_BYTES))):
        digest.update(piece)
        rest -= len(piece)
    if rest or digest.intdigest() != entry["xxh3"]:
        raise ValueError("its bytes are not those that were written")


def _check_room(folder: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < 2 * num_bytes:
        raise OSError(
            f"{num_bytes / 1e6:.0f} MB in {folder} would leave little of the {free_bytes / 1e6:.0f}"
            " MB that are free"
        )


def _header_bytes(leaves: dict[str, npt.NDArray[Any]]) -> int:
    """More than the header takes, whatever its numbers are."""
    return len(_MAGIC) + sum(len(json.dumps(name)) + 120 for name in leaves) + 16


def _bytes(leaf: npt.NDArray[Any]) -> memoryview:
    return leaf.reshape(-1).view(np.uint8).data


def _remove_old(folder: Path) -> None:
    files = sorted(folder.glob("*.packed"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[MAX_FILES:]:
        path.unlink(missing_ok=True)
