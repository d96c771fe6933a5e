"""A run with a tuned rate that can stop anywhere, inside a probe too, and go on elsewhere.

It probes along one update's direction, or along the path since the last probe. Parameters
and moments are sharded over the mesh; the loss and its gradient are computed on gathered
parameters, so that no sum depends on the number of devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import schedules
from schedules import TunerConfig

Along = Literal["update", "path"]
CONFIG = TunerConfig(total_steps=60, initial_lr=1e-4, probe_every=3, num_batches=3)
FEATURES, HIDDEN = 16, 32


class Run:
    """Trains a small network; `ticks` stops after every probe batch and every update."""

    def __init__(self, num_devices: int, along: Along, config: TunerConfig = CONFIG) -> None:
        self.along = along
        self.config = config
        mesh = Mesh(np.asarray(jax.devices()[:num_devices]), ("shard",))
        self.sharded = NamedSharding(mesh, PartitionSpec("shard"))
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.optimizer = optax.chain(
            optax.scale_by_adam(), optax.scale(-1.0), schedules.lr_tuner(config)
        )
        self.step = 0
        rng = np.random.default_rng(0)
        params = {
            "w": rng.normal(size=(FEATURES, HIDDEN)).astype(np.float32) / 4,
            "v": rng.normal(size=(HIDDEN,)).astype(np.float32) / 6,
        }
        self._place(params, self.optimizer.init(jax.tree.map(jnp.asarray, params)), params)
        self.direction_of = schedules.probe_direction(self.optimizer, self._loss)
        self.path_of = jax.jit(schedules.path_direction)
        self.probe_step = schedules.probe_step(self._loss, config)
        self.train_step = jax.jit(self._train)

    def _place(self, params: Any, opt_state: Any, start: Any) -> None:
        def put(array: Any) -> jax.Array:
            array = np.asarray(array)
            is_parameter = array.shape[:1] in ((FEATURES,), (HIDDEN,)) and array.size >= HIDDEN
            return jax.device_put(array, self.sharded if is_parameter else self.whole)

        self._state = jax.tree.map(put, (params, opt_state, start))

    @property
    def _state(self) -> Any:
        """All that a checkpoint holds but the step."""
        return self.params, self.opt_state, self.start

    @_state.setter
    def _state(self, state: Any) -> None:
        self.params, self.opt_state, self.start = state

    def _loss(self, params: Any, batch: Any) -> jax.Array:
        gathered = jax.lax.with_sharding_constraint(params, self.whole)
        inputs, targets = batch
        outputs = jnp.tanh(inputs @ gathered["w"]) @ gathered["v"]
        return jnp.mean((outputs - targets) ** 2)

    def _train(self, params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(self._loss)(params, batch)
        updates, opt_state = self.optimizer.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    def _batch(self, *key: int) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(key)
        inputs = rng.normal(size=(8, FEATURES)).astype(np.float32)
        targets = np.sin(inputs[:, 0] + inputs[:, 1]).astype(np.float32)
        return jax.device_put(inputs, self.whole), jax.device_put(targets, self.whole)

    def ticks(self) -> Iterator[tuple[int, int]]:
        """(step, batches of its probe that are done): what has just been reached."""
        while self.step < self.config.total_steps:
            train_batch = self._batch(1, self.step)
            for position in schedules.probe_positions(self.opt_state, self.config, self.step):
                probe_batch = self._batch(2, self.step, position)
                if self.along == "path":
                    begin, way = self.start, self.path_of(self.params, self.start, self.opt_state)
                else:
                    begin = self.params
                    way = self.direction_of(self.params, self.opt_state, train_batch)
                self.opt_state = self.probe_step(begin, self.opt_state, way, probe_batch)
                self.start = self.params
                yield self.step, position + 1
            self.params, self.opt_state = self.train_step(self.params, self.opt_state, train_batch)
            self.step += 1
            yield self.step, 0

    def finish(self) -> bytes:
        """All bits of the end."""
        for _ in self.ticks():
            pass
        return self.bits()

    def bits(self) -> bytes:
        leaves = jax.tree.leaves(self._state)
        return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)

    def save(self, path: Path) -> None:
        leaves = jax.tree.leaves(self._state)
        np.savez(path, step=self.step, **{str(i): leaf for i, leaf in enumerate(leaves)})

    def restore(self, path: Path) -> None:
        with np.load(path) as saved:
            self.step = int(saved["step"])
            structure = jax.tree.structure(self._state)
            leaves = [saved[str(i)] for i in range(structure.num_leaves)]
        self._place(*jax.tree.unflatten(structure, leaves))


def main(folder: Path) -> None:
    """On 8 devices: the same bits on any number, and after a stop and a move to any other."""
    for along in get_args(Along):
        wanted = Run(1, along).finish()
        for num_devices in (2, 8):
            assert Run(num_devices, along).finish() == wanted, f"{num_devices} devices"
    run, wide, narrow = Run(8, along), Run(8, along), Run(2, along)
    for number, (step, done) in enumerate(run.ticks()):
        if 12 <= step <= 15 and (done or step == 13):
            assert len(run.params["w"].sharding.device_set) == 8
            path = folder / f"{number}.npz"
            run.save(path)
            for other in (narrow, wide):
                other.restore(path)
                assert other.finish() == wanted, (step, done, other)
    print("same bits")


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
