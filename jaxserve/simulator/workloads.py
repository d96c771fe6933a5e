"""Prompt and output lengths: generators of published traces, and CSV files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.simulator.csv_file import read_csv


class Lengths(NamedTuple):
    """Tokens of one request."""

    num_prompt_tokens: int
    num_output_tokens: int


Sampler = Callable[[np.random.Generator, int], np.ndarray]
"""(rng, count) -> int [count, 2]: prompts and outputs, at least 1 each."""

# P50 and spread of the arXiv summarisation trace with up to 16k tokens, which
# is not public; they meet its published P50 and P90.
_ARXIV_PROMPT = (math.log(7059), 0.4757)
_ARXIV_OUTPUT = (math.log(208), 0.4515)


def sample_lengths(
    workload: str, num_requests: int, seed: int, *, max_model_len: int
) -> list[Lengths]:
    """Independent requests of a named workload, none longer than `max_model_len`.

    The same seed gives the same requests; a larger count gives more after the
    same ones. Raises ConfigError for a name that is not known.
    """
    sampler = _find_sampler(workload)
    rng = np.random.default_rng(seed)
    lengths: list[Lengths] = []
    while len(lengths) < num_requests:
        pairs = sampler(rng, 256)
        fits = pairs[pairs.sum(axis=1) <= max_model_len]
        if not len(fits):
            raise ConfigError(
                f"no request of {workload} fits --max-model-len {max_model_len}: raise it"
            )
        lengths += [Lengths(prompt, output) for prompt, output in fits.tolist()]
    return lengths[:num_requests]


def workload_names() -> list[str]:
    return [*_quantile_tables()["tables"], "arxiv"]


def zipf_lengths(
    num_requests: int, seed: int, *, least: int, most: int, theta: float, prompt_share: float
) -> list[Lengths]:
    """Total lengths k in [least, most] with P(k) proportional to 1 / k**theta.

    `prompt_share` prompt tokens come to one output token.
    """
    totals = np.arange(least, most + 1)
    weights = totals.astype(float) ** -theta
    rng = np.random.default_rng(seed)
    drawn = rng.choice(totals, num_requests, p=weights / weights.sum())
    outputs = np.maximum(1, np.round(drawn / (1 + prompt_share)).astype(int))
    return [
        Lengths(int(total - output), int(output))
        for total, output in zip(drawn, outputs, strict=True)
    ]


def read_trace(path: Path) -> tuple[list[Lengths], list[float] | None]:
    """A CSV with num_prefill_tokens and num_decode_tokens; times if it has arrived_at.

    Raises ConfigError if it can't be read or a column is missing.
    """
    rows = read_csv(path)
    for column in ("num_prefill_tokens", "num_decode_tokens"):
        if not rows or column not in rows[0]:
            raise ConfigError(
                f"--trace {path} has no column {column}: it needs num_prefill_tokens and "
                "num_decode_tokens, and arrived_at (seconds) to replay its arrivals"
            )
    try:
        lengths = [
            Lengths(int(float(row["num_prefill_tokens"])), int(float(row["num_decode_tokens"])))
            for row in rows
        ]
        if "arrived_at" not in rows[0]:
            return lengths, None
        return lengths, [float(row["arrived_at"]) for row in rows]
    except ValueError as error:
        raise ConfigError(f"--trace {path} holds something that is no number: {error}") from error


def _find_sampler(workload: str) -> Sampler:
    if workload == "arxiv":
        return _sample_arxiv
    tables = _quantile_tables()
    if workload not in tables["tables"]:
        raise ConfigError(
            f"--workload must be one of {', '.join(workload_names())}, not {workload!r}"
        )
    table = tables["tables"][workload]
    levels = np.array(tables["levels_percent"]) / 100
    prompts, outputs = np.array(table["prompt_tokens"]), np.array(table["output_tokens"])

    def sample(rng: np.random.Generator, count: int) -> np.ndarray:
        uniform = rng.random((count, 2))
        prompt = np.interp(uniform[:, 0], levels, prompts)
        return _whole_tokens(prompt, np.interp(uniform[:, 1], levels, outputs))

    return sample


def _sample_arxiv(rng: np.random.Generator, count: int) -> np.ndarray:
    return _whole_tokens(rng.lognormal(*_ARXIV_PROMPT, count), rng.lognormal(*_ARXIV_OUTPUT, count))


def _whole_tokens(prompts: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """int [count, 2], at least 1 each."""
    pairs: np.ndarray = np.stack([prompts, outputs], axis=1).round()
    whole: np.ndarray = pairs.clip(min=1).astype(int)
    return whole


def _quantile_tables() -> dict[str, dict[str, dict[str, list[int]]]]:
    text = (resources.files("jaxserve.simulator") / "data" / "traces.json").read_text("utf-8")
    tables: dict[str, dict[str, dict[str, list[int]]]] = json.loads(text)
    return tables
