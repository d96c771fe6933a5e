"""When shards are shared anew, and how."""

from __future__ import annotations

from jaxserve.trainer.balance import Balance, Speeds
from jaxserve.trainer.config import PlacementSection
from jaxserve.trainer.world import share_shards

NUM_SHARDS = 8


def run(balance: Balance, computed_s: list[float], num_steps: int) -> tuple[int, Speeds] | None:
    """Steps of a second each, until it speaks: the step and the speeds."""
    for step in range(num_steps):
        speeds = balance.step(computed_s, float(step))
        if speeds is not None:
            return step, speeds
    return None


def balance(processes: int, speeds: Speeds | None = None, after_s: float = 4.0) -> Balance:
    placement = PlacementSection(processes=processes)
    return Balance(NUM_SHARDS, placement, speeds, gain=1.5, after_s=after_s)


def test_slow_process_gets_less_within_twenty_steps() -> None:
    found = run(balance(2), [0.4, 4.0], 20)
    assert found is not None
    step, speeds = found
    assert step < 20
    assert speeds == (10.0, 1.0)
    assert [len(part) for part in share_shards(NUM_SHARDS, speeds)] == [7, 1]
    # Shared so, a step takes as long as the slow one's single shard: that is the best there is.
    assert run(balance(2, speeds), [0.7, 1.0], 100) is None


def test_recovered_process_gets_its_share_back() -> None:
    found = run(balance(2, (10.0, 1.0)), [0.7, 0.1], 20)
    assert found is not None
    assert [len(part) for part in share_shards(NUM_SHARDS, found[1])] == [4, 4]


def test_noise_moves_nothing() -> None:
    watched = balance(4)
    for step in range(100):  # One step in four is ten times slower, of changing processes.
        times = [4.0 if step % 16 == 4 * rank else 0.4 for rank in range(4)]
        assert watched.step(times, float(step)) is None


def test_what_cannot_be_better_stays() -> None:
    assert run(balance(NUM_SHARDS), [0.1] * 7 + [9.0], 100) is None


def test_it_must_last() -> None:
    assert run(balance(2, after_s=50.0), [0.4, 4.0], 40) is None
    assert run(balance(2, after_s=50.0), [0.4, 4.0], 80) is not None
