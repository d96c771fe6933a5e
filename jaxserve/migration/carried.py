"""What a conversion keeps of the files that a model came from, so that it can give them back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.errors import FormatError
from checkpoint.formats.safetensors import INDEX_FILE, inside_folder
from models.checkpoint_model import SOURCE, TOKENIZER
from models.tokenizer_files import TOKENIZER_FILES

GGUF_FILE = "gguf.json"
HEADERS = "headers"
MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Carried:
    """Files and headers by name, byte for byte; and a GGUF file's metadata.

    Attributes:
        files: e.g. config.json, tokenizer.json, the index of the shards.
        headers: the JSON header of each safetensors file, in its order.
        gguf: metadata as `GgufFile` gives it; None if the model came from no GGUF file.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    headers: Mapping[str, bytes] = field(default_factory=dict)
    gguf: Mapping[str, Any] | None = None

    @property
    def tokenizer_files(self) -> dict[str, bytes]:
        """Those of `files` that belong to the tokenizer."""
        return {name: self.files[name] for name in TOKENIZER_FILES if name in self.files}

    def to_folder(self) -> dict[str, bytes]:
        """As files of a model folder, by relative path; what a Tokenizer reads is in its place."""
        out: dict[str, bytes] = {}
        for name, content in self.files.items():
            out[f"{TOKENIZER if name in TOKENIZER_FILES else SOURCE}/{name}"] = content
        for name, content in self.headers.items():
            out[f"{SOURCE}/{HEADERS}/{name}"] = content
        if self.gguf is not None:
            values = {key: _to_json(value) for key, value in self.gguf.items()}
            out[f"{SOURCE}/{GGUF_FILE}"] = json.dumps(values).encode()
        return out


def files_to_carry(folder: Path) -> dict[str, bytes]:
    """Config, tokenizer and index of a Hugging Face folder, by name. Raises FormatError."""
    return {
        name: inside_folder(folder, name).read_bytes()
        for name in (*TOKENIZER_FILES, "config.json", INDEX_FILE)
        if (folder / name).exists()
    }


def read_carried(folder: Path) -> Carried:
    """What `Carried.to_folder` left in a model folder. Raises FormatError if it is damaged."""
    files = {path.name: _read(path) for path in _plain_files(folder / SOURCE)}
    gguf = files.pop(GGUF_FILE, None)
    files |= {path.name: _read(path) for path in _plain_files(folder / TOKENIZER)}
    headers = {path.name: _read(path) for path in _plain_files(folder / SOURCE / HEADERS)}
    if gguf is None:
        return Carried(files, headers)
    try:
        values = {key: _from_json(value) for key, value in json.loads(gguf).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{folder / SOURCE / GGUF_FILE} is damaged: {error!r}") from error
    return Carried(files, headers, values)


def _plain_files(folder: Path) -> Iterator[Path]:
    if folder.is_dir() and not folder.is_symlink():
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.is_symlink():
                yield path


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise FormatError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    return path.read_bytes()


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.name, "values": value.tolist()}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return np.array(value["values"], np.dtype(value["dtype"]))
    return value
