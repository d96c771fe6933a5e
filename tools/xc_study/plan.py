"""What is run: methods, sizes and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.trainer.config import TrainConfig, config_from_table

NUM_ENCODES = 2048
"""Texts that every method encodes a step."""
ENCODER_SOURCE = "all-minilm-l6-v2"
NUM_MINED = 320


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train an encoder.

    Attributes:
        batch_size: S, points of a step, so that all methods encode the same number of texts.
        sampler: the table [xc.sampler].
    """

    batch_size: int
    sampler: Mapping[str, Any]


_CLUSTERS = {"cluster_size": 64, "warmup_epochs": 2, "refresh_every": 2}

METHODS: Mapping[str, Method] = {
    "random": Method(batch_size=1024, sampler={"name": "random"}),
    "ngame": Method(batch_size=1024, sampler={"name": "ngame", **_CLUSTERS}),
    "ngame_centroid": Method(
        batch_size=(NUM_ENCODES - NUM_MINED) // 2,
        sampler={"name": "ngame_centroid", "num_mined": NUM_MINED, **_CLUSTERS},
    ),
    "tas": Method(batch_size=1024, sampler={"name": "tas", "cluster_size": 64}),
    "ance": Method(
        batch_size=NUM_ENCODES // 3,
        sampler={"name": "ance", "warmup_epochs": 2, "refresh_every": 2},
    ),
    "ngame_curriculum": Method(
        batch_size=1024, sampler={"name": "ngame", "initial_cluster_size": 4, **_CLUSTERS}
    ),
    "ngame_stale": Method(
        batch_size=1024, sampler={"name": "ngame", "memory_bank": True, **_CLUSTERS}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the study.

    Attributes:
        data: a prepared data set.
        out: folder of the results.
        num_epochs: passes over the training points for an encoder.
        num_classifier_epochs: the same for label classifiers.
        num_points: training points of the data set.
        loss: name of the encoder's loss.
        evaluate_every: epochs between two points of a run's curve.
    """

    data: Path
    out: Path
    num_points: int
    num_epochs: int = 16
    num_classifier_epochs: int = 20
    loss: str = "triplet"
    evaluate_every: int = 1

    def encoder_config(self, method: str, seed: int) -> TrainConfig:
        """Of one run of stage "encoder"."""
        spec = METHODS[method]
        xc = {
            "encoder": {"source": ENCODER_SOURCE},
            "sampler": dict(spec.sampler),
            "loss": {"name": self.loss},
        }
        return self._config(xc, spec.batch_size, self.num_epochs, 3e-3, seed)

    def classifier_config(self, seed: int) -> TrainConfig:
        """Of one run of stage "classifiers"; its encoder is handed over by itself."""
        xc = {
            "stage": "classifiers",
            "encoder_run": "handed over",
            "sampler": {"name": "ngame", **_CLUSTERS, "refresh_every": 5, "warmup_epochs": 0},
            "loss": {"margin": 0.2, "num_hard": 5},
        }
        return self._config(xc, 1024, self.num_classifier_epochs, 2e-3, seed)

    def _config(
        self, xc: dict[str, Any], batch_size: int, epochs: int, rate: float, seed: int
    ) -> TrainConfig:
        steps = epochs * self.num_points // batch_size
        table = {
            "run_dir": "unused",
            "task": "extreme_classification",
            "total_steps": steps,
            "data": {"path": str(self.data.absolute()), "seed": seed},
            "batch": {
                "global_batch_size": batch_size,
                "num_logical_shards": 1,
                "micro_batch_size": batch_size,
            },
            "optimizer": {"name": "adam", "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "peak_value": rate},
            "numerics": {"seed": seed},
            "logging": {"params_digest_every": 0},
            "xc": xc,
        }
        return config_from_table(table, Path("study.toml"))
