"""The compiled step behind the real scheduler: exactness and invariance."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.engine.request import FinishReason
from jaxserve.engine.sampling_params import SamplingParams
from tests.step.harness import (
    TINY,
    Driver,
    dense_greedy,
    dense_logits,
    make_request,
    run_alone,
    tiny_settings,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ONE_BUCKET = (24,)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 90, length).tolist())


@pytest.mark.parametrize("sliding_window", [None, pytest.param(7, marks=pytest.mark.long)])
@pytest.mark.parametrize("buckets", [(4, 8, 24), ONE_BUCKET])
def test_greedy_equals_dense_forwards(buckets, sliding_window):
    config = replace(TINY, sliding_window=sliding_window)
    driver = Driver(tiny_settings(buckets=buckets, config=config))
    prompts = {f"r{n}": prompt_of(n, seed=n) for n in (1, 3, 16, 40, 70)}
    for name, prompt in prompts.items():
        driver.add(make_request(name, prompt, GREEDY))
    for name, stream in driver.run().items():
        assert stream.token_ids == dense_greedy(prompts[name], 12, config), name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(budget=st.integers(1, 24), length=st.integers(1, 60), seed=st.integers(0, 1000))
def test_every_split_of_a_prompt_gives_the_dense_logprobs(budget, length, seed):
    """SE3: chunks of any size against one dense forward."""
    prompt = prompt_of(length, seed)
    sampling = replace(GREEDY, max_tokens=2, logprobs=5, prompt_logprobs=0)
    shape = tiny_settings(buckets=ONE_BUCKET, max_num_seqs=1 if budget < 6 else 6)
    shape = replace(shape, scheduler=replace(shape.scheduler, token_budget=max(budget, 1)))
    stream = run_alone(shape, make_request("r", prompt, sampling))
    tokens = [*prompt, *stream.token_ids]
    dense = dense_logits(tokens).astype(np.float64)
    peak = dense.max(-1, keepdims=True)
    dense = dense - peak - np.log(np.exp(dense - peak).sum(-1, keepdims=True))
    reported = [*stream.prompt_logprobs, *stream.logprobs]
    assert len(reported) == len(tokens) - 1
    for position, entry in enumerate(reported):
        assert entry.token_id == tokens[position + 1]
        assert entry.logprob == pytest.approx(dense[position, entry.token_id], abs=1e-5)
    for offset, entry in enumerate(stream.logprobs):
        best = np.sort(dense[length - 1 + offset])[::-1][:5]
        np.testing.assert_allclose([value for _, value in entry.top], best, atol=1e-5)


SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, logprobs=0),
    SamplingParams(temperature=0.9, seed=5, max_tokens=14, ignore_eos=True, logprobs=0),
    SamplingParams(
        temperature=1.1,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        seed=2**60,
        max_tokens=14,
        ignore_eos=True,
        logprobs=3,
        bad_token_ids=(3, 4),
        logit_bias=((7, 1.5),),
    ),
]


def crowd(driver: Driver, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for index in range(count):
        sampling = SamplingParams(
            temperature=float(rng.choice([0.0, 0.8])),
            seed=index,
            max_tokens=int(rng.integers(4, 25)),
            top_p=float(rng.choice([1.0, 0.8])),
            ignore_eos=True,
        )
        prompt = prompt_of(int(rng.integers(1, 50)), seed=index + 100)
        driver.add(make_request(f"crowd{index}", prompt, sampling))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "everything"])
@pytest.mark.parametrize("depth", [1, 2])
def test_bits_do_not_depend_on_company_slot_or_preemption(sampling, depth):
    """SE4 and S7 with one bucket: alone, in a full batch, in another slot, and
    preempted and computed again."""
    shape = tiny_settings(buckets=ONE_BUCKET)
    request = lambda: make_request("r", prompt_of(19), sampling)  # noqa: E731
    alone = run_alone(shape, request(), depth=depth)
    assert len(alone.token_ids) == 14
    for crowd_first, seed in ((False, 1), (True, 2), (True, 3)):
        driver = Driver(shape, depth=depth)
        if not crowd_first:
            driver.add(request())
        crowd(driver, 5, seed)
        for _ in range(2 if crowd_first else 0):
            driver.turn()
        if crowd_first:
            driver.add(request())
        assert driver.run()["r"].bits() == alone.bits()
    preempted = 0
    for seed in range(6):
        tiny_pool = tiny_settings(buckets=ONE_BUCKET, num_pages=26)
        driver = Driver(tiny_pool, depth=depth)
        crowd(driver, 3, seed)
        driver.add(request())
        stream = driver.run()["r"]
        assert stream.bits() == alone.bits()
        preempted += stream.num_preemptions
    assert preempted > 0


def test_prefix_hits_give_the_same_bits():
    shape = tiny_settings(buckets=ONE_BUCKET, prefix_caching=True)
    plain = tiny_settings(buckets=ONE_BUCKET)
    prompt = prompt_of(33)
    alone = run_alone(plain, make_request("r", prompt, SAMPLINGS[1]))
    driver = Driver(shape)
    for name in ("first", "second"):
        driver.add(make_request(name, prompt, SAMPLINGS[1]))
        driver.run()
    assert driver.scheduler.prefix_cache_hits >= 32
    names = ["first", "second", "third", "fourth"]
    fresh = Driver(shape)
    for name in names[2:]:
        fresh.add(make_request(name, prompt, SAMPLINGS[1]))
    fresh.run()
    assert fresh.scheduler.prefix_cache_hits == 32, "not read in the step that wrote them"
    streams = driver.streams | fresh.streams
    for name in names:
        assert streams[name].bits() == alone.bits()


def test_two_deep_gives_what_synchronous_gives():
    """SE2: step k + 1 is dispatched before step k's tokens are read."""
    results = []
    for depth in (1, 2):
        driver = Driver(tiny_settings(), depth=depth)
        crowd(driver, 9, seed=4)
        driver.add(make_request("r", prompt_of(30), SAMPLINGS[2]))
        results.append({name: stream.token_ids for name, stream in driver.run().items()})
    assert results[0] == results[1]


def test_default_buckets_give_the_dense_tokens_under_preemption():
    driver = Driver(tiny_settings(num_pages=26))
    prompts = {f"r{n}": prompt_of(15 + n, seed=n) for n in range(8)}
    for name, prompt in prompts.items():
        driver.add(make_request(name, prompt, replace(GREEDY, max_tokens=20)))
    streams = driver.run()
    assert driver.scheduler.num_preemptions > 0
    for name, stream in streams.items():
        assert stream.token_ids == dense_greedy(prompts[name], 20), name


def test_prompt_logprobs_are_reported_once_even_when_preempted():
    sampling = replace(GREEDY, prompt_logprobs=2, max_tokens=20)
    plain = run_alone(tiny_settings(), make_request("r", prompt_of(20), sampling))
    assert [entry.token_id for entry in plain.prompt_logprobs] == list(prompt_of(20)[1:])
    preempted = 0
    for seed in range(6):
        driver = Driver(tiny_settings(num_pages=26))
        crowd(driver, 3, seed)
        driver.add(make_request("r", prompt_of(20), sampling))
        stream = driver.run()["r"]
        preempted += stream.num_preemptions
        assert [entry.token_id for entry in stream.prompt_logprobs] == list(prompt_of(20)[1:])
        assert stream.token_ids == plain.token_ids
    assert preempted > 0


def test_stop_ids_end_a_stream_one_step_late_without_a_trace():
    """The step that was in flight when the stop id came back is ignored."""
    free = run_alone(tiny_settings(), make_request("r", prompt_of(9), GREEDY))
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    sampling = replace(GREEDY, stop_token_ids=(stop,))
    stream = run_alone(tiny_settings(), make_request("r", prompt_of(9), sampling))
    assert stream.token_ids == free.token_ids[: first + 1]
    assert stream.finish_reason is FinishReason.STOP


def test_kv_pool_stays_where_it_is():
    """SE2: the donated pool is updated in place, never copied."""
    driver = Driver(tiny_settings(), poison=False)
    driver.add(make_request("r", prompt_of(20), GREEDY))
    driver.turn()
    driver.executor.device.kv_pool.block_until_ready()
    address = driver.executor.device.kv_pool.unsafe_buffer_pointer()
    driver.run()
    driver.executor.device.kv_pool.block_until_ready()
    assert driver.executor.device.kv_pool.unsafe_buffer_pointer() == address


def test_logits_that_are_not_finite_end_the_request_as_an_error():
    driver = Driver(tiny_settings(), poison=False)
    sound = driver.executor.device.params
    driver.add(make_request("r", prompt_of(9), GREEDY))
    driver.turn()
    try:
        driver.executor.device.params = jax.tree.map(lambda leaf: leaf * jnp.nan, sound)
        stream = driver.run()["r"]
    finally:
        driver.executor.device.params = sound
    assert stream.finish_reason is FinishReason.ERROR
    assert len(stream.token_ids) < 12
    assert min(stream.token_ids, default=0) >= 0
