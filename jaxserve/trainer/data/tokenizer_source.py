"""load_tokenizer: from a model's name, file or folder, or a folder with only a tokenizer."""

from __future__ import annotations

from pathlib import Path

from checkpoint.errors import FormatError
from jaxserve import model_store
from jaxserve.trainer.data.errors import DataError
from models.tokenizer import Tokenizer

_TOKENIZER_FILE = "tokenizer.json"


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer of a catalogued model (fetched at first use), a GGUF file, a folder with
    tokenizer.json, or one with a folder tokenizer/ in it: a prepared data set or a run.

    Raises DataError: nothing usable there. ConfigError, ModelStoreError: see model_store.
    """
    path = Path(model_store.resolve(name_or_path))
    try:
        if path.is_dir():
            inner = path / "tokenizer"
            folder = inner if (inner / _TOKENIZER_FILE).is_file() else path
            return Tokenizer.from_folder(folder)
        from models.loading import open_model  # imports jax, which folders do not need

        return open_model(path).load_tokenizer()
    except FormatError as error:
        raise DataError(f"--tokenizer {name_or_path}: {error}") from None
