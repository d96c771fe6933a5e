"""The study's own parts: statistics, sharpness, tables. Its results are a command, not a test."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import schedules
from tools.schedule_study.char_lm import CharLmConfig, char_lm
from tools.schedule_study.corpus import corpus_of
from tools.schedule_study.fixed_runs import CHUNK, train_side_by_side
from tools.schedule_study.plan import Plan, adam, tuned_peak
from tools.schedule_study.report import write_tables
from tools.schedule_study.sharpness import EPSILON, sharpness
from tools.schedule_study.statistics import mean_of, paired, steps_to_reach
from tools.schedule_study.task import PROBE_BATCHES, Task
from tools.schedule_study.tuned_runs import TunedRuns

TEXT = corpus_of("words", b"to be or not to be that is the question " * 3000)
SMALL = CharLmConfig(context=4, embedding_width=4, hidden_width=16, batch_size=16)


def test_mean_and_interval_as_in_the_books() -> None:
    mean = mean_of([1.0, 2.0, 3.0, 4.0])
    assert mean.mean == 2.5
    assert mean.high - mean.mean == pytest.approx(
        3.182 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-3
    )
    difference = paired([5.0, 7.0, 9.0], [4.0, 6.0, 8.0])
    assert (difference.mean, difference.low, difference.high) == (1.0, 1.0, 1.0)


def test_steps_to_reach_lie_between_the_budgets() -> None:
    shift = np.asarray([-0.01, 0.0, 0.01])
    losses = {100: 2.0 + shift, 200: 1.8 + shift, 300: 1.7 + shift}
    found = steps_to_reach(1.75 + shift, losses)
    assert found.mean == pytest.approx(250)
    assert found.low == pytest.approx(250)  # a shift of all losses together changes nothing
    assert steps_to_reach(1.0 + shift, losses).mean == 300
    assert steps_to_reach(3.0 + shift, losses).mean == 100
    noisy = steps_to_reach(1.75 - shift, losses)
    assert noisy.low < 245 < 255 < noisy.high


def test_sharpness_of_a_bowl() -> None:
    """At the bottom of h x^2 / 2 the highest loss of the box is at its edge."""
    task = Task(
        name="bowl",
        init=lambda _: jnp.zeros(2),
        loss=lambda params, _: 0.5 * jnp.sum(jnp.asarray([1e6, 0.0]) * params**2),
        draw=lambda _: None,
        held_out=None,
        train_set=None,
    )
    edge = 0.5 * 1e6 * EPSILON**2
    start = jnp.asarray([1e-7, 0.0])  # exactly at the bottom there is no direction to go
    assert float(sharpness(task, start)) == pytest.approx(100 * edge, rel=0.01)


def test_runs_side_by_side_are_those_of_optax_alone() -> None:
    task = char_lm(TEXT, SMALL)
    rate = schedules.knee(3e-3, 2 * CHUNK, 10)
    runs = train_side_by_side(task, adam(), [rate, jnp.ones_like], [3, 4], 2 * CHUNK)
    optimizer = optax.adam(rate, b1=0.9, b2=0.99)
    params = task.initial_params(3)
    state = optimizer.init(params)

    @jax.jit
    def step(params: object, state: object, number: int) -> tuple[object, object]:
        grads = jax.grad(task.loss)(params, task.train_batch(3, number))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(2 * CHUNK):
        params, state = step(params, state, number)
    alone = float(task.loss(params, task.held_out))
    assert runs.held_out_losses[0] == pytest.approx(alone, abs=2e-3)
    assert alone < 0.5 * np.log(len(TEXT.alphabet))
    assert runs.train_losses.shape == (2, 2)


def test_a_tuned_run_counts_its_passes() -> None:
    config = schedules.TunerConfig(total_steps=2 * CHUNK, initial_lr=1e-4, probe_every=10)
    result = TunedRuns(char_lm(TEXT, SMALL), adam(), config).run(0)
    assert result.num_probe_forwards > 0
    assert result.num_probe_forwards % (4 * PROBE_BATCHES) == 0
    expected = result.num_probe_forwards / (3 * 2 * CHUNK)
    assert result.overhead_by_passes == pytest.approx(expected)
    assert result.rates.max() > 1e-4


def test_held_out_text_is_not_trained_on() -> None:
    letters = bytes(65 + (block % 20 == 19) for block in range(40) for _ in range(4096))
    task = char_lm(corpus_of("blocks", letters), SMALL)
    assert len(np.unique(task.held_out)) == 1
    drawn = np.concatenate([np.asarray(task.train_batch(0, step)) for step in range(20)])
    assert not np.isin(drawn, np.unique(task.held_out)).any()


def test_a_best_peak_at_an_end_widens_the_grid() -> None:
    def losses(peak: float) -> list[float]:
        return [abs(peak - 1.6), abs(peak - 1.6) + 0.1]

    best, tried = tuned_peak((0.1, 0.2, 0.4), losses)
    assert best == 1.6
    assert list(tried) == ["0.1", "0.2", "0.4", "0.8", "1.6", "3.2"]
    with pytest.raises(ValueError, match="no best peak"):
        tuned_peak((0.1, 0.2), lambda peak: [-peak])


def test_results_do_not_share_seeds_with_their_tuning() -> None:
    with pytest.raises(ValueError, match="must not be among"):
        Plan(tuning_seeds=(10,))


def test_tables_need_their_place(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text("# Nothing\n")
    digits = {
        "plan": {"seeds": [0, 1, 2], "tuning_seeds": [100, 101]},
        "run": {"machine": "abacus", "date": "2000-01-01", "wall_s": 2.0, "cpu_s": 3.0},
        "num_tuning_runs": 2,
        "schedules": {
            "cosine": {"tuning": {"0.1": [1.0, 2.0]}, "peak": 0.1, "test_losses": [1.0, 2.0]}
        },
        "explore": {
            "0.5": {"sharpness": [1.0, 2.0], "test_loss": [1.0, 2.0], "train_loss": [1.0, 2.0]}
        },
        "correlations": {},
    }
    with pytest.raises(ValueError, match="digits-setup"):
        write_tables(document, {"digits": digits})
    names = ("setup", "tuning", "losses", "explore")
    document.write_text("".join(f"<!-- table digits-{n} -->\nold\n<!-- end -->\n" for n in names))
    write_tables(document, {"digits": digits})
    assert "old" not in document.read_text()
    assert "| cosine | **1.5000** |" in document.read_text()
    assert "| seeds | results 0 to 2; tuning 100, 101 |" in document.read_text()
