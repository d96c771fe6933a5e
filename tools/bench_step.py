"""Step-level figures: is the pool aliased, what does sampling cost, and does
attention cost follow the real lengths?

    python tools/bench_step.py [--json]

Ratios within one run; the absolute times depend on the machine. Every step
runs on the real model's shapes with random weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.memory_plan import bytes_per_device
from jaxserve.engine.plan import Chunk, Decodes, SlotLoad, StepPlan
from jaxserve.engine.sampler import sample
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.settings import EngineSettings, resolve_settings
from jaxserve.engine.startup import build_executor
from jaxserve.model_store import resolve
from models.loading import open_model
from models.ops.attention.kv_pool import kv_pool_shape, page_bytes
from models.registry import get_family

NUM_SLOTS = 32
GREEDY = SamplingParams(temperature=0.0)
MIXES: dict[str, Sequence[SamplingParams]] = {
    "greedy": [GREEDY],
    "mixed": [
        GREEDY,
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=50),
        SamplingParams(temperature=1.0, min_p=0.05, frequency_penalty=0.2, logprobs=5),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EngineConfig().model)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small-pool-mb", type=int, default=64)
    parser.add_argument("--large-pool-mb", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = open_model(resolve(args.model)).config
    engine_config = EngineConfig(
        model=args.model,
        kernels="xla",
        buckets=(NUM_SLOTS,),
        max_num_seqs=NUM_SLOTS,
        max_model_len=1024,
    )
    # Decodes run as decode items here, as they do with the default buckets.
    settings = replace(resolve_settings(engine_config, config, jax.devices()[0]), one_bucket=False)
    params = get_family(config.family).init_params(config, jax.random.key(0), settings.dtype)
    figures = {
        **pool_figures(settings, params, args),
        **sampling_figures(settings, params, args.repeats),
        **attention_figures(settings, params, args.repeats),
    }
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:42s} {value:12.4g}")


def pool_figures(
    settings: EngineSettings, params: Any, args: argparse.Namespace
) -> dict[str, float]:
    """Step time with a small and a large pool, alternating; temporaries."""
    one_page = page_bytes(settings.model_config, 16, settings.pool_dtype)
    runs = {}
    for name, megabytes in (("small", args.small_pool_mb), ("large", args.large_pool_mb)):
        num_pages = megabytes * 2**20 // one_page - 1
        # The scheduler's minimum does not bind here: plans are made by hand.
        scheduler = replace(settings.scheduler, num_pages=num_pages, max_model_len=512)
        executor = build_executor(replace(settings, scheduler=scheduler), params)
        runs[name] = decode_step(executor, [32] * NUM_SLOTS)
    times = alternate(runs, args.repeats)
    large_pages = args.large_pool_mb * 2**20 // one_page
    layer = kv_pool_shape(settings.model_config, large_pages, 16, settings.pool_dtype)[1:]
    program = build_executor(settings, params)
    return {
        "step_ms_small_pool": times["small"],
        "step_ms_large_pool": times["large"],
        "large_over_small_pool": times["large"] / times["small"],
        "temporaries_mb": program.programs.temp_bytes / 1e6,
        "one_kv_layer_of_large_pool_mb": float(np.prod(layer)) * settings.pool_dtype.itemsize / 1e6,
        "weights_mb": bytes_per_device(params) / 1e6,
    }


def sampling_figures(settings: EngineSettings, params: Any, repeats: int) -> dict[str, float]:
    """The sampler alone against the whole step, for both mixes."""
    figures = {}
    sampler = jax.jit(sample)
    logits = jax.random.normal(jax.random.key(0), (NUM_SLOTS, settings.model_config.vocab_size))
    rows = jnp.arange(NUM_SLOTS)
    targets = jnp.full(NUM_SLOTS, -1)
    for name, mix in MIXES.items():
        executor = build_executor(settings, params)
        step = decode_step(executor, [128] * NUM_SLOTS, mix)
        step()
        slots = jax.tree.map(jnp.copy, executor.device.slots)

        def only_sample(slots: Any = slots) -> None:
            jax.block_until_ready(sampler(logits, slots, rows, rows, targets))

        times = alternate({"step": step, "sample": only_sample}, repeats)
        figures[f"step_ms_{name}"] = times["step"]
        figures[f"sampler_ms_{name}"] = times["sample"]
        figures[f"sampler_share_{name}"] = times["sample"] / times["step"]
    return figures


def attention_figures(settings: EngineSettings, params: Any, repeats: int) -> dict[str, float]:
    """Total context against time: one long sequence must not make all pay."""
    executor = build_executor(settings, params)
    contexts = {
        "all_16": [16] * NUM_SLOTS,
        "one_1000": [1000] + [16] * (NUM_SLOTS - 1),
        "all_500": [500] * NUM_SLOTS,
        "all_1000": [1000] * NUM_SLOTS,
    }
    times = {
        name: alternate({name: decode_step(executor, lengths)}, repeats)[name]
        for name, lengths in contexts.items()
    }
    return {f"step_ms_context_{name}": value for name, value in times.items()}


def decode_step(
    executor: JaxExecutor, contexts: Sequence[int], mix: Sequence[SamplingParams] = (GREEDY,)
) -> Callable[[], None]:
    """A function that runs one decode step at these context lengths."""
    page_size = executor.tiling.page_size
    chunks, loads, next_page = [], [], 0
    for slot, length in enumerate(contexts):
        count = -(-(length + 1) // page_size)
        pages = tuple(page % executor.num_pages for page in range(next_page, next_page + count))
        next_page += count
        name = f"r{slot}"
        chunks.append(Chunk(name, slot, length, 1, (), True, new_pages=pages))
        loads.append(SlotLoad(slot, name, mix[slot % len(mix)], slot, (0,), (), ()))
    first = StepPlan(0, NUM_SLOTS, Decodes.of(chunks), (), slot_loads=tuple(loads))
    held = (Chunk(c.request_id, c.slot, c.start, 1, (), True, new_pages=()) for c in chunks)
    again = StepPlan(1, NUM_SLOTS, Decodes.of(held), ())

    def load() -> None:
        executor.submit(first)
        executor.next_completion()

    load()

    def run() -> None:
        executor.submit(again)
        executor.next_completion()

    return run


def alternate(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, run in turns so that drift hits all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = perf_counter()
            run()
            times[name].append((perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
