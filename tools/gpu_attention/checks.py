"""Is the Triton attention right on this GPU, and are its bits a row's own?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from tools import attention_cases
from tools.attention_cases import BATTERY, Case
from tools.gpu_attention.loads import PAGE
from tools.gpu_attention.step import make_attention, run_case, run_step, write_and_attend

NUM_THREADS = 8
"""XLA compiles the cases' programs side by side."""
SHORT_BATTERY = ("llama-3-8b", "gemma-3, traced window", "head dim 80, float32")


def battery(
    capability: int, compiled_for: int | None = None, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Relative error of each case, or of those of `names`; `failures` says what is wrong."""
    attention = make_attention(capability, compiled_for)
    label = "" if compiled_for is None else f"sm_{compiled_for} "
    results: dict[str, Any] = {"failures": []}

    def try_case(case: Case) -> str:
        tiling = attention.tiling(case.page_size, case.num_heads, case.num_kv_heads)
        inputs = attention_cases.build(case, tiling, np.random.default_rng(0))
        return f"{attention_cases.check(case, partial(run_case, attention), inputs):.2e}"

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        cases = [case for case in BATTERY if names is None or case.name in names]
        outcomes = [(case, threads.submit(try_case, case)) for case in cases]
        for case, outcome in outcomes:
            error = outcome.exception()
            if error is None:
                results[case.name] = outcome.result()
            else:
                results["failures"].append(f"{label}{case.name}: {str(error)[:300]}")
    return results


def check_bits(capability: int) -> dict[str, Any]:
    """A sequence alone and among others, in another slot, on other pages: the same bits."""
    attention = make_attention(capability)
    mixed = BATTERY[0]
    tiling = attention.tiling(PAGE, mixed.num_heads, mixed.num_kv_heads)
    together = attention_cases.build(mixed, tiling, np.random.default_rng(1))
    step = jax.jit(partial(write_and_attend, attention, mixed, tiling))
    out, _ = run_step(step, mixed, together)
    results: dict[str, Any] = {"failures": []}
    for index, sequence in enumerate(mixed.sequences):
        # Slots and the table's width stay the program's: only the company changes.
        others = attention_cases.Sequence(1)
        alone = dataclasses.replace(
            mixed,
            name=f"{sequence}",
            sequences=tuple(
                sequence if i == index else others for i in range(len(mixed.sequences))
            ),
        )
        rng = np.random.default_rng(2 + index)
        shape = (1, 2, mixed.num_kv_heads, mixed.head_dim)
        dtype = together.contexts[0].dtype
        contexts = tuple(
            together.contexts[i] if i == index else rng.normal(size=shape).astype(dtype)
            for i in range(len(mixed.sequences))
        )
        alone = dataclasses.replace(alone, table_pages=mixed.max_pages)
        inputs = attention_cases.build(alone, tiling, rng, contexts)
        inputs.q[inputs.rows[index]] = together.q[together.rows[index]]
        again, _ = run_step(step, alone, inputs)
        same = np.array_equal(again[inputs.rows[index]], out[together.rows[index]])
        results[f"{sequence}"] = "same bits" if same else "OTHER BITS"
        if not same:
            results["failures"].append(f"bits: {sequence} depends on its neighbours")
    return results
