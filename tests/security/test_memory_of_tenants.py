"""Memory is planned before it is taken, and what one tenant left in it reaches no other."""

from __future__ import annotations

import secrets

import pytest

from jaxserve.engine import engine
from jaxserve.engine.memory_plan import MemoryPlan
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import ConfigError

GIB = 1 << 30


def test_a_plan_that_does_not_fit_is_refused_and_one_that_just_fits_is_not():
    parts = {"weights_bytes": GIB, "kv_pool_bytes": GIB, "slots_bytes": 10, "temp_bytes": 20}
    MemoryPlan(**parts, available_bytes=2 * GIB + 30, num_pages=1).check()
    with pytest.raises(ConfigError, match="lower --kv-cache-bytes"):
        MemoryPlan(**parts, available_bytes=2 * GIB + 29, num_pages=1).check()


def test_seeds_come_from_the_system_and_differ(service, monkeypatch):
    """Nobody can work out another's seed, since none comes from a generator of ours."""
    drawn = []

    class Recorder:
        @staticmethod
        def randbits(count):
            drawn.append((count, secrets.randbits(count)))
            return drawn[-1][1]

    monkeypatch.setattr(engine, "secrets", Recorder)
    for index in range(4):
        list(service.client.generate("x", max_tokens=1, request_id=f"r{index}"))
    loads = [load for plan in service.executor.plans for load in plan.slot_loads]
    assert [count for count, _ in drawn] == [64] * 4
    assert [load.seed for load in loads] == [seed for _, seed in drawn]
    assert len({load.seed for load in loads}) == 4
    assert SamplingParams().seed is None
