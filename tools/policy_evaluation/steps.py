"""Single steps made by hand, timed on the executor alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.plan import Chunk, Decodes, SlotLoad, StepPlan
from jaxserve.engine.sampling_params import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class StepShape:
    """Decodes at one context length, and a chunk after some computed tokens."""

    num_rows_bucket: int
    num_decodes: int = 0
    context: int = 0
    chunk_tokens: int = 0
    chunk_start: int = 0


def time_steps(
    executor: JaxExecutor, shapes: Mapping[str, StepShape], repeats: int
) -> dict[str, np.ndarray]:
    """Seconds of each shape, float [repeats], run in turns so that drift hits all."""
    plans = {name: _plans(executor, shape) for name, shape in shapes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in shapes}
    for index in range(repeats + 1):
        for name, (first, again) in plans.items():
            _run(executor, first)  # Another shape has used the slots meanwhile.
            start_s = perf_counter()
            _run(executor, again)
            if index:  # The first round warms up.
                seconds[name].append(perf_counter() - start_s)
    return {name: np.array(values) for name, values in seconds.items()}


def _run(executor: JaxExecutor, plan: StepPlan) -> None:
    executor.submit(plan)
    executor.next_completion()


def _plans(executor: JaxExecutor, shape: StepShape) -> tuple[StepPlan, StepPlan]:
    """A step that fills the slots, and the same one without the filling."""
    page_size, next_page = executor.tiling.page_size, 0
    decodes: list[Chunk] = []
    prefills: list[Chunk] = []
    loads: list[SlotLoad] = []
    for slot in range(shape.num_decodes + bool(shape.chunk_tokens)):
        is_decode = slot < shape.num_decodes
        start = shape.context if is_decode else shape.chunk_start
        num_tokens = 1 if is_decode else shape.chunk_tokens
        num_pages = -(-(start + num_tokens) // page_size)
        pages = tuple(range(next_page, next_page + num_pages))
        next_page += num_pages
        ids = () if is_decode else (1,) * num_tokens
        chunk = Chunk(f"r{slot}", slot, start, num_tokens, ids, is_decode, new_pages=pages)
        (decodes if is_decode else prefills).append(chunk)
        loads.append(SlotLoad(slot, f"r{slot}", _GREEDY, slot, (1,), (), ()))
    rows = shape.num_rows_bucket
    first = StepPlan(0, rows, Decodes.of(decodes), tuple(prefills), slot_loads=tuple(loads))
    again = StepPlan(
        1,
        rows,
        Decodes.of(chunk._replace(new_pages=()) for chunk in decodes),
        tuple(chunk._replace(new_pages=()) for chunk in prefills),
    )
    return first, again
