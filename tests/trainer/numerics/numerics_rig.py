"""A tiny model and data set for tests of the numeric core."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.rows import Rows
from jaxserve.trainer.decision import Rate
from jaxserve.trainer.step_config import OptimizerConfig, StepConfig
from jaxserve.trainer.step_record import StepRecord
from jaxserve.trainer.step_runner import StepRunner
from jaxserve.trainer.world import LogicalWorld
from models.config import ModelConfig
from schedules import ScheduleConfig

SEQ_LEN = 32
POISON = 256
"""A token that only poisoned examples hold."""

MODEL = ModelConfig(
    family="llama",
    vocab_size=257,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
WORLD = LogicalWorld(
    global_batch_size=16,
    num_logical_shards=8,
    micro_batch_size=2,
    seq_len=SEQ_LEN,
    data_seed=3,
    rng_seed=5,
)
RATE = ScheduleConfig(kind="cosine", peak_value=3e-3, total=12, warmup=2)
CONFIG = StepConfig(optimizer=OptimizerConfig(weight_decay=0.1), dropout=0.1, digest_every=2)


class TinyDataset:
    """Sequences with structure, so that there is something to learn; each is two segments."""

    fingerprint = "tiny"
    seq_len = SEQ_LEN

    def __init__(self, num_examples: int = 40, poisoned: Iterable[int] = ()) -> None:
        self.num_examples = num_examples
        self.poisoned = frozenset(poisoned)
        self.read_ids: list[int] = []

    def target_counts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        return np.asarray([self._row(int(one))["weights"].sum() for one in ids], np.int32)

    def read(self, ids: npt.NDArray[np.int64]) -> Rows:
        self.read_ids += ids.tolist()
        rows = [self._row(int(one)) for one in ids]
        return Rows(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def _row(self, example: int) -> dict[str, npt.NDArray[Any]]:
        rng = np.random.default_rng(example)
        start, stride = rng.integers(0, 256, 2)
        tokens = ((start + stride * np.arange(SEQ_LEN + 1)) % 256).astype(np.int32)
        if example in self.poisoned:
            tokens[5] = POISON
        border = 8 + example % 16
        positions = np.concatenate([np.arange(border), np.arange(SEQ_LEN - border)])
        weights = np.ones(SEQ_LEN, np.uint8)
        weights[border - 1] = 0
        weights[: example % 3] = 0
        return {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "weights": weights,
            "segment_ids": np.where(np.arange(SEQ_LEN) < border, 1, 2).astype(np.int32),
            "positions": positions.astype(np.int32),
        }


def make_runner(num_devices: int = 1, **changes: Any) -> StepRunner:
    """A runner on the first devices; `changes` are arguments of `StepRunner`."""
    rate: Rate = RATE
    arguments: dict[str, Any] = {
        "world": WORLD,
        "config": CONFIG,
        "rate": rate,
        "model": MODEL,
        "dataset": TinyDataset(),
        "devices": jax.devices()[:num_devices],
    }
    return StepRunner(**(arguments | changes))


def run(runner: StepRunner, num_steps: int, start: npt.NDArray[np.uint8] | None = None) -> Trace:
    """`num_steps` steps from `start` on; closes the runner."""
    first = runner.load_state(start)
    records = [runner.run_step(step) for step in range(first, first + num_steps)]
    buffer = np.zeros(runner.layout.size_bytes, np.uint8)
    runner.store_state(buffer)
    runner.close()
    return Trace(records, buffer)


class Trace:
    """What a run left behind."""

    def __init__(self, records: list[StepRecord], buffer: npt.NDArray[np.uint8]) -> None:
        self.records = records
        self.buffer = buffer

    @property
    def bits(self) -> list[tuple[str | None, ...]]:
        """Loss, norm and rate of each step in hex, and digests of parameters."""
        return [
            (
                record.loss.tobytes().hex(),
                record.grad_norm.tobytes().hex(),
                record.lr.tobytes().hex(),
                record.params_digest,
            )
            for record in self.records
        ]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.buffer.tobytes()).hexdigest()
