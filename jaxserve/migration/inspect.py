"""Inspect and list: what is in a model on disk, without reading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint.migrate.manifest import load_manifest
from checkpoint.store import StoreError, StoreReader
from checkpoint.store_source import StoreSource
from jaxserve.errors import ConfigError
from jaxserve.migration.source import FORMATS
from models.checkpoint_model import CHECKPOINTS
from models.config_json import config_to_json
from models.loading import open_model
from models.model_path import split_step


def inspect_model(path: Path) -> dict[str, Any]:
    """Config, arrays and origin as JSON values.

    Raises:
        FormatError, StoreError, FileNotFoundError: it cannot be opened.
    """
    model = open_model(path)
    manifest = load_manifest(model.path)
    tensors = model.tensors
    report: dict[str, Any] = {
        "format": FORMATS[model.convention],
        "layers": {"own": "scanned", "own_unscanned": "unscanned"}.get(model.convention),
        "config": config_to_json(model.config),
    }
    if isinstance(tensors, StoreSource):
        step = tensors.step
        report |= {"step": step.step, "metadata": dict(step.metadata)}
        arrays = [(name, record.dtype, record.shape) for name, record in step.arrays.items()]
    else:
        arrays = [
            (name, tensors.info(name).dtype, tensors.info(name).shape) for name in tensors.names()
        ]
    report["made_by"] = None if manifest is None else manifest.tool
    report["made_from"] = None if manifest is None else dict(manifest.source)
    report["arrays"] = [
        {"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in arrays
    ]
    return report


def list_steps(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints of a model folder, or of a store, oldest first, as JSON values.

    Raises:
        ConfigError: a step is named, where all are listed.
        StoreError: the folder has no checkpoints.
    """
    folder, step = split_step(folder)
    if step is not None:
        raise ConfigError(f"list shows all checkpoints of {folder}: leave @{step} away")
    root = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    reader = StoreReader(root)
    return [_describe(reader, folder, number) for number in reader.steps()]


def _describe(reader: StoreReader, folder: Path, step: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": step, "name": f"{folder}@{step}"}
    try:
        with reader.open_step(step, check_files=False) as opened:
            size = sum(p.stat().st_size for p in opened.folder.rglob("*") if p.is_file())
            return {
                **entry,
                "state": "committed",
                "num_bytes": size,
                "num_arrays": len(opened.arrays),
                "metadata": dict(opened.metadata),
            }
    except StoreError as error:
        return {
            **entry,
            "state": f"damaged: {error}",
            "num_bytes": None,
            "num_arrays": None,
            "metadata": {},
        }
