"""open_model: any model, a training run of adapters with them added to the model they belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten, unflatten
from checkpoint.store_source import StoreSource
from jaxserve import model_store
from jaxserve.errors import ConfigError
from models import loading
from models.loading import ModelSource
from models.lora import Lora, LoraConfig, init_adapters

ADAPTER_LEAVES = (".a", ".b")


def open_model(path: str | Path) -> ModelSource:
    """As `models.loading.open_model`; a run whose checkpoints hold adapters alone is opened, too.

    Such a run is its base model with `lora` set: weights from where the run's config says, the
    tokenizer too, name and step of the run. The adapters are read here.

    Raises:
        ConfigError: the base is missing, or is not the one that the adapters were trained on.
        RunError, TrainConfigError: the run's own files do not say which base that is.
        ModelStoreError: the base cannot be fetched.
        FormatError, StoreError, FileNotFoundError: as there.
    """
    run = loading.open_model(path)
    if not holds_adapters(run):
        return run
    tensors = run.tensors
    assert isinstance(tensors, StoreSource)
    try:
        return _on_its_base(run, {name: tensors.read(name) for name in tensors.names()})
    finally:
        tensors.step.close()


def holds_adapters(model: ModelSource) -> bool:
    """Whether its checkpoint holds adapters in the place of parameters."""
    return isinstance(model.tensors, StoreSource) and all(
        name.endswith(ADAPTER_LEAVES) for name in model.tensors.names()
    )


def _on_its_base(run: ModelSource, leaves: dict[str, Any]) -> ModelSource:
    # Serving any other model needs nothing of the trainer.
    from jaxserve.trainer.base_digest import base_digest
    from jaxserve.trainer.config import TrainConfig
    from jaxserve.trainer.config_file import build, read_toml
    from jaxserve.trainer.run_folder import RunFolder
    from jaxserve.trainer.run_identity import base_model_digest

    folder = RunFolder(run.path)
    if not folder.config.is_file():
        raise FormatError(
            f"{run.path} holds adapters alone, and no config.toml that names their model: give the "
            "folder of the training run"
        )
    config = build(TrainConfig, read_toml(folder.config), str(folder.config))
    name = config.language_model.source
    if config.lora is None or name is None:
        raise ConfigError(
            f"{run.path} holds adapters alone, but {folder.config} has no [lora] with a "
            "model.source: bring back the config that the run was started with"
        )
    try:
        path = model_store.resolve(name)
    except ConfigError:
        raise ConfigError(
            f"{run.path} holds adapters of the model {name}, which is not there: bring it back, or "
            f"set model.source in {folder.config} to where it lies now"
        ) from None
    base = loading.open_model(path)
    if base_digest(base) != base_model_digest(folder):
        raise ConfigError(
            f"{run.path} holds adapters of the model {name}, but its files are not those that they "
            f"were trained on (base_model in {folder.world}): bring these back"
        )
    lora = LoraConfig(config.lora.rank, config.lora.alpha, config.lora.targets)
    _check_shapes(run, base, lora, leaves)
    return dataclasses.replace(
        base, name=run.name, step=run.step, lora=Lora(unflatten(leaves), lora.scale)
    )


def _check_shapes(
    run: ModelSource, base: ModelSource, lora: LoraConfig, leaves: dict[str, Any]
) -> None:
    """Raises ConfigError unless the adapters are those that the base gets by the config."""
    abstract = base.family.abstract_params(base.config, jnp.float32)
    wanted = jax.eval_shape(lambda: init_adapters(abstract, lora, jax.random.key(0)))
    expected = {name: leaf.shape for name, leaf in flatten(wanted).items()}
    found = {name: leaf.shape for name, leaf in leaves.items()}
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{run.path}: the adapter {name} is {found.get(name, 'missing')}, and the model "
            f"{base.path} with the run's [lora] needs {expected.get(name, 'none')}: bring back the "
            "model and the config that the run was started with"
        )
