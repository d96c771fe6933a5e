"""A refresh that does not end changes nothing: what is left gives the same batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.xc.label_sets import LabelSets
from jaxserve.xc.sampler_config import SamplerConfig
from jaxserve.xc.samplers import BatchOrder, Sampler

NUM_POINTS, NUM_LABELS, WIDTH, BATCH_SIZE = 48, 12, 8, 16


class _Cut(Exception):
    """In place of a kill."""


class _Embeddings:
    """Of two kinds of texts; cut off at the first or the second question, or never."""

    def __init__(self, cut_at: int | None = None) -> None:
        self._left = cut_at

    def points(self) -> jax.Array:
        return self._asked(NUM_POINTS)

    def labels(self) -> jax.Array:
        return self._asked(NUM_LABELS)

    def _asked(self, number: int) -> jax.Array:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise _Cut
        vectors = np.random.default_rng(number).normal(size=(number, WIDTH))
        return jnp.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), jnp.float32)


@pytest.mark.parametrize(
    ("name", "cut_at", "settings"),
    [
        ("ngame", 1, {}),
        ("ngame_centroid", 1, {"num_mined": 6}),
        ("ngame_centroid", 2, {"num_mined": 6}),
        ("ance", 1, {}),
        ("ance", 2, {}),
    ],
)
def test_what_was_cut_off_is_made_again(name: Any, cut_at: int, settings: dict[str, Any]) -> None:
    labels = LabelSets.of([[point % NUM_LABELS] for point in range(NUM_POINTS)], NUM_LABELS)
    config = SamplerConfig(name=name, cluster_size=4, warmup_epochs=1, refresh_every=1, **settings)
    sampler = Sampler(config, labels, seed=0, batch_size=BATCH_SIZE, width=WIDTH)
    whole, cut = (BatchOrder(sampler, BATCH_SIZE, sampler.initial_state()) for _ in range(2))
    steps_an_epoch = NUM_POINTS // BATCH_SIZE
    for step in range(steps_an_epoch):
        for one in (whole, cut):
            one.next_draw(step, _Embeddings())
    before = {key: value.tobytes() for key, value in cut.state.items()}
    with pytest.raises(_Cut):
        cut.next_draw(steps_an_epoch, _Embeddings(cut_at))
    assert {key: value.tobytes() for key, value in cut.state.items()} == before
    # Another process goes on with the state of before.
    resumed = BatchOrder(sampler, BATCH_SIZE, dict(cut.state))
    for step in range(steps_an_epoch, 3 * steps_an_epoch):
        expected, found = (one.next_draw(step, _Embeddings()) for one in (whole, resumed))
        for name_of in ("ids", "positives", "extra"):
            assert getattr(found, name_of).tolist() == getattr(expected, name_of).tolist()
    assert {key: value.tobytes() for key, value in resumed.state.items()} != before
