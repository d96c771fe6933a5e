"""The sampler against a plain sorted reference, and its statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.plan import SlotLoad
from jaxserve.engine.sampler import _largest_threshold, sample
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.slots import SlotLoadLayout, SlotState, empty_slots, load_slot

VOCAB = 300  # more than one block of the two-level search, and not a multiple of 32
NUM_SLOTS = 4
LAYOUT = SlotLoadLayout(VOCAB, max_model_len=32)
LOAD = jax.jit(lambda slots, vector: load_slot(slots, vector, layout=LAYOUT))
SAMPLE = jax.jit(sample)


def no_slots() -> SlotState:
    return empty_slots(NUM_SLOTS, VOCAB)


def load(
    slots: SlotState,
    slot: int,
    sampling: SamplingParams,
    *,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    stop: tuple[int, ...] = (),
    seed: int = 0,
) -> SlotState:
    vector = LAYOUT.pack(SlotLoad(slot, "r", sampling, seed, prompt, output, stop))
    return LOAD(slots, jnp.asarray(vector))


def draw(slots: SlotState, logits: np.ndarray, positions: np.ndarray, slot: int = 0) -> np.ndarray:
    """Tokens of N rows that all belong to one slot."""
    rows = np.full(len(logits), slot, np.int32)
    targets = np.full(len(logits), -1, np.int32)
    return np.asarray(SAMPLE(logits, slots, rows, positions, targets).token_ids)


def reference_support(logits: np.ndarray, sampling: SamplingParams) -> set[int]:
    """Token ids that may be drawn, by sorting (float64)."""
    scaled = logits.astype(np.float64) / sampling.temperature
    probs = np.exp(scaled - scaled.max())
    if sampling.top_k:
        kth = np.sort(probs)[-sampling.top_k]
        probs = np.where(probs >= kth, probs, 0)
    if sampling.top_p < 1:
        order = np.argsort(-probs)
        mass = np.cumsum(probs[order]) / probs.sum()
        count = int(np.searchsorted(mass, sampling.top_p)) + 1
        probs = np.where(probs >= probs[order[min(count, len(order)) - 1]], probs, 0)
    probs = np.where(probs >= sampling.min_p, probs, 0)
    return set(np.flatnonzero(probs))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 1, 2, 7, 299, 300]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
)
def test_draws_stay_in_the_sorted_references_support(seed, temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=VOCAB).astype(np.float32) * 3
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    slots = load(no_slots(), 0, sampling, seed=seed)
    tokens = draw(slots, np.tile(logits, (64, 1)), np.arange(64, dtype=np.int32))
    assert set(tokens.tolist()) <= reference_support(logits, sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=1.0, min_p=0.2, top_k=50, top_p=0.95),
    ],
    ids=lambda s: f"t{s.temperature}-k{s.top_k}-p{s.top_p}-m{s.min_p}",
)
def test_frequencies_match_the_distribution(sampling):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=VOCAB).astype(np.float32) * 2
    slots = load(no_slots(), 1, sampling, seed=2**63 + 12345)
    num_draws = 20_000
    positions = np.arange(1000, dtype=np.int32)
    counts = np.zeros(VOCAB)
    for batch in range(num_draws // 1000):
        tokens = draw(slots, np.tile(logits, (1000, 1)), positions + 1000 * batch, slot=1)
        counts += np.bincount(tokens, minlength=VOCAB)
    support = list(reference_support(logits, sampling))
    expected = np.zeros(VOCAB)
    expected[support] = np.exp(logits[support].astype(np.float64) / sampling.temperature)
    expected *= num_draws / expected.sum()
    often = expected > 20
    assert not counts[expected == 0].any()
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = often.sum() - 1
    # Mean `degrees`, standard deviation sqrt(2 degrees): five of them.
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_same_seed_and_position_give_the_same_token_in_any_slot_and_batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, VOCAB)).astype(np.float32)
    sampling = SamplingParams(temperature=1.0)
    greedy = SamplingParams(temperature=0.0)
    wild = SamplingParams(temperature=2.0, top_k=40, top_p=0.5, repetition_penalty=1.2)
    alone = load(no_slots(), 0, sampling, seed=77)
    crowd = load(load(load(no_slots(), 3, sampling, seed=77), 0, greedy), 1, wild)
    positions = np.full(8, 19, np.int32)
    targets = np.full(8, -1, np.int32)
    first = SAMPLE(logits, alone, np.zeros(8, np.int32), positions, targets).token_ids
    mixed_slots = np.array([0, 3, 1, 3, 0, 1, 0, 3], np.int32)
    second = SAMPLE(logits, crowd, mixed_slots, positions, targets).token_ids
    of_request = mixed_slots == 3
    np.testing.assert_array_equal(np.asarray(first)[of_request], np.asarray(second)[of_request])
    moved = SAMPLE(logits, alone, np.zeros(8, np.int32), positions + 1, targets).token_ids
    assert (np.asarray(first) != np.asarray(moved)).any()


def test_greedy_takes_the_first_of_equal_maxima():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[0, [7, 200]] = 5.0
    slots = load(no_slots(), 0, SamplingParams(temperature=0.0))
    assert draw(slots, logits, np.zeros(2, np.int32)).tolist() == [7, 0]


def penalised(logits, prompt, output, sampling):
    """The reference formula for one row."""
    x = logits.astype(np.float64).copy()
    for token in set(prompt) | set(output):
        x[token] = (
            x[token] / sampling.repetition_penalty
            if x[token] > 0
            else x[token] * sampling.repetition_penalty
        )
    for token in set(output):
        x[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    return x


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    repetition=st.sampled_from([1.0, 0.5, 1.8]),
    presence=st.sampled_from([0.0, -1.0, 1.5]),
    frequency=st.sampled_from([0.0, -0.5, 0.7]),
)
def test_penalties(seed, repetition, presence, frequency):
    rng = np.random.default_rng(seed)
    prompt = tuple(rng.integers(0, 12, 6).tolist())
    output = tuple(rng.integers(0, 12, 9).tolist())
    logits = np.full((1, VOCAB), -50, np.float32)
    logits[0, :12] = rng.normal(size=12) * 2
    sampling = SamplingParams(
        temperature=0.0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    slots = load(no_slots(), 0, sampling, prompt=prompt, output=output)
    expected = penalised(logits[0], prompt, output, sampling)
    margin = np.sort(expected)[-1] - np.sort(expected)[-2]
    if margin > 1e-4:
        assert draw(slots, logits, np.zeros(1, np.int32))[0] == expected.argmax()


def test_bias_allowed_and_bad_ids():
    logits = np.linspace(0, 1, VOCAB, dtype=np.float32)[None]
    position = np.zeros(1, np.int32)

    def best(**settings):
        slots = load(no_slots(), 2, SamplingParams(temperature=0.0, **settings))
        return int(draw(slots, logits, position, slot=2)[0])

    assert best() == VOCAB - 1
    assert best(logit_bias=((4, 2.0), (5, 1.0))) == 4
    assert best(logit_bias=((VOCAB - 1, -1.0),)) == VOCAB - 2
    assert best(allowed_token_ids=(3, 64, 9)) == 64
    assert best(bad_token_ids=(VOCAB - 1, VOCAB - 2)) == VOCAB - 3
    assert best(allowed_token_ids=(3, 64, 9), bad_token_ids=(64,)) == 9


def test_stop_ids_are_masked_until_min_tokens():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[:, 5] = 9.0
    sampling = SamplingParams(temperature=0.0, min_tokens=2)
    slots = load(no_slots(), 0, sampling, prompt=(1, 2, 3), stop=(5,))
    # Positions 3 and 4 hold the first two generated tokens.
    assert draw(slots, logits, np.array([3, 4, 5], np.int32)).tolist() == [0, 0, 5]


def test_logprobs_are_those_of_the_raw_logits():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    sampling = SamplingParams(temperature=0.0, logprobs=5, bad_token_ids=(int(logits[0].argmax()),))
    slots = load(no_slots(), 0, sampling)
    targets = np.array([-1, 17, -2], np.int32)
    out = SAMPLE(logits, slots, np.zeros(3, np.int32), np.zeros(3, np.int32), targets)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    tokens = np.asarray(out.token_ids)
    assert tokens[0] == np.argsort(-logits[0])[1]
    assert tokens[1] == 17
    for row in (0, 1):
        assert np.asarray(out.logprobs)[row] == pytest.approx(exact[row, tokens[row]], abs=1e-5)
        rank = int((logits[row] >= logits[row, tokens[row]]).sum())
        assert np.asarray(out.ranks)[row] == rank
        order = np.argsort(-logits[row], kind="stable")[:20]
        np.testing.assert_array_equal(np.asarray(out.top_ids)[row], order)
        np.testing.assert_allclose(np.asarray(out.top_logprobs)[row], exact[row, order], atol=1e-5)


def test_no_logprobs_are_computed_when_nobody_asks():
    slots = load(no_slots(), 0, SamplingParams(temperature=0.0))
    targets = np.full(1, -1, np.int32)
    zeros = np.zeros(1, np.int32)
    out = SAMPLE(np.ones((1, VOCAB), np.float32), slots, zeros, zeros, targets)
    assert not np.asarray(out.logprobs).any()
    assert not np.asarray(out.top_ids).any()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50), st.integers(1, 50))
def test_threshold_is_the_kth_largest_value_exactly(values, k):
    k = min(k, len(values))
    weights = jnp.asarray(values, jnp.float32)[None]
    threshold = _largest_threshold(weights, lambda kept: kept.sum(-1, dtype=jnp.int32) >= k)
    kth = np.sort(np.asarray(weights[0]))[-k]
    # Subnormal weights may count as zero on some devices; they are never drawn.
    if kth == 0 or kth >= np.finfo(np.float32).tiny:
        assert float(threshold[0, 0]) == kth


def test_loading_a_slot_leaves_the_others_alone():
    full = SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.4,
        min_p=0.1,
        logit_bias=((2, 1.0),),
        bad_token_ids=(9,),
        min_tokens=4,
        presence_penalty=1.0,
    )
    first = load(no_slots(), 1, full, prompt=(3, 4), output=(4, 5), stop=(2,), seed=2**40 + 3)
    second = load(first, 2, SamplingParams(), seed=1)
    for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(before)[1], np.asarray(after)[1])
    reloaded = load(second, 1, SamplingParams(), prompt=(8,))
    counts = np.asarray(reloaded.token_counts)[1]
    assert np.flatnonzero(counts).tolist() == [8]
    assert int(np.asarray(reloaded.flags)[1]) & ~32 == 0  # only USES_RANDOM


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-46])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = np.random.default_rng(0).normal(size=(16, VOCAB)).astype(np.float32)
    slots = load(no_slots(), 0, SamplingParams(temperature=temperature))
    tokens = draw(slots, logits, np.arange(16, dtype=np.int32))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
