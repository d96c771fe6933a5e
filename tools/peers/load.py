"""Row: one line of the table, a load of given lengths and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxserve.loadgen.schedule import LoadShape, make_schedule
from jaxserve.simulator.arrivals import ArrivalProcess

MAX_LEN = 1024
"""Longest request of the mixed load, prompt and output together."""
MIXED_REQUESTS_PER_S = 4.0
NUM_MIXED_REQUESTS = 24
FIRST_TOKEN_ID = 1000
"""Smaller ids are mostly of special tokens and of bytes that are no text alone."""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    label: str
    num_requests: int
    num_prompt_tokens: int
    """0: lengths and times of the mixed load."""
    num_output_tokens: int
    counts: str = "output"
    """Which tokens the rate counts: output, prompt, or both."""
    has_busy_process: bool = False
    """Whether another process keeps one core busy meanwhile."""

    @property
    def counts_text(self) -> str:
        """What to print beside the rate, if it isn't the output."""
        return {"output": "", "prompt": "of prompt", "both": "of both"}[self.counts]


ROWS = (
    Row("one", "1 stream, 16 in / 128 out", 1, 16, 128),
    Row("eight", "8 streams, 16 / 64", 8, 16, 64),
    Row("thirtytwo", "32 streams, 16 / 64", 32, 16, 64),
    Row("prefill", "1 prompt of 1024", 1, 1024, 1, counts="prompt"),
    Row("long", "16 streams, 512 / 64", 16, 512, 64, counts="both"),
    Row("mixed", "Azure conversations, Poisson", NUM_MIXED_REQUESTS, 0, 0, counts="both"),
    Row("busy", "8 streams, 16 / 64, one core busy", 8, 16, 64, has_busy_process=True),
)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    due_s: float
    token_ids: tuple[int, ...]
    num_output_tokens: int


def make_load(
    row: Row, round_index: int, vocab_size: int, trace: Path | None = None
) -> list[LoadRequest]:
    """The row's requests, the same for every engine; other prompts in every round, so that no
    cache of prefixes has them."""
    lengths = _mixed(trace) if row.num_prompt_tokens == 0 else _alike(row)
    row_seed = int.from_bytes(row.name.encode(), "little")
    rng = np.random.default_rng((row_seed, round_index))
    return [
        LoadRequest(
            due_s,
            tuple(rng.integers(FIRST_TOKEN_ID, vocab_size, num_prompt).tolist()),
            num_output,
        )
        for due_s, num_prompt, num_output in lengths
    ]


def _alike(row: Row) -> Sequence[tuple[float, int, int]]:
    return [(0.0, row.num_prompt_tokens, row.num_output_tokens)] * row.num_requests


def _mixed(trace: Path | None) -> Sequence[tuple[float, int, int]]:
    """Lengths and times, the same in every round."""
    shape = LoadShape(
        num_requests=NUM_MIXED_REQUESTS,
        qps=MIXED_REQUESTS_PER_S,
        arrivals=ArrivalProcess("poisson"),
        workload="azure_conv",
        trace=trace,
        seed=0,
    )
    return [
        (planned.due_s, planned.num_prompt_tokens, planned.num_output_tokens)
        for planned in make_schedule(shape, MAX_LEN)
    ]
