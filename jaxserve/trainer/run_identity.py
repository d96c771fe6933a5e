"""world.json: which run this is. What decides its bits cannot change once it has begun."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.errors import RunError, TrainConfigError
from jaxserve.trainer.fingerprint import BASE_MODEL, NumericsFingerprint
from jaxserve.trainer.run_folder import RunFolder, write_json_durably
from jaxserve.trainer.world import Difference, LogicalWorld
from jaxserve.xc.dataset import XcDataset

_CONFIG_NAMES = {
    "global_batch_size": "batch.global_batch_size",
    "num_logical_shards": "batch.num_logical_shards",
    "micro_batch_size": "batch.micro_batch_size",
    "seq_len": "data.path (its rows' length)",
    "data_seed": "data.seed",
    "rng_seed": "numerics.seed",
    "mode": "numerics.mode",
    "data.fingerprint": "data.path (its content)",
}
"""Field of the logical world -> the config's name for it, where they differ."""
_PLACES = ("model.source", "xc.encoder.source", "xc.encoder_run")
"""Settings that are paths: the same files may lie elsewhere on another machine."""


def make_world(config: TrainConfig) -> LogicalWorld:
    """The logical world that a config describes.

    Raises:
        TrainConfigError: config and data do not fit together.
        ConfigError: sizes that do not fit together.
        DataError, XcDataError: the data cannot be used.
    """
    if config.task == "extreme_classification":
        texts = XcDataset(config.data.path)
        return _world(config, texts.max_tokens, texts.fingerprint)
    dataset = TokenDataset(config.data.path)
    shape = config.language_model.shape
    if shape is not None and dataset.vocab_size > shape.vocab_size:
        raise TrainConfigError(
            f"model.shape.vocab_size is {shape.vocab_size}, but the data in {config.data.path} has "
            f"token ids up to {dataset.vocab_size - 1}: use the tokenizer's vocabulary size"
        )
    if shape is not None and dataset.seq_len > shape.max_position_embeddings:
        raise TrainConfigError(
            f"model.shape.max_position_embeddings is {shape.max_position_embeddings}, but the rows "
            f"in {config.data.path} have {dataset.seq_len} tokens"
        )
    return _world(config, dataset.seq_len, dataset.fingerprint)


def _world(config: TrainConfig, seq_len: int, fingerprint: str) -> LogicalWorld:
    settings = {
        name: Path(value).name if name in _PLACES else value
        for name, value in config.frozen_settings().items()
    }
    return LogicalWorld(
        global_batch_size=config.batch.global_batch_size,
        num_logical_shards=config.batch.num_logical_shards,
        micro_batch_size=config.batch.micro_batch_size,
        seq_len=seq_len,
        data_seed=config.data.seed,
        rng_seed=config.numerics.seed,
        mode=config.numerics.mode,
        settings={**settings, "data.fingerprint": fingerprint},
    )


def check_world(folder: RunFolder, world: LogicalWorld) -> None:
    """Raises RunError: the folder's run has another world; names every field."""
    if not folder.world.exists():
        return
    there = LogicalWorld.from_json(_read(folder)["world"])
    differences = there.differences(world)
    if differences:
        raise RunError(
            f"{folder.root} holds a run of another logical world:\n"
            f"{_lines(differences, 'the run has', 'this config')}\n"
            "Go on with the config that it was started with, or give another run_dir "
            "(--set run_dir=...); --force sets the old run aside and starts anew"
        )


def check_numerics(
    folder: RunFolder, world: LogicalWorld, numerics: Mapping[str, Any], *, allow_change: bool
) -> list[Difference]:
    """Compares a numerics fingerprint with that of the run, or writes it down for a new run.

    Returns:
        The differences that were allowed.

    Raises:
        RunError: there are some, the mode is "exact", and they are not allowed.
    """
    now = NumericsFingerprint.from_json(numerics)
    if not folder.world.exists():
        _write(folder, world, now)
        return []
    differences = NumericsFingerprint.from_json(_read(folder)["numerics"]).differences(now)
    if not differences:
        return []
    if world.mode == "exact" and not allow_change:
        raise RunError(
            f"{folder.root} was computed under other conditions, which may change bits:\n"
            f"{_lines(differences, 'the run had', 'now')}\n"
            "Restore them, or go on with --allow-numerics-change, which the ledger records"
        )
    _write(folder, world, now)
    return differences


def base_model_digest(folder: RunFolder) -> str | None:
    """The digest of the files that a run's adapters belong to; None if it trains no adapters.

    Raises:
        RunError: there is no run, or its world.json is damaged.
    """
    folder.require()
    return NumericsFingerprint.from_json(_read(folder)["numerics"]).digests.get(BASE_MODEL)


def _write(folder: RunFolder, world: LogicalWorld, numerics: NumericsFingerprint) -> None:
    write_json_durably(folder.world, {"world": world.to_json(), "numerics": numerics.to_json()})


def _read(folder: RunFolder) -> dict[str, Any]:
    try:
        value = json.loads(folder.world.read_text())
    except ValueError as error:
        raise RunError(f"{folder.world} is damaged: {error}. Bring back the original") from None
    if not isinstance(value, dict) or not {"world", "numerics"} <= value.keys():
        raise RunError(f"{folder.world} is damaged: it has no world or numerics")
    return value


def _lines(differences: Iterable[Difference], before: str, now: str) -> str:
    return "\n".join(
        f"  {_CONFIG_NAMES.get(name, name)}: {before} {old!r}, {now} {new!r}"
        for name, old, new in differences
    )
