"""Loss over an evaluation set, the same bits on any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.batches import Dataset
from jaxserve.trainer.shard_gradient import WEIGHTS, pack_rows
from jaxserve.trainer.step_record import EvalRecord
from jaxserve.trainer.world import LogicalWorld

Packed = Mapping[int, npt.NDArray[np.int32]]


def evaluate(
    world: LogicalWorld,
    dataset: Dataset,
    leaves: Sequence[int],
    max_examples: int | None,
    loss_of: Callable[[Packed, int], jax.Array],
) -> EvalRecord:
    """The mean loss over the first examples of `dataset`, in order.

    Args:
        world: sizes; a pass takes a global batch.
        dataset: the evaluation set.
        leaves: micro-batches of a global batch that this process computes.
        max_examples: at most so many are used; None: all.
        loss_of: rows of the local leaves and a number of targets to the sum of losses over
            the whole batch, divided by that number: float32[].
    """
    num_examples = min(dataset.num_examples, max_examples or dataset.num_examples)
    ids = np.arange(num_examples, dtype=np.int64)
    num_tokens = int(dataset.target_counts(ids).sum(dtype=np.int64))
    total = np.float32(0.0)
    for packed in _passes(world, dataset, leaves, ids):
        total = total + np.float32(loss_of(packed, num_tokens))
    return EvalRecord(loss=np.float32(total), num_tokens=num_tokens, num_examples=num_examples)


def _passes(
    world: LogicalWorld, dataset: Dataset, leaves: Sequence[int], ids: npt.NDArray[np.int64]
) -> Iterator[Packed]:
    batch, size = world.global_batch_size, world.micro_batch_size
    for first in range(0, len(ids), batch):
        packed = {}
        for leaf in leaves:
            places = first + leaf * size + np.arange(size)
            own = ids[np.minimum(places, len(ids) - 1)]
            rows = pack_rows(dataset.read(own), own)
            # Places beyond the end hold the last example again, which then counts for nothing.
            rows[places >= len(ids), WEIGHTS * world.seq_len : (WEIGHTS + 1) * world.seq_len] = 0
            packed[leaf] = rows
        yield packed
