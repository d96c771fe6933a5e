"""The engine's compiled step: time of a decode and of a hybrid step, and what bounds them.

A decode step cannot be faster than reading every weight and every key and value once; its floor
is those bytes over the measured copy rate. A hybrid step's floor is its arithmetic over the
measured rate of a matrix product. Steps run through the executor as they do in serving: packed on
the host, two in flight.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import jax

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.plan import Chunk, Decodes, SlotLoad, StepPlan
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.settings import EngineSettings, resolve_settings
from jaxserve.engine.startup import build_executor
from models.config import ModelConfig
from tools.gpu_bench.case import Case, num_bytes, random_params

GREEDY = SamplingParams(temperature=0.0)
STEPS_A_RUN = 20
RUNS = 5


def measure(
    case: Case, settings: EngineSettings, rates: dict[str, float], profile: bool
) -> dict[str, Any]:
    """Every step of the case, by name; with `profile`, also its longest kernels."""
    start = perf_counter()
    executor = build_executor(settings, random_params(settings.abstract_params()))
    result: dict[str, Any] = {
        "attention": settings.attention.name,
        "build_s": perf_counter() - start,
        "compile_s": dict(executor.programs.seconds),
        "temp_bytes": executor.programs.temp_bytes,
    }
    for num_seqs, context in case.decodes:
        result[f"decode {num_seqs} x {context}"] = _decode(
            executor, settings, num_seqs, context, rates, profile
        )
    result[f"hybrid {case.hybrid[2]}"] = _hybrid(executor, settings, case, rates, profile)
    return result


def step_settings(case: Case, cache_dir: Path, attention: str) -> EngineSettings:
    """Those of a server, with the case's pool."""
    config = EngineConfig(
        buckets=case.buckets,
        max_num_seqs=case.max_num_seqs,
        max_model_len=case.max_model_len,
        dtype="bfloat16",
        kernels="xla",
        attention=attention,
        compilation_cache_dir=cache_dir,
    )
    settings = resolve_settings(config, case.config, jax.devices()[0])
    scheduler = replace(settings.scheduler, num_pages=case.pool_tokens // settings.tiling.page_size)
    return replace(settings, scheduler=scheduler)


def _decode(
    executor: JaxExecutor,
    settings: EngineSettings,
    num_seqs: int,
    context: int,
    rates: dict[str, float],
    profile: bool,
) -> dict[str, Any]:
    rows = next(size for size in settings.scheduler.buckets if size >= num_seqs)
    plans = _plans(executor, rows, [context] * num_seqs, chunk_rows=0)
    step: dict[str, Any] = _time(executor, *plans)
    step |= _bytes_floor(settings, num_seqs, context, rates, step["step_ms"])
    if profile:
        step["kernels"] = _longest_kernels(executor, plans[1])
    return step


def _hybrid(
    executor: JaxExecutor,
    settings: EngineSettings,
    case: Case,
    rates: dict[str, float],
    profile: bool,
) -> dict[str, Any]:
    num_seqs, context, rows = case.hybrid
    plans = _plans(executor, rows, [context] * num_seqs, chunk_rows=rows - num_seqs)
    step: dict[str, Any] = _time(executor, *plans)
    step |= _matmul_share(settings, case, rates, step["step_ms"])
    if profile:
        step["kernels"] = _longest_kernels(executor, plans[1])
    return step


def _bytes_floor(
    settings: EngineSettings,
    num_seqs: int,
    context: int,
    rates: dict[str, float],
    step_ms: float,
) -> dict[str, float]:
    """A decode step's bytes: all weights but the embedding's, of which few rows are read."""
    weights = settings.abstract_params()
    read = num_bytes({name: part for name, part in weights.items() if name != "embed"})
    read += num_seqs * context * kv_bytes_per_token(settings.model_config)
    floor_ms = read / rates["copy_bytes_per_s"] * 1e3
    return {"bytes": read, "floor_ms": floor_ms, "of_floor": floor_ms / step_ms}


def _matmul_share(
    settings: EngineSettings, case: Case, rates: dict[str, float], step_ms: float
) -> dict[str, float]:
    """A hybrid step's arithmetic: projections, scores and values, head of the rows that sample."""
    num_seqs, context, rows = case.hybrid
    config = settings.model_config
    layers = settings.abstract_params()["layers"]
    per_row = sum(leaf.size for leaf in jax.tree.leaves(layers))
    attended = num_seqs * context + (rows - num_seqs) ** 2 // 2
    flops = 2 * per_row * rows
    flops += 4 * config.num_layers * config.num_heads * config.head_dim * attended
    flops += 2 * (num_seqs + 1) * config.vocab_size * config.hidden_size
    rate = flops / step_ms * 1e3
    return {
        "flop": flops,
        "flop_per_s": rate,
        "of_matmul_peak": rate / rates["matmul_flop_per_s"],
    }


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Keys and values of all layers in bfloat16."""
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def _plans(
    executor: JaxExecutor, rows: int, contexts: Sequence[int], chunk_rows: int
) -> tuple[StepPlan, StepPlan]:
    """The plan that loads the slots and one that can be repeated: each sequence's next token, and
    `chunk_rows` of a prompt in the slot after them."""
    page_size = executor.tiling.page_size
    lengths = [*((length, 1) for length in contexts), *([(0, chunk_rows)] if chunk_rows else [])]
    chunks, loads, next_page = [], [], 0
    for slot, (start, num_tokens) in enumerate(lengths):
        end = next_page + -(-(start + num_tokens) // page_size)
        pages = tuple(page % executor.num_pages for page in range(next_page, end))
        next_page, name = end, f"r{slot}"
        tokens = (0,) * num_tokens if num_tokens > 1 else ()
        chunks.append(Chunk(name, slot, start, num_tokens, tokens, True, new_pages=pages))
        loads.append(SlotLoad(slot, name, GREEDY, slot, (0,), (), ()))
    if next_page > executor.num_pages:
        raise ValueError(f"{next_page} pages are needed, the pool has {executor.num_pages}")
    split = len(contexts)
    held = [chunk._replace(new_pages=()) for chunk in chunks]
    return (
        StepPlan(
            0, rows, Decodes.of(chunks[:split]), tuple(chunks[split:]), slot_loads=tuple(loads)
        ),
        StepPlan(1, rows, Decodes.of(held[:split]), tuple(held[split:])),
    )


def _time(executor: JaxExecutor, first: StepPlan, again: StepPlan) -> dict[str, float]:
    """Milliseconds of a step in a row of steps, and of the host's part of it."""
    executor.submit(first)
    executor.next_completion()
    step_times, host_times = [], []
    for _ in range(RUNS):
        executor.submit(again)
        host_s = 0.0
        start = perf_counter()
        for _ in range(STEPS_A_RUN):
            begun = perf_counter()
            executor.submit(again)
            host_s += perf_counter() - begun
            executor.next_completion()
        step_times.append((perf_counter() - start) / STEPS_A_RUN)
        host_times.append(host_s / STEPS_A_RUN)
        executor.next_completion()
    return {
        "step_ms": median(step_times) * 1e3,
        "step_ms_min": min(step_times) * 1e3,
        "step_ms_max": max(step_times) * 1e3,
        "submit_ms": median(host_times) * 1e3,
    }


def _longest_kernels(executor: JaxExecutor, plan: StepPlan) -> list[tuple[str, float, int]]:
    """Name, microseconds a step and launches a step, by JAX's profiler."""
    num_steps = 3
    spent_us: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(num_steps):
                executor.submit(plan)
                executor.next_completion()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if "/device:GPU" not in plane.name:
                    continue
                for line in plane.lines:
                    if "Stream" not in line.name:
                        continue
                    for event in line.events:
                        spent_us[event.name] += event.duration_ns / 1e3
                        launches[event.name] += 1
    return [
        (name[:100], us / num_steps, launches[name] // num_steps)
        for name, us in spent_us.most_common(30)
    ]
