"""Makes a run's folder a model folder, so that its checkpoints can be served and converted."""

from __future__ import annotations

from pathlib import Path

from jaxserve import model_store
from jaxserve.trained_model import holds_adapters
from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.errors import TrainConfigError
from jaxserve.trainer.run_folder import RunFolder
from jaxserve.xc.config import XcSection
from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.encoders import spec_of
from jaxserve.xc.model_folder import digest_of, open_xc_model, write_xc_model
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
    if config.xc is not None:
        _write_classifier(config.xc, XcDataset(config.data.path), folder.root)
        return
    if config.language_model.source is not None:
        source = open_model(model_store.resolve(config.language_model.source))
        if holds_adapters(source):
            raise TrainConfigError(
                f"model.source is {config.language_model.source}, a run whose checkpoints hold "
                "adapters alone: merge them with `jaxserve checkpoint convert --to safetensors` "
                "and train from the result"
            )
        write_model_folder(folder.root, source.config, source.load_tokenizer())
        return
    assert config.language_model.shape is not None
    tokenizer = Path(config.data.path) / "tokenizer"
    write_model_folder(
        folder.root,
        config.language_model.shape,
        Tokenizer.from_folder(tokenizer) if tokenizer.is_dir() else None,
    )


def _write_classifier(xc: XcSection, dataset: XcDataset, folder: Path) -> None:
    if xc.encoder_run is None:
        write_xc_model(folder, xc.stage, spec_of(xc.encoder, dataset), dataset, None, None)
        return
    model = open_xc_model(xc.encoder_run)
    digest = digest_of(model.read_encoder())
    write_xc_model(folder, xc.stage, model.encoder, dataset, model.folder.absolute(), digest)
