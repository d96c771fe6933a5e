"""The step is right, not only reproducible: compared with plain optax on the whole batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numerics_rig import CONFIG, MODEL, RATE, WORLD, TinyDataset, Trace, make_runner, run

from jaxserve.errors import ConfigError
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.shard_gradient import init_trainable, named_leaves, nested
from jaxserve.trainer.step_config import IncidentConfig, OptimizerConfig
from jaxserve.trainer.step_runner import StepRunner
from models.training import TrainRows, loss_sum
from schedules import make_schedule

NUM_STEPS = 4
pytestmark = pytest.mark.timeout(600)  # minutes of compilation, on a busy machine with no cache


def reference_run(optimizer: optax.GradientTransformation) -> tuple[dict[str, Any], list[float]]:
    """Parameters by name and losses of a run with nothing of ours in it but the model."""
    params = init_trainable(MODEL, None, WORLD.rng_seed)
    dataset = TinyDataset()
    sampler = IndexSampler(dataset.num_examples, WORLD.data_seed)

    @jax.jit
    def step_of(params: Any, state: Any, rows: TrainRows) -> Any:
        def mean_loss(tree: Any) -> jax.Array:
            return loss_sum(tree, MODEL, rows) / jnp.sum(rows.weights)

        loss, gradient = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for step in range(NUM_STEPS):
        size = WORLD.global_batch_size
        rows = dataset.read(sampler.ids_of(step * size, size))
        batch = TrainRows(**{name: jnp.asarray(getattr(rows, name)) for name in TrainRows._fields})
        batch = batch._replace(weights=batch.weights.astype(jnp.float32))
        params, state, loss = step_of(params, state, batch)
        losses.append(float(loss))
    return named_leaves(params), losses


def masters(runner: StepRunner, trace: Trace) -> dict[str, Any]:
    return named_leaves(runner.layout.tree(trace.buffer)["params"])


def is_matrix(params: Any) -> Any:
    names = named_leaves(params)
    return nested(
        {name: leaf.ndim - name.startswith("layers/") >= 2 for name, leaf in names.items()}
    )


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [
        (
            OptimizerConfig(weight_decay=0.1, b2=0.95, clip_norm=0.3),
            optax.chain(
                optax.clip_by_global_norm(0.3),
                optax.adamw(make_schedule(RATE), b2=0.95, weight_decay=0.1, mask=is_matrix),
            ),
        ),
        (
            OptimizerConfig(name="sgd", momentum=0.9, nesterov=True, clip_norm=None),
            optax.sgd(make_schedule(RATE), momentum=0.9, nesterov=True),
        ),
    ],
)
def test_parameters_are_those_of_optax(
    config: OptimizerConfig, optimizer: optax.GradientTransformation
) -> None:
    expected, losses = reference_run(optimizer)
    step_config = dataclasses.replace(CONFIG, optimizer=config, dropout=0.0)
    runner = make_runner(1, config=step_config)
    trace = run(runner, NUM_STEPS)
    np.testing.assert_allclose([one.loss for one in trace.records], losses, rtol=2e-6)
    got = masters(runner, trace)
    assert got.keys() == expected.keys()
    start = named_leaves(init_trainable(MODEL, None, WORLD.rng_seed))
    for name, values in expected.items():
        # In terms of how far the parameters have moved at all.
        moved = np.abs(np.asarray(values) - np.asarray(start[name])).max()
        assert moved > 0
        np.testing.assert_allclose(got[name], values, atol=5e-3 * moved, rtol=0, err_msg=name)


def test_digest_is_of_all_parameters() -> None:
    runner = make_runner(1)
    trace = run(runner, 1)
    bits = runner.layout.vector(trace.buffer, "params").view(np.uint32).reshape(-1)
    places = np.arange(bits.size, dtype=np.uint32)
    mix = np.uint32(0x9E3779B1)
    mixed = (bits ^ (bits >> 15)) * mix
    words = (bits * (2 * places + 1), (mixed ^ (mixed >> 13)) * (places * mix | 1))
    expected = "".join(f"{int(word.sum(dtype=np.uint32)):08x}" for word in words)
    assert trace.records[0].params_digest == expected


def test_state_outlives_names_and_arrays() -> None:
    runner = make_runner(1)
    trace = run(runner, 2)
    copy = np.full(runner.layout.size_bytes, 0xAB, np.uint8)
    copy[:] = 0
    runner.layout.fill(copy, runner.layout.tree(trace.buffer))
    assert copy.tobytes() == trace.buffer.tobytes()
    again = make_runner(1)
    assert again.load_state(copy) == 2
    record = again.run_step(2)
    straight = run(make_runner(1), 3)
    assert record.loss == straight.records[2].loss
    assert record.grad_norm == straight.records[2].grad_norm


def test_ranges_name_every_byte_once() -> None:
    runner = make_runner(1)
    covered = np.zeros(runner.layout.size_bytes, np.int32)
    for offset, size in runner.state_ranges():
        covered[offset : offset + size] += 1
    assert (covered == 1).all()


def test_dropout_and_order_depend_on_seeds_alone() -> None:
    plain = run(make_runner(1), 2)
    other_noise = run(make_runner(1, world=dataclasses.replace(WORLD, rng_seed=6)), 2)
    other_order = run(make_runner(1, world=dataclasses.replace(WORLD, data_seed=4)), 2)
    assert [one.ids_sha256 for one in plain.records] == [
        one.ids_sha256 for one in other_noise.records
    ]
    assert plain.records[0].ids_sha256 != other_order.records[0].ids_sha256
    assert plain.bits != other_noise.bits


def test_moving_average_follows_the_parameters() -> None:
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(ema_decay=0.5))
    runner = make_runner(1, config=config)
    start = named_leaves(init_trainable(MODEL, None, WORLD.rng_seed))
    first, second = (masters(runner, run(make_runner(1, config=config), n)) for n in (1, 2))
    trace = run(make_runner(1, config=config), 2)
    ema = named_leaves(runner.layout.tree(trace.buffer)["ema"])
    for name, values in ema.items():
        expected = 0.25 * np.asarray(start[name]) + 0.25 * first[name] + 0.5 * second[name]
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)


def test_evaluation_is_the_mean_over_all_targets() -> None:
    eval_set = TinyDataset(21)
    runner = make_runner(1, eval_dataset=eval_set)
    runner.load_state(None)
    record = runner.evaluate()
    params = init_trainable(MODEL, None, WORLD.rng_seed)
    rows = eval_set.read(np.arange(21, dtype=np.int64))
    batch = TrainRows(**{name: jnp.asarray(getattr(rows, name)) for name in TrainRows._fields})
    expected = loss_sum(params, MODEL, batch) / rows.weights.sum()
    assert record.num_examples == 21
    assert record.num_tokens == rows.weights.sum()
    np.testing.assert_allclose(record.loss, float(expected), rtol=2e-6)
    before = runner.evaluate().loss
    for step in range(2):  # the first one's rate is 0
        runner.run_step(step)
    assert runner.evaluate().loss != before
    runner.close()


def test_nothing_compiles_after_the_first_step() -> None:
    compiled: list[str] = []

    def listen(event: str, duration_s: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    # Sizes of their own, so that other tests have not compiled the step already.
    world = dataclasses.replace(WORLD, global_batch_size=8, num_logical_shards=4)
    runner = make_runner(1, world=world)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        buffer = np.zeros(runner.layout.size_bytes, np.uint8)
        runner.load_state(None)
        runner.run_step(0)
        runner.store_state(buffer)
        assert compiled, "the listener hears nothing"
        compiled.clear()
        for step in range(1, 4):
            runner.run_step(step)
            runner.store_state(buffer)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        runner.close()
    assert not compiled


def poisoned_params() -> dict[str, Any]:
    """Token 256, which ordinary examples do not hold, has no finite embedding."""
    params = init_trainable(MODEL, None, WORLD.rng_seed)
    params["embed"] = params["embed"].at[256].set(jnp.inf)
    return params


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_poisoned_example_is_found_and_its_update_dropped(policy: Any) -> None:
    sampler = IndexSampler(40, WORLD.data_seed)
    poisoned = int(sampler.ids_of(WORLD.first_index(1), 16)[5])
    config = dataclasses.replace(
        CONFIG,
        optimizer=OptimizerConfig(),
        incidents=IncidentConfig(policy=policy, rollback_steps=1),
    )
    changes: dict[str, Any] = {
        "config": config,
        "dataset": TinyDataset(poisoned=[poisoned]),
        "initial_params": poisoned_params,
    }
    runner = make_runner(1, **changes)
    runner.load_state(None)
    assert runner.run_step(0).verdict == "applied"
    before = np.zeros(runner.layout.size_bytes, np.uint8)
    runner.store_state(before)
    record = runner.run_step(1)
    assert record.verdict == ("skipped" if policy == "skip" else "rollback")
    assert record.rollback_to == (None if policy == "skip" else 0)
    assert poisoned in record.suspect_ids
    assert len(record.suspect_ids) == WORLD.micro_batch_size
    assert "not both finite" in record.reason
    after = np.zeros(runner.layout.size_bytes, np.uint8)
    runner.store_state(after)
    for name in runner.layout.vectors:
        # Bytes: the poisoned row is not finite, and nan is not equal to itself.
        old, new = (runner.layout.vector(one, name).tobytes() for one in (before, after))
        assert old == new
    runner.close()

    spared = make_runner(1, **changes, quarantined=record.suspect_ids)
    assert spared.load_state(before) == 1
    assert spared.run_step(1).verdict == "applied"
    spared.close()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="seq_len is 16"):
        make_runner(1, world=dataclasses.replace(WORLD, seq_len=16))
    with pytest.raises(ConfigError, match="replay_every needs mode 'exact'"):
        make_runner(
            1,
            world=dataclasses.replace(WORLD, mode="ordered"),
            config=dataclasses.replace(CONFIG, replay_every=2),
        )
    runner = make_runner(1)
    runner.load_state(None)
    with pytest.raises(ValueError, match="step 1, but the state is at step 0"):
        runner.run_step(1)
    with pytest.raises(ConfigError, match="no evaluation set"):
        runner.evaluate()
    runner.close()
