"""Makes a run's folder a model folder, so that its checkpoints can be served and converted."""

from __future__ import annotations

from pathlib import Path

from jaxserve import model_store
from jaxserve.trained_model import holds_adapters
from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.errors import TrainConfigError
from jaxserve.trainer.run_folder import RunFolder
from models.checkpoint_model import write_model_folder
from models.loading import open_model
from models.tokenizer import Tokenizer


def write_run_model(config: TrainConfig, folder: RunFolder) -> None:
    """Writes `model.json` and `tokenizer/` beside the checkpoints; anew it changes nothing.

    Raises:
        FormatError: the model that training starts from cannot be read, or the folder holds
            another one.
        TrainConfigError: training starts from a run of adapters.
        TokenizerError: the tokenizer cannot be kept.
    """
    if config.model.source is not None:
        source = open_model(model_store.resolve(config.model.source))
        if holds_adapters(source):
            raise TrainConfigError(
                f"model.source is {config.model.source}, a run whose checkpoints hold adapters "
                "alone: merge them with `jaxserve checkpoint convert --to safetensors` and train "
                "from the result"
            )
        write_model_folder(folder.root, source.config, source.load_tokenizer())
        return
    assert config.model.shape is not None
    tokenizer = Path(config.data.path) / "tokenizer"
    write_model_folder(
        folder.root,
        config.model.shape,
        Tokenizer.from_folder(tokenizer) if tokenizer.is_dir() else None,
    )
