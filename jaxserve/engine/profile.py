"""Profile: how long steps of the compiled buckets take, from plans made by hand.

A minute at start-up at most; the plans hold zeros, whose arithmetic takes as
long as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

from jaxserve.engine.executor import Executor
from jaxserve.engine.plan import Chunk, Decodes, SlotLoad, StepPlan
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.step_features import StepFeatures

LIMIT_S = 60.0
_NUM_REPEATS = 3


def measure_steps(
    config: SchedulerConfig,
    executor: Executor,
    *,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = perf_counter,
) -> list[tuple[StepFeatures, float]]:
    """(totals, seconds) of steps in every bucket, small ones first.

    Large buckets that would go beyond `limit_s` are left out. The executor
    must be idle; slots and pages hold nothing of use afterwards.
    """
    start_s = clock()
    samples: list[tuple[StepFeatures, float]] = []
    for rows in config.buckets:
        mixes = _mixes(config, rows)
        if samples:
            slowest_s = samples[-1][1] * rows / samples[-1][0].num_rows_bucket
            expected_s = slowest_s * len(mixes) * (_NUM_REPEATS + 1)
            if clock() - start_s + expected_s > limit_s:
                break
        for decodes, chunks in mixes:
            samples.append(_measure(config, executor, rows, decodes, chunks, clock))
    return samples


_Mix = tuple[Sequence[int], Sequence[tuple[int, int]]]
"""Positions of the decodes; (start, tokens) of the chunks."""


def _mixes(config: SchedulerConfig, rows: int) -> list[_Mix]:
    """Full steps of that many rows, with little and with much attention."""
    longest = config.max_model_len - 1
    num_decodes = min(rows, config.max_num_seqs)
    # All sequences together have no more context than the pool holds.
    far = min(longest - 1, config.num_pages * config.page_size // num_decodes - 1)
    near = min(config.page_size, far)
    mixes: list[_Mix] = []
    if num_decodes == rows:
        mixes += [([near] * num_decodes, ()), ([far] * num_decodes, ())]
    num_beside = num_decodes // 2
    for position, is_far in ((near, False), (far, False), (near, True)):
        chunks = _chunks(rows - num_beside, longest, num_decodes - num_beside, is_far=is_far)
        mixes.append(([position] * num_beside, chunks))
    return mixes


def _chunks(
    num_tokens: int, longest: int, max_chunks: int, *, is_far: bool
) -> list[tuple[int, int]]:
    """Chunks of `num_tokens` in all: as few as possible, at the start of their
    sequence or at its end."""
    chunks: list[tuple[int, int]] = []
    while num_tokens > 0 and len(chunks) < max_chunks:
        length = min(num_tokens, longest)
        chunks.append((longest - length if is_far else 0, length))
        num_tokens -= length
    return chunks


def _measure(
    config: SchedulerConfig,
    executor: Executor,
    rows: int,
    decodes: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    clock: Callable[[], float],
) -> tuple[StepFeatures, float]:
    plan, again = _plans(config, rows, decodes, chunks)
    seconds = []
    for run in (plan, *[again] * _NUM_REPEATS):  # The first loads the slots.
        start_s = clock()
        executor.submit(run)
        executor.next_completion()
        seconds.append(clock() - start_s)
    return StepFeatures.of(plan), median(seconds[1:])


def _plans(
    config: SchedulerConfig,
    rows: int,
    decodes: Sequence[int],
    chunks: Sequence[tuple[int, int]],
) -> tuple[StepPlan, StepPlan]:
    """A step that loads its slots, and the same step once they are loaded."""
    loads, first, next_page = [], [], 0
    sequences = [(position, 1, True) for position in decodes]
    sequences += [(start, num_tokens, False) for start, num_tokens in chunks]
    for slot, (start, num_tokens, is_decode) in enumerate(sequences):
        num_pages = -(-(start + num_tokens) // config.page_size)
        # Sequences may overlap in the pool: nobody reads what they compute.
        pages = tuple(page % config.num_pages for page in range(next_page, next_page + num_pages))
        next_page += num_pages
        name = f"profile-{slot}"
        greedy = SamplingParams(temperature=0.0)
        prompt = (0,) * (start + num_tokens)
        loads.append(SlotLoad(slot, name, greedy, 0, prompt, (), ()))
        token_ids = () if is_decode else (0,) * num_tokens
        first.append(Chunk(name, slot, start, num_tokens, token_ids, True, pages))
    again = [chunk._replace(new_pages=()) for chunk in first]
    count = len(decodes)
    return (
        StepPlan(0, rows, Decodes.of(first[:count]), tuple(first[count:]), tuple(loads)),
        StepPlan(1, rows, Decodes.of(again[:count]), tuple(again[count:])),
    )
