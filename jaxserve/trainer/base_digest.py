"""Which model adapters are trained on, as a digest of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from checkpoint.store_source import StoreSource
from models.checkpoint_model import MODEL_FILE
from models.loading import ModelSource

_BLOCK_BYTES = 1 << 20


def base_digest(model: ModelSource) -> str:
    """SHA-256 of a model's files, by name.

    Of a folder with checkpoints, such as a training run, the config and the opened checkpoint
    count alone: what the run does next does not make it another model.
    """
    tensors = model.tensors
    if isinstance(tensors, StoreSource):
        files = [model.path / MODEL_FILE, *_files_in(tensors.step.folder)]
    else:
        files = _files_in(model.path) if model.path.is_dir() else [model.path]
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as data:
            while block := data.read(_BLOCK_BYTES):
                hashed.update(block)
    return hashed.hexdigest()


def _files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
