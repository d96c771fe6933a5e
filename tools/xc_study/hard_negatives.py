"""How many of a point's hardest negatives its batch holds, by the size of clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.xc.label_sets import LabelSets
from jaxserve.xc.sampler_config import SamplerConfig
from jaxserve.xc.samplers import MINED, BatchOrder, Sampler

NUM_HARDEST = 20
CLUSTER_SIZES = (1, 16, 64, 256, 1024)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Fixed:
    """Embeddings that are there already; see `jaxserve.xc.samplers.Embeddings`."""

    of_points: Floats
    of_labels: Floats

    def points(self) -> jax.Array:
        return jnp.asarray(self.of_points)

    def labels(self) -> jax.Array:
        return jnp.asarray(self.of_labels)


def hard_coverage(
    truth: LabelSets,
    points: Floats,
    labels: Floats,
    batch_size: int,
    cluster_sizes: Sequence[int] = CLUSTER_SIZES,
    seed: int = 0,
) -> Mapping[int, float]:
    """Percent of the points' `NUM_HARDEST` best wrong labels that are positives of their batch.

    Args:
        truth: labels of the N points.
        points: float32[N, D].
        labels: float32[L, D].
        batch_size: points of a batch; those of the last, short one are left out.
        cluster_sizes: C, each for one epoch of batches.
        seed: of clusters and batches.
    """
    fixed = _Fixed(points, labels)
    shape = {"seed": seed, "batch_size": batch_size, "width": points.shape[1]}
    config = SamplerConfig(name="ance", warmup_epochs=0, pool=NUM_HARDEST)
    miner = Sampler(config, truth, **shape)
    hardest = miner.refreshed(miner.initial_state(), 0, fixed)[MINED]
    found = {}
    for size in cluster_sizes:
        sampler = Sampler(SamplerConfig(cluster_size=size, warmup_epochs=0), truth, **shape)
        order = BatchOrder(sampler, batch_size, sampler.initial_state())
        shares = []
        for step in range(max(truth.num_points // batch_size, 1)):
            draw = order.next_draw(step, fixed)
            asked = hardest[draw.ids]
            shares.append(float(np.isin(asked, draw.positives)[asked >= 0].mean()))
        found[size] = 100 * float(np.mean(shares))
    return found
