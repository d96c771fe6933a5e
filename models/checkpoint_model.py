"""The model folder: what a training run and the migration tool write, and the engine reads.

    DIR/
        model.json      the config
        tokenizer/      as in a Hugging Face folder
        checkpoints/    checkpoint.store: arrays params/..., perhaps opt_state/..., ema/...
        source/         what a conversion kept of the files it came from

Parameters are called by their paths in the family's pytree, with the layers stacked
(`params/layers/mlp/up_proj/kernel`) or one by one (`params/layers/0/mlp/up_proj/kernel`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.errors import FormatError
from checkpoint.store import OpenStep, StoreReader
from checkpoint.store.durable import fsync_path
from checkpoint.store_source import StoreSource
from models.config import ModelConfig
from models.config_json import config_from_json, config_to_json
from models.own_names import LAYERS, SCANNED, UNSCANNED
from models.tokenizer import Tokenizer
from models.tokenizer_files import save_tokenizer

FORMAT = "jaxserve-model-1"
MODEL_FILE = "model.json"
TOKENIZER = "tokenizer"
CHECKPOINTS = "checkpoints"
SOURCE = "source"
MAX_JSON_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class StoredModel:
    """A model folder whose checkpoint is open and whose arrays are not read yet."""

    folder: Path
    config: ModelConfig
    step: OpenStep
    tensors: StoreSource
    convention: str
    """`SCANNED` or `UNSCANNED`, see models.own_names."""

    def load_tokenizer(self) -> Tokenizer:
        """Raises FormatError when the folder has none."""
        return Tokenizer.from_folder(self.folder / TOKENIZER)


def is_model_folder(path: Path) -> bool:
    """Whether `path` says that it is one of ours."""
    return (path / MODEL_FILE).is_file()


def write_model_folder(folder: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Make `folder` a model folder; its checkpoints come from `Store(folder / CHECKPOINTS)`.

    Done anew with the same config it changes nothing. `model.json` comes last: once it is
    there the tokenizer is, too.

    Args:
        folder: made if it is not there; may hold other files, such as those of a run.
        config: of the model.
        tokenizer: without one the model can be trained and converted, not served.

    Raises:
        FormatError: the folder holds a model of another config.
        TokenizerError: the tokenizer cannot be stored as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_model_folder(folder):
        there = read_model_config(folder)
        if there != config:
            differing = sorted(
                name
                for name, value in config_to_json(config).items()
                if config_to_json(there)[name] != value
            )
            raise FormatError(
                f"{folder} holds a model of another config ({', '.join(differing)} differ); "
                "give another folder, or the config that it was made with"
            )
        return
    if tokenizer is not None and not (folder / TOKENIZER).exists():
        staged = folder / f".{TOKENIZER}-{secrets.token_hex(4)}"
        staged.mkdir()
        try:
            save_tokenizer(tokenizer, staged)
            for path in (*staged.iterdir(), staged):
                fsync_path(path)
            staged.rename(folder / TOKENIZER)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    write_model_json(folder, config)


def write_model_json(folder: Path, config: ModelConfig) -> None:
    """Write `model.json`, whole or not at all, over the one that may be there."""
    staged = folder / f".{MODEL_FILE}-{secrets.token_hex(4)}"
    staged.write_bytes(model_json(config))
    fsync_path(staged)
    staged.replace(folder / MODEL_FILE)
    fsync_path(folder)


def model_json(config: ModelConfig) -> bytes:
    """The content of `model.json`."""
    fields = {"format": FORMAT, "config": config_to_json(config)}
    return (json.dumps(fields, indent=2) + "\n").encode()


def read_model_config(folder: Path) -> ModelConfig:
    """The config in `model.json`.

    Raises:
        FormatError: it is not what `write_model_json` writes; the message says why.
    """
    path = folder / MODEL_FILE
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("config"), dict):
        raise FormatError(f"{path} must hold an object with format and config")
    if fields.get("format") != FORMAT:
        raise FormatError(
            f"{path} has the format {fields.get('format')!r}, and this version reads {FORMAT!r}: "
            "use the version that wrote it, or a newer one"
        )
    return config_from_json(fields["config"])


def open_stored_model(folder: str | os.PathLike[str], step: int | None = None) -> StoredModel:
    """Open a model folder at one of its checkpoints.

    Args:
        folder: with `model.json` and `checkpoints/`.
        step: by default the newest whose files are what was saved.

    Raises:
        FormatError: not a model folder, or its checkpoint holds no parameters.
        StoreError: no checkpoint, not this one, or a damaged one.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    opened = StoreReader(folder / CHECKPOINTS).open_step(step)
    try:
        tensors = StoreSource(opened)
        scanned = not any(name.startswith(f"{LAYERS}0.") for name in tensors.names())
        return StoredModel(folder, config, opened, tensors, SCANNED if scanned else UNSCANNED)
    except BaseException:
        opened.close()
        raise
