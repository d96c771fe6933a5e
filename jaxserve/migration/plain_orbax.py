"""A checkpoint that Orbax wrote by itself, as a source: its config comes from elsewhere."""

from __future__ import annotations

from pathlib import Path

from checkpoint.formats.safetensors import INDEX_FILE
from checkpoint.store.plain_step import PlainStep, find_plain_step
from checkpoint.store_source import StoreSource
from jaxserve.errors import ConfigError
from jaxserve.migration.carried import Carried, files_to_carry, read_carried
from models.checkpoint_model import TOKENIZER, is_model_folder, read_model_config
from models.hf_config import config_from_hf
from models.json_file import read_json
from models.loading import ModelSource
from models.own_names import LAYERS, SCANNED, UNSCANNED
from models.tokenizer import Tokenizer


def is_plain_orbax(path: Path) -> bool:
    """Whether Orbax alone made the folder: it has no config of any kind."""
    if is_model_folder(path) or (path / "config.json").exists():
        return False
    return find_plain_step(path) is not None


def open_plain_orbax(path: Path, config: Path | None) -> tuple[ModelSource, Carried]:
    """Open it; nothing vouches for its values.

    Args:
        path: the folder that was saved to, with the parameters below `params`, called as in a
            model folder.
        config: a folder with the model's `config.json` or `model.json`, and its tokenizer.

    Returns:
        The model, and the files of `config` to carry along.

    Raises:
        ConfigError: no `config`.
        FormatError: the files cannot be understood.
    """
    if config is None:
        raise ConfigError(
            f"{path} is a checkpoint that Orbax wrote by itself: nothing in it says which model it "
            "is, and no digest vouches for its values. Use convert with --config FOLDER, which has "
            "the model's config.json (or model.json) and its tokenizer"
        )
    folder = find_plain_step(path)
    assert folder is not None
    tensors = StoreSource(PlainStep(folder))
    scanned = not any(name.startswith(f"{LAYERS}0.") for name in tensors.names())
    if is_model_folder(config):
        described, tokenizer, carried = read_model_config(config), config / TOKENIZER, None
    else:
        fields = read_json(config / "config.json")
        if fields is None:
            raise ConfigError(f"--config {config}: it holds no config.json and no model.json")
        described = config_from_hf(fields, read_json(config / "generation_config.json"))
        files = files_to_carry(config)
        files.pop(INDEX_FILE, None)  # Of the folder's own shards.
        tokenizer, carried = config, Carried(files)
    model = ModelSource(
        name=path.resolve().name,
        path=path,
        config=described,
        tensors=tensors,
        convention=SCANNED if scanned else UNSCANNED,
        read_tokenizer=lambda: Tokenizer.from_folder(tokenizer),
    )
    return model, carried or read_carried(config)
