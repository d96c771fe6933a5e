"""The requests that both engines serve: lengths of a published trace, random tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.simulator.workloads import sample_lengths
from tools.gpu_bench.case import Case


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: it ends after `num_output_tokens`, whatever is drawn."""

    token_ids: tuple[int, ...]
    num_output_tokens: int


def make_requests(case: Case, count: int, seed: int = 0) -> list[Prompt]:
    """The same for every caller, with prompts in common with no other seed's, so that no cache of
    prefixes holds them; a larger count has the smaller one's lengths first."""
    rng = np.random.default_rng(seed)
    lengths = sample_lengths(case.workload, count, 0, max_model_len=case.max_request_tokens)
    return [
        Prompt(
            tuple(rng.integers(0, case.config.vocab_size, length.num_prompt_tokens).tolist()),
            length.num_output_tokens,
        )
        for length in lengths
    ]
