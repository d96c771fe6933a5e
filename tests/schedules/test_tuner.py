"""The tuner on losses whose best rate is known, its guards, and the negative controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import schedules
from schedules import ScheduleError, TunerConfig, TunerState, tuner_rules, tuner_state
from schedules.tuner_state import DECAY, EXPLOIT, HOLD, RAMP, initial_state, median, push

BASE = TunerConfig(total_steps=240, initial_lr=0.01, probe_every=4, num_batches=1)
record_losses = jax.jit(schedules.record_losses, static_argnames="config")
after_update = jax.jit(tuner_rules.after_update, static_argnames="config")
MULTIPLES = np.asarray(BASE.rate_multiples)


def states(config: TunerConfig, **changes: Any) -> TunerState:
    state = initial_state(config)
    return state._replace(
        **{name: jnp.asarray(value, getattr(state, name).dtype) for name, value in changes.items()}
    )


def probed(config: TunerConfig, state: TunerState, losses: Sequence[Sequence[float]]) -> TunerState:
    """`state` after a whole probe: one row of losses per batch."""
    assert len(losses) == config.num_batches
    for row in losses:
        state = record_losses(state, jnp.asarray(row, jnp.float32), config=config)
    return state


def bowl(optimum: float, lr: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Losses at the trial rates of a parabola that is lowest at `optimum`."""
    rng = np.random.default_rng(seed)
    rates = MULTIPLES * lr
    return list(1.0 + (rates / optimum - 1.0) ** 2 + noise * rng.standard_normal(len(rates)))


def settled(rate: float) -> float:
    """The optimum that makes auto stay at `rate`."""
    return rate * BASE.settled_vertex


def test_finds_the_best_rate_of_gradient_descent() -> None:
    """On a quadratic the best rate along g is g.g / g.H.g; for one eigenvalue, 1 / it."""
    for eigenvalues in ([4.0, 4.0, 4.0], [1.0, 3.0, 10.0]):
        hessian = jnp.asarray(eigenvalues)

        def loss_fn(params: jax.Array, batch: jax.Array, hessian: jax.Array = hessian) -> jax.Array:
            return 0.5 * jnp.sum(hessian * params**2) + 0.0 * jnp.sum(batch)

        config = dataclasses.replace(BASE, initial_lr=0.15)
        optimizer = optax.chain(optax.scale(-1.0), schedules.lr_tuner(config))
        params = jnp.asarray([1.0, -2.0, 0.5])
        state = optimizer.init(params)
        direction = schedules.probe_direction(optimizer, loss_fn)(params, state, jnp.ones(2))
        gradient = hessian * params
        np.testing.assert_allclose(direction, -gradient, rtol=1e-6)
        state = schedules.probe_step(loss_fn, config)(params, state, direction, jnp.ones(2))
        best = float(jnp.sum(gradient**2) / jnp.sum(gradient * hessian * gradient))
        a, b, _ = tuner_state(state).coefficients
        assert float(-0.15 * b / (2 * a)) == pytest.approx(best, rel=0.01)
        assert float(tuner_state(state).r_squared) > 0.9999


def test_median_of_noisy_probes_is_near_the_best_rate() -> None:
    config = dataclasses.replace(BASE, initial_lr=0.1, num_batches=4, min_estimates=16)
    state = states(config)
    for probe in range(16):
        state = state._replace(lr=jnp.float32(0.1))
        best = settled(0.1)
        rows = [bowl(best, 0.1, noise=0.1, seed=10 * probe + batch) for batch in range(4)]
        state = probed(config, state, rows)
    assert int(state.num_rates) == 16
    typical = float(jnp.exp(median(state.log_rates, state.num_rates)))
    assert typical == pytest.approx(0.1, rel=0.10)


@pytest.mark.parametrize("initial_lr", [1e-5, 1e-4, 1e-3, 1e-2])
def test_ramp_reaches_the_same_peak_from_any_start(initial_lr: float) -> None:
    config = dataclasses.replace(BASE, initial_lr=initial_lr)
    state, trace = states(config), [initial_lr]
    for step in range(config.max_ramp_steps):
        for _ in schedules.probe_positions(state, config, step):
            state = probed(config, state, [bowl(settled(0.004), float(state.lr))])
            trace.append(float(state.lr))
        state = after_update(config=config, state=state, value=jnp.float32(1.0))
        trace.append(float(state.lr))
    growth = np.asarray(trace[1:]) / trace[:-1]
    assert growth.max() <= 2.0001
    assert growth.min() >= 0.4999
    assert int(state.phase) == HOLD
    assert int(state.num_updates) >= int(state.hold_until) - config.explore_steps
    assert float(state.peak) == pytest.approx(0.004, rel=0.1)


def test_auto_holds_the_peak_and_decays_to_zero() -> None:
    config = dataclasses.replace(BASE, initial_lr=0.004)
    state, rates, phases, probes = states(config), [], [], []
    for step in range(config.total_steps):
        for _ in schedules.probe_positions(state, config, step):
            state = probed(config, state, [bowl(settled(0.004), float(state.lr))])
            probes.append(step)
        rates.append(float(state.lr))
        phases.append(int(state.phase))
        state = after_update(config=config, state=state, value=jnp.float32(1.0))
    assert probes == [4, 8, 12, 16, 20, 24]  # a tenth of the run, five estimates or more
    assert phases == [RAMP] * 24 + [HOLD] * 120 + [DECAY] * 96
    np.testing.assert_allclose(rates[:144], 0.004, rtol=1e-3)
    left = np.arange(96, 0, -1) / 96
    np.testing.assert_allclose(rates[144:], 0.004 * left, rtol=1e-3)
    assert float(state.lr) == 0.0


GROWS = [5.0, 4.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("losses", "lr", "estimate", "is_rejected"),
    [
        (GROWS, 0.02, None, False),  # still falling at the largest rate: further
        (bowl(0.02, 0.01), 0.02, None, False),  # far below the optimum: further
        (bowl(0.0068, 0.01), 0.01, 0.01, False),  # settled
        (bowl(0.0068 + 0.0017, 0.01), 0.01 * 2**0.5, 0.01 * 2**0.5, False),  # half a doubling
        (bowl(0.0051, 0.01), 0.01 / 2**0.5, 0.01 / 2**0.5, False),  # too high
        (bowl(0.003, 0.01), 0.005, 0.005, False),  # far too high
        ([1.0, 1.0, 1.0, 1.0], 0.01, None, True),  # flat
        ([3e4, 3e4 + 0.002, 3e4, 3e4], 0.01, None, True),  # flat to float32
        ([1.0, 3.0, 1.0, 3.0], 0.01, None, True),  # no parabola
        ([1.0, 1.1, 1.0, 0.2], 0.02, None, False),  # a < 0, lowest at the largest rate
        ([1.0, 2.0, 2.4, 1.5], 0.005, 0.005, False),  # a < 0, lowest where it stands: uphill too
        ([1.0, 1.5, 2.1, 3.6], 0.005, 0.005, False),  # uphill: updates have been too long
        ([1.0, 0.9, 0.9, np.nan], 0.005, None, True),  # too far to be measured
        ([1.0, 0.9, 0.9, np.inf], 0.005, None, True),
        ([np.nan, 0.9, 0.9, 0.9], 0.005, None, True),
    ],
)
def test_what_a_probe_may_say(
    losses: list[float], lr: float, estimate: float | None, is_rejected: bool
) -> None:
    state = probed(BASE, states(BASE), [losses])
    assert float(state.lr) == pytest.approx(lr, rel=1e-6)
    assert int(state.num_rejected) == int(is_rejected)
    assert int(state.num_rates) == int(estimate is not None)
    if estimate is not None:
        assert float(jnp.exp(state.log_rates[-1])) == pytest.approx(estimate, rel=1e-3)
    assert int(state.probe_pos) == 0
    assert int(state.num_probes) == 1


def test_the_ramp_lasts_until_the_network_has_settled() -> None:
    state = states(BASE)
    for _ in range(BASE.min_estimates + 3):
        state = probed(BASE, state, [bowl(settled(float(state.lr)), float(state.lr))])
    assert int(state.phase) == RAMP
    late = state._replace(num_updates=jnp.int32(BASE.min_ramp_steps))
    late = probed(BASE, late, [bowl(settled(0.01), 0.01)])
    assert int(late.phase) == HOLD
    assert float(late.peak) == pytest.approx(0.01, rel=1e-3)


def test_two_rejections_end_the_ramp_where_it_is() -> None:
    state = probed(BASE, states(BASE), [[1.0] * 4])
    assert int(state.phase) == RAMP
    between = probed(BASE, state, [GROWS])
    assert int(between.num_rejected) == 0
    state = probed(BASE, state, [[1.0] * 4])
    assert int(state.phase) == HOLD
    assert float(state.peak) == float(state.lr) == np.float32(0.01)


def test_no_growth_while_the_train_loss_rises() -> None:
    def after_window(mean_loss: float) -> float:
        state = states(BASE, window_sum=4 * mean_loss, window_steps=4, last_window_loss=2.0)
        return float(probed(BASE, state, [GROWS]).lr)

    assert after_window(1.9) == np.float32(0.02)
    assert after_window(2.01) == np.float32(0.02)
    assert after_window(2.2) == np.float32(0.01)


@pytest.mark.parametrize("variant", ["auto", "explore_exploit", "greedy", "running_max"])
def test_never_above_the_cap_nor_faster_than_twofold(variant: Any) -> None:
    config = dataclasses.replace(BASE, max_lr=0.05, variant=variant)
    rng = np.random.default_rng(0)
    state, last = states(config), 0.01
    for step in range(config.total_steps):
        for _ in schedules.probe_positions(state, config, step):
            state = probed(config, state, [list(rng.normal(size=4)) if step % 8 else GROWS])
            assert 0.4999 <= float(state.lr) / last <= 2.0001
            last = float(state.lr)
        assert float(state.lr) <= np.float32(0.05)
        assert float(state.peak) <= np.float32(0.05)
        state = after_update(config=config, state=state, value=jnp.float32(1.0))
        last = float(state.lr)


def test_a_spike_halves_the_rate_once_per_interval() -> None:
    config = BASE
    state = states(config, phase=HOLD, lr=0.01, peak=0.01, hold_until=120)
    for _ in range(9):
        state = after_update(config=config, state=state, value=jnp.float32(1.0))
    assert int(state.num_rollbacks) == 0
    for loss in (5.0, 5.0, 1.9, 5.0, 5.0):  # never three in a row
        state = after_update(config=config, state=state, value=jnp.float32(loss))
    assert int(state.num_rollbacks) == 0
    for _ in range(config.probe_interval):
        state = after_update(config=config, state=state, value=jnp.float32(5.0))
    assert int(state.num_rollbacks) == 1
    assert float(state.peak) == float(state.lr) == np.float32(0.005)


def test_a_spike_ends_the_ramp() -> None:
    state = states(BASE, log_rates=np.full(16, np.log(0.5)), num_rates=4)
    state = after_update(config=BASE, state=state, value=jnp.float32(jnp.nan))
    assert int(state.phase) == HOLD
    assert float(state.peak) == float(state.lr) == np.float32(0.005)
    assert int(state.num_losses) == 0  # a loss that is not a number is not remembered


def test_the_update_of_a_loss_that_is_not_finite_is_zero() -> None:
    tuner = schedules.lr_tuner(BASE)
    updates = {"w": jnp.full(2, jnp.nan), "b": jnp.ones(2, jnp.bfloat16)}
    scaled, _ = tuner.update(updates, tuner.init(updates), value=jnp.nan)
    assert np.all(np.asarray(scaled["w"]) == 0)
    assert np.all(np.asarray(scaled["b"], np.float32) == 0)
    scaled, _ = tuner.update({"b": updates["b"]}, tuner.init(updates), value=1.0)
    assert scaled["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(scaled["b"], np.float32), 0.01, rtol=1e-2)


def test_explore_exploit_rises_then_falls_towards_the_median() -> None:
    config = dataclasses.replace(BASE, variant="explore_exploit", initial_lr=1e-4, min_estimates=5)
    state, rates = states(config), []
    for step in range(config.total_steps):
        optimum = 0.004 if step < 120 else 0.001
        wild = 10.0 if step % 20 == 0 else 1.0  # every fifth estimate is far too high
        for _ in schedules.probe_positions(state, config, step):
            state = probed(config, state, [bowl(optimum * wild, float(state.lr))])
        rates.append(float(state.lr))
        state = after_update(config=config, state=state, value=jnp.float32(1.0))
    assert int(state.phase) == EXPLOIT
    assert np.all(np.diff(rates[:120]) >= 0)
    assert np.all(np.diff(rates[120:]) <= 0)
    assert 0.004 * 0.9 <= rates[119] <= 0.004 * 2
    assert rates[-1] == pytest.approx(0.001, rel=0.05)


def test_running_max_keeps_every_overestimate_and_the_others_do_not() -> None:
    """Estimates scatter by a factor of 1.8 around 0.004, the best rate all along."""

    def highest_rate(variant: Any) -> float:
        config = dataclasses.replace(BASE, variant=variant, initial_lr=0.002)
        state, highest, rng = states(config), 0.0, np.random.default_rng(3)
        for step in range(120):
            for _ in schedules.probe_positions(state, config, step):
                optimum = 0.004 * np.exp(0.6 * rng.standard_normal())
                state = probed(config, state, [bowl(optimum, float(state.lr))])
            state = after_update(config=config, state=state, value=jnp.float32(1.0))
            highest = max(highest, float(state.lr))
        return highest

    rates = {
        variant: highest_rate(variant) for variant in ("auto", "explore_exploit", "running_max")
    }
    assert rates["running_max"] > 3 * 0.004
    assert rates["auto"] <= 2.5 * 0.004
    assert rates["explore_exploit"] <= 3 * 0.004


def noisy_quadratic(params: jax.Array, batch: jax.Array) -> jax.Array:
    hessian = jnp.asarray([1.0, 10.0, 100.0])
    return 0.5 * jnp.sum(hessian * jnp.mean((params - batch) ** 2, axis=0))


def train(
    config: TunerConfig, loss_fn: Callable[[Any, Any], jax.Array] = noisy_quadratic
) -> tuple[float, list[float]]:
    optimizer = optax.chain(optax.scale(-1.0), schedules.lr_tuner(config))
    direction_of = schedules.probe_direction(optimizer, loss_fn)
    probe_step = schedules.probe_step(loss_fn, config)

    @jax.jit
    def train_step(params: jax.Array, state: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    rng, probe_rng = np.random.default_rng(1), np.random.default_rng(2)

    def batch(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=(8, 3)).astype(np.float32) * 0.3

    params, rates = jnp.full(3, 3.0), []
    state = optimizer.init(params)
    for step in range(config.total_steps):
        train_batch = batch(rng)
        for _ in schedules.probe_positions(state, config, step):
            direction = direction_of(params, state, train_batch)
            state = probe_step(params, state, direction, batch(probe_rng))
        rates.append(float(schedules.current_lr(state)))
        params, state = train_step(params, state, train_batch)
    return float(jnp.sum(jnp.asarray([1.0, 10.0, 100.0]) * params**2)), rates


def test_auto_trains_a_noisy_quadratic_that_greedy_is_too_short_sighted_for() -> None:
    """Greedy steps are those of the steepest direction: the flat ones are left behind."""
    auto, rates = train(dataclasses.replace(BASE, initial_lr=1e-4, num_batches=4))
    greedy, _ = train(dataclasses.replace(BASE, initial_lr=1e-4, num_batches=4, variant="greedy"))
    assert 0.005 < max(rates) < 0.05  # 1 / 100 is stable, 2 / 100 is the limit
    assert auto < 0.5 * greedy


def test_a_probe_evaluates_each_rate_on_each_batch_once() -> None:
    evaluations: list[int] = []

    def counted(params: jax.Array, batch: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: evaluations.append(1))
        return noisy_quadratic(params, batch)

    config = dataclasses.replace(BASE, num_batches=3)
    state: Any = initial_state(config)
    probe_step = schedules.probe_step(counted, config)
    params = jnp.ones(3)
    for position in range(3):
        state = probe_step(params, state, -params, jnp.full((1, 3), float(position)))
    jax.effects_barrier()
    assert len(evaluations) == 4 * 3
    assert int(state.num_probes) == 1


def test_moments_do_not_see_a_probe() -> None:
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale(-1.0), schedules.lr_tuner(BASE))
    params = jnp.ones(3)
    state = optimizer.init(params)
    direction = schedules.probe_direction(optimizer, noisy_quadratic)(
        params, state, jnp.zeros((1, 3))
    )
    np.testing.assert_allclose(direction, -1.0, rtol=1e-5)  # Adam's first step, at a rate of 1
    after = schedules.probe_step(noisy_quadratic, BASE)(params, state, direction, jnp.zeros((1, 3)))
    assert np.array_equal(after[0].mu, state[0].mu)
    assert int(after[0].count) == int(state[0].count) == 0


def test_accumulated_gradients_count_as_one_update() -> None:
    inner = optax.chain(optax.scale(-1.0), schedules.lr_tuner(BASE))
    optimizer = optax.MultiSteps(inner, every_k_schedule=3)
    params = jnp.ones(3)
    state = optimizer.init(params)
    for _ in range(12):
        updates, state = optimizer.update(jnp.ones(3), state, params, value=1.0)
    np.testing.assert_allclose(updates, -0.01, rtol=1e-6)
    tuner = tuner_state(state.inner_opt_state)
    assert int(tuner.num_updates) == 4
    direction = schedules.direction_of(inner, jnp.ones(3), state.inner_opt_state, params)
    np.testing.assert_allclose(direction, -1.0)


def test_probes_are_due_between_ramp_steps_only() -> None:
    config = dataclasses.replace(BASE, num_batches=2)  # every 4 updates: one batch every 2
    at_four = states(config, num_updates=4)
    assert list(schedules.probe_positions(at_four, config, 4)) == [0]
    assert list(schedules.probe_positions(at_four._replace(phase=HOLD), config, 4)) == []
    assert list(schedules.probe_positions(at_four._replace(probe_pos=1), config, 4)) == [1]
    assert list(schedules.probe_positions(at_four._replace(measured_at=4), config, 4)) == []
    assert list(schedules.probe_positions(None, config, 5)) == []  # nothing is read
    with pytest.raises(ScheduleError, match="has seen 4 updates"):
        schedules.probe_positions(at_four, config, 8)


def test_the_train_loss_is_needed() -> None:
    tuner = schedules.lr_tuner(BASE)
    with pytest.raises(ScheduleError, match="value=loss"):
        tuner.update(jnp.ones(2), tuner.init(jnp.ones(2)))


def test_exactly_one_tuner() -> None:
    with pytest.raises(ScheduleError, match="0 tuners"):
        schedules.current_lr(optax.EmptyState())
    state = initial_state(BASE)
    with pytest.raises(ScheduleError, match="2 tuners"):
        schedules.current_lr((state, {"again": state}))


def test_state_is_arrays_of_fixed_strong_types() -> None:
    """A weak type would change in a checkpoint and compile the train step again."""
    state = initial_state(BASE)
    updated = jax.eval_shape(lambda s: tuner_rules.after_update(BASE, s, jnp.float32(1)), state)
    recorded = jax.eval_shape(lambda s: schedules.record_losses(s, jnp.ones(4), BASE), state)
    for other in (updated, recorded):
        for name, before, after in zip(state._fields, state, other, strict=True):
            assert isinstance(before, jax.Array), name
            assert before.dtype in (jnp.float32, jnp.int32), name
            assert (after.shape, after.dtype) == (before.shape, before.dtype), name
            assert not before.weak_type, name
            assert not after.weak_type, name


def test_ring_and_median() -> None:
    ring, fill = jnp.zeros(4, jnp.float32), jnp.int32(0)
    for count, value in enumerate([3.0, 1.0, 2.0, 8.0, 9.0], start=1):
        ring, fill = push(ring, fill, jnp.float32(value))
        kept = [3.0, 1.0, 2.0, 8.0, 9.0][max(count - 4, 0) : count]
        assert float(median(ring, fill)) == np.median(kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "at least 1"),
        ({"initial_lr": 0.0}, "above 0, at most max_lr"),
        ({"initial_lr": 2.0}, "at most max_lr"),
        ({"variant": "magic"}, "one of auto"),
        ({"rate_multiples": (0.0, 1.0, 2.0)}, "no residual to test"),
        ({"rate_multiples": (0.5, 1.0, 2.0, 3.0)}, "from 0"),
        ({"num_batches": 0}, "at least 1"),
        ({"max_growth": 3.0}, "at most 2"),
        ({"min_estimates": 17}, "1 to 16"),
        ({"rollback_factor": 1.0}, "above 1"),
        ({"settled_vertex": 0.5}, "0.5 to the largest"),
        ({"vertex_per_doubling": 0.0}, "above 0"),
        ({"min_ramp_fraction": 0.3}, "0 to max_ramp_fraction"),
        ({"max_lr": float("inf")}, "above 0"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        TunerConfig(**{"total_steps": 100, "initial_lr": 0.1, **options})
