"""What decodes that ride with prefill chunks gain, in closed form.

LLaMA-13B on one A6000: a few measured times, published with SARATHI, give the
time of every schedule that matters. A baseline prefills alone and decodes in
batches; decode-maximal batching puts B - 1 decodes beside each chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

PREFILL_S_PER_TOKEN = 0.229e-3
"""Whole prompts, 1024 tokens."""
DECODE_LINEAR_S = 44.3e-3
"""Linear operators of a decode step; the weights' memory traffic."""
HYBRID_LINEAR_S = {256: 69.8e-3, 512: 112.4e-3}
"""Linear operators of a step with that many rows. 512 saturates the device:
half the linear time of 1024 tokens."""
KV_BYTES_PER_TOKEN = 819e3
BYTES_PER_S = 590e9
"""Memory bandwidth that decode attention reaches."""

PUBLISHED = (
    # context, batch, chunk, prompt tokens per output token, gain, decode speed-up
    (1024, 6, 256, 50.0, 1.33, 5.45),
    (2048, 6, 256, 50.0, 1.26, 3.26),
    (3072, 6, 256, 50.0, 1.22, 2.51),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One set-up of the published table, and what the closed form gives."""

    context: int
    batch: int
    chunk: int
    prompt_per_output: float
    gain: float
    """Baseline time over decode-maximal time, end to end."""
    published_gain: float
    decode_speedup: float
    """Time of a decode in a batch over its extra time in a hybrid step."""
    published_decode_speedup: float


def published_cells() -> list[Cell]:
    return [
        Cell(
            context,
            batch,
            chunk,
            ratio,
            gain(context, batch, chunk, ratio),
            published_gain,
            decode_speedup(context, batch),
            published_speedup,
        )
        for context, batch, chunk, ratio, published_gain, published_speedup in PUBLISHED
    ]


def gain(context: int, batch: int, chunk: int, prompt_per_output: float) -> float:
    """Baseline time over decode-maximal time for `batch` requests of that context."""
    output = context / (1 + prompt_per_output)
    prompt = context - output
    kv_s = _kv_s(context, batch)
    baseline_s = batch * PREFILL_S_PER_TOKEN * prompt + output * (DECODE_LINEAR_S + kv_s)
    riders = batch - 1
    num_chunks = batch * _num_chunks(prompt, chunk - riders)
    ridden = num_chunks * riders
    # Decodes that find no chunk to ride with run in batches; with chunks to
    # spare, fewer ride in each, and prompt tokens take their rows.
    left_over = max(0.0, batch * output - ridden)
    if ridden > batch * output:
        riders_each = _riders_each(prompt, output, batch, chunk)
        num_chunks = batch * _num_chunks(prompt, chunk - riders_each)
        riders_share = riders_each / batch
    else:
        riders_share = riders / batch
    hybrid_s = HYBRID_LINEAR_S[chunk] + kv_s * riders_share + kv_s / (2 * batch)
    return baseline_s / (num_chunks * hybrid_s + left_over / batch * (DECODE_LINEAR_S + kv_s))


def decode_speedup(context: int, batch: int) -> float:
    """A batched decode's time over the extra time of one in a hybrid step,
    where it adds its attention and the chunk reads its cache again."""
    kv_s = _kv_s(context, batch)
    alone_s = (DECODE_LINEAR_S + kv_s) / batch
    riding_s = (kv_s * (batch - 1) / batch + kv_s / (2 * batch)) / (batch - 1)
    return alone_s / riding_s


def best_prompt_per_output(context: int, batch: int, chunk: int) -> float:
    """Where the gain peaks, among ratios 1 to 100 in steps of 0.5."""
    ratios = [0.5 * step for step in range(2, 201)]
    return max(ratios, key=lambda ratio: gain(context, batch, chunk, ratio))


def summary() -> dict[str, Any]:
    """JSON values; peaks beside chunk / (batch - 1), where all decodes just ride."""
    peaks = []
    for chunk in HYBRID_LINEAR_S:
        batch = 18
        best = best_prompt_per_output(1024, batch, chunk)
        peaks.append(
            {
                "chunk": chunk,
                "batch": batch,
                "best_prompt_per_output": best,
                "chunk_per_rider": chunk / (batch - 1),
                "gain": gain(1024, batch, chunk, best),
            }
        )
    return {
        "cells": [
            {
                "context": cell.context,
                "batch": cell.batch,
                "chunk": cell.chunk,
                "prompt_per_output": cell.prompt_per_output,
                "gain": cell.gain,
                "published_gain": cell.published_gain,
                "decode_speedup": cell.decode_speedup,
                "published_decode_speedup": cell.published_decode_speedup,
            }
            for cell in published_cells()
        ],
        "peaks": peaks,
    }


def _kv_s(context: int, batch: int) -> float:
    """Reading the cache of the whole batch once."""
    return batch * context * KV_BYTES_PER_TOKEN / BYTES_PER_S


def _num_chunks(prompt: float, rows: float) -> float:
    return math.ceil(prompt / rows)


def _riders_each(prompt: float, output: float, batch: int, chunk: int) -> float:
    """Decodes per chunk when there are more chunks than full sets of riders:
    r with (chunks at chunk - r rows) x r = all decodes."""
    return output * chunk / (prompt + output) if batch > 1 else 0.0
