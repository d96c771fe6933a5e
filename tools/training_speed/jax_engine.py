"""Our training step: the whole of `StepRunner.run_step`, as a trainer runs it.

    python -m tools.training_speed.jax_engine FOLDER OPTIONS_JSON

`FOLDER` as for `torch_engine`; the options are fields of `StepConfig`.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.rows import Rows
from jaxserve.trainer.step_config import OptimizerConfig, StepConfig
from jaxserve.trainer.step_runner import StepRunner
from jaxserve.trainer.world import LogicalWorld
from models.loading import open_model
from schedules import ScheduleConfig
from tools.training_speed.case import Case
from tools.training_speed.worker import best_rate, serve

PEAK_SIZE = 2048
MANY_STEPS = 1_000_000


class FixedBatch:
    """A data set of one batch, so that every step has the same examples."""

    def __init__(self, tokens: npt.NDArray[np.int32]) -> None:
        self._tokens = tokens
        self.num_examples = tokens.shape[0]
        self.seq_len = tokens.shape[1] - 1

    def target_counts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """All targets count."""
        return np.full(len(ids), self.seq_len, np.int32)

    def read(self, ids: npt.NDArray[np.int64]) -> Rows:
        """One segment a row."""
        shape = (len(ids), self.seq_len)
        tokens = self._tokens[ids]
        return Rows(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            weights=np.ones(shape, np.uint8),
            segment_ids=np.ones(shape, np.int32),
            positions=np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), shape),
        )


def main() -> None:
    """Load, then step on demand."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    case = Case(**json.loads((folder / "case.json").read_text()))
    source = open_model(folder)
    optimizer = OptimizerConfig(weight_decay=case.weight_decay, decayed="all", clip_norm=None)
    runner = StepRunner(
        world=LogicalWorld(
            global_batch_size=case.batch_size,
            num_logical_shards=1,
            micro_batch_size=case.batch_size,
            seq_len=case.seq_len,
        ),
        config=StepConfig(optimizer=optimizer, **options),
        rate=ScheduleConfig(kind="constant", peak_value=case.learning_rate, total=MANY_STEPS),
        model=source.config,
        dataset=FixedBatch(np.load(folder / "tokens.npy", allow_pickle=False)),
        devices=jax.devices()[:1],
        initial_params=lambda: source.load_params(jnp.float32),
    )
    runner.load_state(None)
    steps = count()

    def step() -> float:
        loss = float(runner.run_step(next(steps)).loss)
        # The record comes before the update is done.
        jax.block_until_ready(jax.live_arrays())
        return loss

    square = jnp.ones((PEAK_SIZE, PEAK_SIZE))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    serve(
        step,
        lambda: best_rate(lambda: jax.block_until_ready(product(square)), 2.0 * PEAK_SIZE**3),
    )


if __name__ == "__main__":
    main()
