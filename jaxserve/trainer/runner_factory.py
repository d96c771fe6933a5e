"""From a trainer's spec to what computes: the place where config, data, models and devices meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxserve import model_store
from jaxserve.trainer.base_digest import base_digest
from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.config_file import build
from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.errors import TrainConfigError
from jaxserve.trainer.fingerprint import (
    BASE_MODEL,
    NumericsFingerprint,
    take_fingerprint,
)
from jaxserve.trainer.launch import Place, set_up_jax, xla_flags
from jaxserve.trainer.read_log import LoggedDataset
from jaxserve.trainer.step_record import Runner
from jaxserve.trainer.step_runner import StepRunner
from jaxserve.trainer.world import LogicalWorld
from jaxserve.trainer.xc_runner import make_xc_runner
from models.config import ModelConfig
from models.loading import open_model
from models.lora import LoraConfig


def make_runner(spec: Mapping[str, Any]) -> tuple[Runner, NumericsFingerprint]:
    """What a trainer drives, and what its bits depend on.

    Args:
        spec: `place`, `generation`, `config`, `world`, `quarantined_ids`, `log_dir`, `weights`.

    Raises:
        ConfigError, DataError, FormatError: config, data or model do not fit together.
    """
    place = Place(**spec["place"])
    config = build(TrainConfig, spec["config"], "the run's config")
    set_up_jax(place)
    devices = _devices(place)
    world = LogicalWorld.from_json(spec["world"])
    speeds = _weights(spec["weights"], place)
    if config.task == "extreme_classification":
        classification, own = make_xc_runner(config, world, devices, speeds)
        return classification, take_fingerprint(devices[0], xla_flags(), own)
    dataset: Any = TokenDataset(config.data.path)
    if config.data.log_reads:
        dataset = LoggedDataset(dataset, Path(spec["log_dir"]), spec["generation"], place.rank)
    model, initial, digests = _model_of(config)
    lora, evaluation = config.lora, config.evaluation
    runner = StepRunner(
        world=world,
        config=config.step_config(),
        rate=config.parsed_schedule,
        model=model,
        dataset=dataset,
        eval_dataset=None if evaluation is None else TokenDataset(config.data.path, "eval"),
        max_eval_examples=None if evaluation is None else evaluation.max_examples,
        devices=devices,
        weights=speeds,
        quarantined=spec["quarantined_ids"],
        initial_params=None if lora is not None else initial,
        lora=None if lora is None else LoraConfig(lora.rank, lora.alpha, lora.targets),
        base_params=None if lora is None or initial is None else initial(),
    )
    return runner, take_fingerprint(devices[0], xla_flags(), digests)


def _weights(speeds: list[float] | None, place: Place) -> list[float] | None:
    """Relative speeds of all devices from those of the processes."""
    return speeds and [one for one in speeds for _ in range(place.devices_per_process)]


def _devices(place: Place) -> list[jax.Device]:
    """The generation's devices, in an order that all processes agree on."""
    wanted, found = place.devices_per_process, jax.local_device_count()
    if found < wanted:
        raise TrainConfigError(
            f"placement.devices_per_process is {wanted}, but this machine has {found} devices "
            f"({jax.devices()[0].device_kind}); use at most these"
        )
    devices: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        devices.setdefault(device.process_index, []).append(device)
    return [device for process in sorted(devices) for device in devices[process][:wanted]]


def _model_of(
    config: TrainConfig,
) -> tuple[ModelConfig, Callable[[], Any] | None, dict[str, str]]:
    """The model's config, what loads its weights (None: it starts from random ones), and
    the digests of what is read on every start."""
    if config.language_model.shape is not None:
        return config.language_model.shape, None, {}
    assert config.language_model.source is not None
    opened = open_model(model_store.resolve(config.language_model.source))

    def load() -> Any:
        return opened.load_params("float32")

    digests = {BASE_MODEL: base_digest(opened)} if config.lora is not None else {}
    return opened.config, load, digests
