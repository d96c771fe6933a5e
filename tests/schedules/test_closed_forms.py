"""One battery for every schedule, and the closed form of each."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import schedules
from schedules import ScheduleConfig, ScheduleError, knee, make_schedule

PEAK, TOTAL, WARMUP = 0.3, 40, 8

CONFIGS = {
    "constant": ScheduleConfig(kind="constant", peak_value=PEAK, warmup=WARMUP),
    "linear": ScheduleConfig(kind="linear", peak_value=PEAK, total=TOTAL, warmup=WARMUP),
    "linear_to_end": ScheduleConfig(kind="linear", peak_value=PEAK, total=TOTAL, end_value=0.03),
    "cosine": ScheduleConfig(kind="cosine", peak_value=PEAK, total=TOTAL, warmup=WARMUP),
    "cosine_to_end": ScheduleConfig(
        kind="cosine", peak_value=PEAK, total=TOTAL, warmup=WARMUP, init_value=0.01, end_value=0.03
    ),
    "polynomial": ScheduleConfig(
        kind="polynomial", peak_value=PEAK, total=TOTAL, warmup=WARMUP, power=2.0
    ),
    "knee": ScheduleConfig(kind="knee", peak_value=PEAK, total=TOTAL, warmup=WARMUP),
    "wsd": ScheduleConfig(kind="wsd", peak_value=PEAK, total=TOTAL, warmup=WARMUP, decay=10),
    "wsd_cosine": ScheduleConfig(
        kind="wsd", peak_value=PEAK, total=TOTAL, decay=10, decay_shape="cosine"
    ),
    "wsd_sqrt": ScheduleConfig(
        kind="wsd", peak_value=PEAK, total=TOTAL, warmup=WARMUP, decay=10, decay_shape="sqrt"
    ),
    "inverse_sqrt": ScheduleConfig(kind="inverse_sqrt", peak_value=PEAK, warmup=WARMUP),
    "inverse_sqrt_timescale": ScheduleConfig(kind="inverse_sqrt", peak_value=PEAK, timescale=20),
    "one_cycle": ScheduleConfig(kind="one_cycle", peak_value=PEAK, total=TOTAL),
    "piecewise": ScheduleConfig(
        kind="piecewise", peak_value=PEAK, warmup=WARMUP, boundaries=(20, 30), factors=(0.1, 0.01)
    ),
}
STEPS = np.arange(TOTAL + 11)


def expected(name: str, t: int) -> float:
    """Each closed form, in float64 and written apart from the code."""
    config = CONFIGS[name]
    warmup, end = config.warmup, config.end_value or 0.0
    if name == "one_cycle":
        warmup, init = 12, PEAK / 25
        end = init / 1e4
        if t < warmup:
            return init + (PEAK - init) * (1 - math.cos(math.pi * t / warmup)) / 2
    init = config.init_value or 0.0
    if t < warmup:
        return init + (PEAK - init) * t / warmup
    elapsed = min((t - warmup) / (TOTAL - warmup), 1.0)
    cosine = (1 + math.cos(math.pi * elapsed)) / 2
    late = min(max(t - 30, 0) / 10, 1.0)
    fraction = {
        "constant": 1.0,
        "linear": 1 - elapsed,
        "linear_to_end": 1 - elapsed,
        "cosine": cosine,
        "cosine_to_end": cosine,
        "one_cycle": cosine,
        "polynomial": (1 - elapsed) ** 2,
        "knee": 1 - min(max(t - 28, 0) / 12, 1.0),
        "wsd": 1 - late,
        "wsd_cosine": (1 + math.cos(math.pi * late)) / 2,
        "wsd_sqrt": 1 - math.sqrt(late),
        "inverse_sqrt": math.sqrt(8 / max(t, 8)),
        "inverse_sqrt_timescale": math.sqrt(20 / (20 + t)),
        "piecewise": 1.0 if t < 20 else 0.1 if t < 30 else 0.01,
    }[name]
    return end + (PEAK - end) * fraction


@pytest.fixture(params=sorted(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_closed_form(name: str) -> None:
    rates = make_schedule(CONFIGS[name])(STEPS)
    np.testing.assert_allclose(rates, [expected(name, int(t)) for t in STEPS], rtol=2e-6, atol=2e-8)


def test_any_way_of_calling_gives_the_same_float32(name: str) -> None:
    schedule = make_schedule(CONFIGS[name])
    jitted = jax.jit(schedule)
    one_by_one = np.stack([jitted(jnp.int32(t)) for t in STEPS])
    assert one_by_one.dtype == np.float32
    several = {
        "array": schedule(jnp.asarray(STEPS, jnp.int32)),
        "vmap": jax.jit(jax.vmap(schedule))(jnp.asarray(STEPS, jnp.int32)),
        "python ints": np.stack([schedule(int(t)) for t in STEPS[::10]]),
        "float counts": schedule(jnp.asarray(STEPS, jnp.float32)),
    }
    with jax.enable_x64(True):
        several["int64"] = jax.jit(schedule)(jnp.asarray(STEPS, jnp.int64))
    for way, rates in several.items():
        assert rates.dtype == np.float32, way
        wanted = one_by_one[::10] if way == "python ints" else one_by_one
        np.testing.assert_allclose(rates, wanted, rtol=3e-7, atol=1e-9, err_msg=way)


def test_rises_then_never_rises_again(name: str) -> None:
    config = CONFIGS[name]
    rates = np.asarray(make_schedule(config)(STEPS))
    top = 12 if name == "one_cycle" else config.warmup
    assert np.all(np.diff(rates[: top + 1]) > 0)
    assert np.all(np.diff(rates[top:]) <= 0)
    assert rates[top] == np.float32(PEAK)
    assert np.all(rates >= 0)


def test_has_no_jumps_but_those_asked_for(name: str) -> None:
    fine = np.linspace(0, TOTAL + 10, 4001, dtype=np.float32)
    largest = np.abs(np.diff(np.asarray(make_schedule(CONFIGS[name])(fine)))).max()
    if name == "piecewise":
        assert largest > 0.2
    else:
        assert largest < (0.02 if name == "wsd_sqrt" else 0.001)


def test_after_the_end_nothing_changes(name: str) -> None:
    schedule = make_schedule(CONFIGS[name])
    if name.startswith("inverse_sqrt"):
        assert schedule(TOTAL + 1) < schedule(TOTAL)
    else:
        assert np.all(schedule(STEPS[TOTAL:]) == schedule(TOTAL))
        assert float(schedule(10**9)) == float(schedule(TOTAL))


def test_count_from_one_is_one_step_ahead(name: str) -> None:
    import dataclasses

    ahead = make_schedule(dataclasses.replace(CONFIGS[name], count_from=1))
    assert np.array_equal(ahead(STEPS[:-1]), make_schedule(CONFIGS[name])(STEPS[1:]))


def test_resumed_trace_is_identical(name: str) -> None:
    """The state is a count: an optimizer restored from host arrays goes on bit for bit."""
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=make_schedule(CONFIGS[name]))

    @jax.jit
    def step(params: jax.Array, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.ones(3)
    state, saved, trace = optimizer.init(params), [], []
    for _ in range(TOTAL):
        saved.append(jax.tree.map(np.asarray, (params, state)))
        params, state = step(params, state)
        trace.append(np.asarray(params))
    for stop in (0, 1, WARMUP, 27, 28, TOTAL - 1):
        params, state = jax.tree.map(jnp.asarray, saved[stop])
        for count in range(stop, TOTAL):
            params, state = step(params, state)
            assert np.array_equal(params, trace[count])


@pytest.mark.parametrize(
    ("warmup", "explore", "total"),
    [(0, 0, 10), (0, 5, 10), (3, 0, 10), (3, 7, 10), (10, 0, 10), (2, 4, 12), (0, 0, 1), (1, 0, 1)],
)
def test_knee_is_three_joined_schedules(warmup: int, explore: int, total: int) -> None:
    decay = total - warmup - explore
    joined = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 0.7, warmup) if warmup else optax.constant_schedule(0.7),
            optax.constant_schedule(0.7),
            optax.linear_schedule(0.7, 0.0, decay) if decay else optax.constant_schedule(0.7),
        ],
        [warmup, warmup + explore],
    )
    rate = knee(0.7, total, warmup, explore / total)
    counts = np.arange(total + 5)
    np.testing.assert_allclose(rate(counts), [joined(t) for t in counts], rtol=1e-6, atol=1e-7)
    exact = {0: 0.0 if warmup else 0.7, warmup: 0.7, warmup + explore: 0.7}
    if decay:
        exact[total] = 0.0
    assert {t: float(rate(t)) for t in exact} == {t: float(np.float32(x)) for t, x in exact.items()}


@pytest.mark.parametrize(("warmup", "fraction"), [(0, 0.0), (0, 0.5), (100, 0.5), (100, 0.9)])
def test_knee_sums_to_its_area(warmup: int, fraction: float) -> None:
    total, explore = 1000, round(fraction * 1000)
    rates = np.asarray(knee(1.0, total, warmup, fraction)(np.arange(total)), np.float64)
    # Left sums of straight lines: a rise of n counts gives (n - 1) / 2, a fall (n + 1) / 2.
    decay = total - warmup - explore
    area = max(warmup - 1, 0) / 2 + explore + ((decay + 1) / 2 if decay else 0)
    assert rates.sum() == pytest.approx(area, rel=1e-6)


def test_knee_counted_as_the_authors_do() -> None:
    """Their convention: 1-based counts, exploring counted after the warm-up."""

    def rate_at(t: int, peak: float, warmup: int, explore: int, total: int) -> float:
        if t <= warmup:
            return peak * t / warmup
        if t <= warmup + explore:
            return peak
        return max(0.0, peak * (1 - (t - warmup - explore) / (total - warmup - explore)))

    rates = knee(0.4, 20, 4, 0.5, count_from=1)(np.arange(20))
    vector = [0.1, 0.2, 0.3, *[0.4] * 11, 0.4 * 5 / 6, 0.4 * 4 / 6, 0.2, 0.4 / 3, 0.4 / 6, 0.0]
    np.testing.assert_allclose(rates, vector, rtol=1e-6, atol=1e-8)
    wanted = [rate_at(t, 0.4, 4, 10, 20) for t in range(1, 21)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-6, atol=1e-8)
    assert float(rates[-1]) == 0.0


def test_knee_takes_traced_peaks() -> None:
    peaks = jnp.asarray([1e-3, 1e-2])
    rates = jax.jit(jax.vmap(lambda peak: knee(peak, 10, 2)(jnp.arange(11))))(peaks)
    for row, peak in zip(rates, peaks, strict=True):
        np.testing.assert_allclose(row, knee(float(peak), 10, 2)(np.arange(11)), rtol=1e-6)


def test_agrees_with_optax() -> None:
    steps = np.arange(TOTAL + 5)
    pairs = [
        ("cosine", optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, TOTAL)),
        ("one_cycle", optax.cosine_onecycle_schedule(TOTAL, PEAK)),
        ("constant", optax.warmup_constant_schedule(0.0, PEAK, WARMUP)),
    ]
    for name, theirs in pairs:
        ours = make_schedule(CONFIGS[name])(steps)
        np.testing.assert_allclose(ours, [theirs(t) for t in steps], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count_from", [0, 1])
def test_rewarming_rises_from_each_resumption(count_from: int) -> None:
    config = ScheduleConfig(
        kind="cosine",
        peak_value=PEAK,
        total=TOTAL,
        count_from=count_from,
        rewarm_at=(10, 12, 30),
        rewarm=4,
    )
    plain = schedules.ScheduleConfig(
        kind="cosine", peak_value=PEAK, total=TOTAL, count_from=count_from
    )
    ratio = np.asarray(make_schedule(config)(STEPS[:36])) / make_schedule(plain)(STEPS[:36])
    since = np.full(36, 4)
    since[10:12] = np.arange(2) + count_from
    since[12:16] = np.arange(4) + count_from
    since[30:34] = np.arange(4) + count_from
    np.testing.assert_allclose(ratio, np.minimum(since / 4, 1), rtol=1e-6)


def test_tokens_are_steps_rounded_up() -> None:
    def in_tokens(per_step: int | None) -> ScheduleConfig:
        return ScheduleConfig(
            peak_value=PEAK, unit="tokens", tokens_per_step=per_step, total=40_000, warmup=7_500
        )

    steps = ScheduleConfig(peak_value=PEAK, total=40, warmup=8)
    assert in_tokens(1000).in_counts() == steps
    by_step = make_schedule(in_tokens(1000))
    assert np.array_equal(by_step(STEPS), make_schedule(steps)(STEPS))
    by_token = make_schedule(in_tokens(None))
    assert float(by_token(7_500)) == np.float32(PEAK)
    assert 0 < float(by_token(39_999)) < 1e-4
    assert float(by_token(40_000)) == 0.0


def test_counts_of_many_tokens() -> None:
    config = ScheduleConfig(kind="linear", peak_value=1.0, unit="tokens", total=10**13)
    rates = make_schedule(config)(jnp.asarray([0, 5e12, 1e13], jnp.float32))
    np.testing.assert_allclose(rates, [1, 0.5, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sawtooth"}, "must be one of constant, linear"),
        ({"kind": "cosine"}, "needs total"),
        ({"kind": "wsd", "total": 9}, "needs decay"),
        ({"kind": "wsd", "total": 9, "warmup": 5, "decay": 5}, "only 4 of the run"),
        ({"kind": "cosine", "total": 9, "power": 2.0}, "power has no effect"),
        ({"kind": "constant", "end_value": 0.0}, "end_value has no effect"),
        ({"total": 9, "explore_fraction": 1.5}, "0 to 1"),
        ({"total": 10, "warmup": 6}, "lower explore_fraction to 0.4"),
        ({"total": 0}, "total is 0"),
        ({"total": 9, "warmup": 10}, "at most the length of the run"),
        ({"total": 9, "peak_value": 0.0}, "above 0"),
        ({"total": 9, "peak_value": math.nan}, "above 0"),
        ({"total": 9, "init_value": 0.1}, "without a warm-up"),
        ({"total": 9, "end_value": 2.0}, "0 to peak_value"),
        ({"total": 9, "count_from": 2}, "0 or 1"),
        ({"total": 9, "rewarm": 2}, "belong together"),
        ({"total": 9, "tokens_per_step": 2}, "unit='tokens'"),
        ({"total": 9, "unit": "epochs"}, "steps, tokens"),
        ({"kind": "inverse_sqrt"}, "needs timescale"),
        ({"kind": "polynomial", "total": 9, "power": 0.0}, "above 0"),
        ({"kind": "piecewise", "boundaries": (1, 2), "factors": (1.0,)}, "each boundary needs one"),
        ({"kind": "piecewise", "boundaries": (2, 1), "factors": (1.0, 0.1)}, "must rise"),
        (
            {"kind": "piecewise", "boundaries": (1,), "factors": (0.1,), "warmup": 4},
            "lies in the warm-up",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        ScheduleConfig(**{"peak_value": 1.0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "at least 1"),
        ({"warmup_steps": 11}, "0 to total_steps"),
        ({"explore_fraction": -0.1}, "0 to 1"),
        ({"explore_fraction": 0.8, "warmup_steps": 5}, "lower explore_fraction to 0.5"),
        ({"count_from": 3}, "0 \\(optax\\) or 1"),
    ],
)
def test_knee_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        knee(**{"peak_value": 1.0, "total_steps": 10, **options})  # type: ignore[arg-type]
