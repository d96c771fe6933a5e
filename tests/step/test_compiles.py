"""SE1: nothing compiles after READY, and the counter would see it."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.compilation import CompileCounter, use_compilation_cache
from jaxserve.engine.plan import Chunk, Decodes, StepPlan
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import ConfigError
from tests.step.harness import Driver, make_request, tiny_settings


@pytest.fixture
def counter():
    counter = CompileCounter()
    yield counter
    counter.close()


def random_sampling(rng: np.random.Generator) -> SamplingParams:
    """Any mix of what a request may ask."""
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    return SamplingParams(
        temperature=pick(0.0, 0.0, 0.7, 1.5),
        top_k=pick(0, 0, 5),
        top_p=pick(1.0, 0.8),
        min_p=pick(0.0, 0.1),
        seed=int(rng.integers(2**63)),
        repetition_penalty=pick(1.0, 1.0, 1.3),
        presence_penalty=pick(0.0, 0.0, 0.5),
        frequency_penalty=pick(0.0, 0.0, -0.5),
        logit_bias=pick((), ((3, 1.0),)),
        allowed_token_ids=pick(None, None, tuple(range(40))),
        bad_token_ids=pick((), (7, 8)),
        max_tokens=int(rng.integers(1, 30)),
        min_tokens=0,
        stop_token_ids=pick((), (5, 6)),
        ignore_eos=bool(rng.integers(2)),
        logprobs=pick(None, None, 0, 20),
        prompt_logprobs=pick(None, None, None, 2),
    )


def fuzz(counter: CompileCounter, *, num_steps: int, seconds: float, seed: int) -> int:
    """Every length, batch, abort, preemption, prefix hit and sampling mix."""
    driver = Driver(tiny_settings(num_pages=40, prefix_caching=True))
    driver.add(make_request("first", (1, 2, 3), SamplingParams(max_tokens=3)))
    driver.run()
    rng = np.random.default_rng(seed)
    shared = tuple(rng.integers(0, 90, 40).tolist())
    before = counter.count
    deadline = time.monotonic() + seconds
    num_requests = 0
    while len(driver.plans) < num_steps and time.monotonic() < deadline:
        if driver.scheduler.num_waiting < 3 and rng.random() < 0.6:
            length = int(rng.integers(1, 95))
            own = tuple(rng.integers(0, 90, length).tolist())
            prompt = (shared[: int(rng.integers(0, 41))] + own)[:length]
            name = f"r{num_requests}"
            num_requests += 1
            driver.add(make_request(name, prompt, random_sampling(rng)))
        if rng.random() < 0.05 and num_requests:
            driver.abort(f"r{rng.integers(num_requests)}")
        driver.turn()
    driver.run()
    assert {plan.num_rows_bucket for plan in driver.plans} == {4, 8, 24}
    assert driver.scheduler.num_preemptions > 0
    assert driver.scheduler.prefix_cache_hits > 0
    return counter.count - before


def test_a_fuzz_compiles_nothing(counter):
    assert fuzz(counter, num_steps=400, seconds=8, seed=0) == 0


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_long_fuzz_compiles_nothing(counter):
    assert fuzz(counter, num_steps=10**9, seconds=180, seed=1) == 0


def test_the_counter_sees_a_planted_compile(counter):
    before = counter.count
    jax.jit(lambda x: x * 3.25 + 1)(jnp.arange(7))
    assert counter.count > before
    assert counter.seconds > 0


def test_a_closed_counter_counts_no_more():
    counter = CompileCounter()
    counter.close()
    jax.jit(lambda x: x * 7.5 - 2)(jnp.arange(5))
    assert counter.count == 0


def test_a_wrong_shape_raises_and_does_not_compile(counter):
    driver = Driver(tiny_settings())
    executor = driver.executor
    before = counter.count
    chunk = Chunk("r", 0, 0, 3, (1, 2, 3), True, new_pages=(0,))
    with pytest.raises(ValueError, match="no step of 5 rows was compiled"):
        executor.submit(StepPlan(0, 5, Decodes(), (chunk,)))
    step = executor.programs.steps[8]
    wrong = np.zeros(executor.programs.layouts[4].size, np.int32)
    with pytest.raises(TypeError):
        step(executor.device.params, executor.device.kv_pool, executor.device.slots, wrong)
    too_many = Chunk("r", 0, 0, 9, tuple(range(9)), True, new_pages=(0, 1, 2))
    with pytest.raises(ValueError, match="does not fit its bucket"):
        executor.submit(StepPlan(0, 8, Decodes(), (too_many,)))
    assert counter.count == before
    assert executor.num_in_flight == 0


def test_no_implicit_transfers():
    """SE2: one explicit put and one explicit copy a step, nothing else."""
    driver = Driver(tiny_settings(), poison=False)
    driver.add(make_request("warm", (1, 2), SamplingParams(max_tokens=2)))
    driver.run()
    with jax.transfer_guard("disallow"):
        driver.add(make_request("r", tuple(range(30)), SamplingParams(max_tokens=9, logprobs=1)))
        driver.run()


def test_cache_directory_must_be_private(tmp_path):
    saved = jax.config.jax_compilation_cache_dir
    try:
        use_compilation_cache(tmp_path / "new")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        open_to_all = tmp_path / "open"
        open_to_all.mkdir()
        open_to_all.chmod(0o755)
        with pytest.raises(ConfigError, match="chmod 700"):
            use_compilation_cache(open_to_all)
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="cannot be used"):
            use_compilation_cache(tmp_path / "file")
    finally:
        jax.config.update("jax_compilation_cache_dir", saved)
