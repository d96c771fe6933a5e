"""A trainer without JAX: real processes, signals and memory, and arithmetic that takes no time.

The state after n steps is a function of the ids of all steps, so that a lost, repeated or
swapped step shows in the bits.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.trainer import worker
from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.config_file import build
from jaxserve.trainer.control import Channel
from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.fingerprint import NumericsFingerprint
from jaxserve.trainer.flat_vector import FlatVector, Leaf
from jaxserve.trainer.read_log import LoggedDataset
from jaxserve.trainer.state_layout import Scalar, StateLayout
from jaxserve.trainer.step_record import EvalRecord, Runner, StepRecord
from jaxserve.trainer.world import LogicalWorld

LAYOUT = StateLayout(
    FlatVector.of([Leaf("layers/w", (4, 2000), True), Leaf("norm", (7,), False)]),
    ("params", "opt_state/0/mu"),
    (Scalar("next_step", (), "int64"),),
)
STEP_SECONDS = "step_seconds"
"""A file in the run's log folder; holds how long a step takes, and may be rewritten."""
POISON = "poison"
"""A file in the run's log folder; holds an example id whose step asks for a rollback."""


class ToyRunner:
    """See `jaxserve.trainer.step_record.Runner`."""

    layout = LAYOUT

    def __init__(self, spec: Mapping[str, Any]) -> None:
        config = build(TrainConfig, spec["config"], "spec")
        self._world = LogicalWorld.from_json(spec["world"])
        self._place = spec["place"]
        self.num_devices = self._place["num_processes"] * self._place["devices_per_process"]
        self.ranges = self._world.ranges_of(self.num_devices)
        self._log_dir = Path(spec["log_dir"])
        dataset = TokenDataset(config.data.path)
        self._dataset: Any = dataset
        if config.data.log_reads:
            rank = self._place["rank"]
            self._dataset = LoggedDataset(dataset, self._log_dir, spec["generation"], rank)
        self._sampler = IndexSampler(
            dataset.num_examples, self._world.data_seed, spec["quarantined_ids"]
        )
        self._state = np.zeros(LAYOUT.size_bytes, np.uint8)
        self.on_exchange: Callable[[], None] | None = None

    def load_state(self, buffer: Any) -> int:
        if buffer is None:
            self._state[:] = 0
            LAYOUT.vector(self._state, "params").reshape(-1)[: LAYOUT.flat.num_values] = 1.0
        else:
            self._state[:] = buffer
        return int(LAYOUT.scalar(self._state, "next_step"))

    def run_step(self, step: int) -> StepRecord:
        assert step == int(LAYOUT.scalar(self._state, "next_step"))
        time.sleep(self._number(STEP_SECONDS) or 0.0)
        size = self._world.global_batch_size
        ids = self._sampler.ids_of(step * size, size)
        rank, num = self._place["rank"], self._place["num_processes"]
        self._dataset.read(ids[rank * size // num : (rank + 1) * size // num])
        digest = hashlib.sha256(ids.astype("<i8").tobytes())
        poison = self._number(POISON)
        if poison is not None and int(poison) in ids:
            return self._record(step, digest.hexdigest(), (int(poison),))
        if self.on_exchange is not None:
            self.on_exchange()
        noise = np.frombuffer(digest.digest(), np.uint8).astype(np.float32)
        for name in LAYOUT.vectors:
            values = LAYOUT.vector(self._state, name).reshape(-1)[: LAYOUT.flat.num_values]
            values *= np.float32(0.99)
            values += np.resize(noise, values.shape) / np.float32(1000)
        LAYOUT.scalar(self._state, "next_step")[...] = step + 1
        return self._record(step, digest.hexdigest(), ())

    def _record(self, step: int, digest: str, suspects: tuple[int, ...]) -> StepRecord:
        size = self._world.global_batch_size
        total = float(LAYOUT.vector(self._state, "params").sum())
        return StepRecord(
            step=step,
            loss=np.float32("nan") if suspects else np.float32(total),
            grad_norm=np.float32(step),
            lr=np.float32(0.1),
            first_index=step * size,
            last_index=step * size + size - 1,
            ids_sha256=digest,
            num_tokens=size * self._world.seq_len,
            verdict="rollback" if suspects else "applied",
            reason="poisoned" if suspects else "",
            rollback_to=max(0, step - 1) if suspects else None,
            suspect_ids=suspects,
        )

    def _number(self, name: str) -> float | None:
        path = self._log_dir / name
        text = path.read_text().strip() if path.exists() else ""
        return float(text) if text else None

    def state_ranges(self) -> tuple[tuple[int, int], ...]:
        rank, num = self._place["rank"], self._place["num_processes"]
        first = rank * LAYOUT.size_bytes // num
        return ((first, (rank + 1) * LAYOUT.size_bytes // num - first),)

    def store_state(self, buffer: Any) -> None:
        for first, size in self.state_ranges():
            buffer[first : first + size] = self._state[first : first + size]

    def evaluate(self) -> EvalRecord:
        total = LAYOUT.vector(self._state, "params").sum()
        return EvalRecord(loss=np.float32(total), num_tokens=1, num_examples=1)

    def close(self) -> None:
        pass


FINGERPRINT = NumericsFingerprint(
    packages={}, xla_flags=(), platform="toy", device_kind="toy", machine="toy", digests={}
)


def make_runner(spec: Mapping[str, Any]) -> tuple[Runner, NumericsFingerprint]:
    return ToyRunner(spec), FINGERPRINT


def main(spec: Mapping[str, Any], channel: Channel, memory_fd: int) -> int:
    return worker.main(spec, channel, memory_fd, make_runner)
