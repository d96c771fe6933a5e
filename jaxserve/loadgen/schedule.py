"""Schedule: which requests a load consists of, and when each is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.workloads import Lengths, read_trace, sample_lengths

_CONTEXT = {"arxiv": 16384}
_DEFAULT_CONTEXT = 8192
"""Longest request of a published workload, prompt and output together."""


class PlannedRequest(NamedTuple):
    due_s: float
    """From the start of the run. Nothing that the server does moves it."""
    num_prompt_tokens: int
    num_output_tokens: int
    is_measured: bool
    """False while the rate still rises."""


@dataclass(frozen=True, slots=True)
class LoadShape:
    """What to send: lengths, arrivals and rate."""

    num_requests: int
    qps: float | None
    """None: a replay at the trace's own rate."""
    arrivals: ArrivalProcess
    workload: str = "sharegpt"
    trace: Path | None = None
    """Replaces the workload."""
    fixed_lengths: Lengths | None = None
    """Replaces both."""
    ramp_s: float = 0.0
    """The rate rises from zero in these seconds; requests due then are not measured."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1 or self.ramp_s < 0:
            raise ConfigError("--num-requests must be positive and --ramp-s not negative")
        if self.qps is not None and self.qps <= 0:
            raise ConfigError(f"--qps must be positive, not {self.qps}")
        if self.qps is None and self.arrivals.kind != "replay":
            raise ConfigError("--qps is missing: only --arrivals replay has a rate of its own")
        if self.arrivals.kind == "replay" and self.trace is None:
            raise ConfigError("--arrivals replay needs a --trace with arrived_at")


def make_schedule(shape: LoadShape, max_model_len: int) -> list[PlannedRequest]:
    """Requests by due time, scaled so that the longest fits `max_model_len`.

    The same seed gives the same requests at every rate. Raises ConfigError.
    """
    lengths, trace_s = _lengths(shape, max_model_len)
    unit_s = shape.arrivals.unit_times_s(shape.num_requests, shape.seed, trace_s)
    qps = shape.qps
    if qps is None:
        assert trace_s is not None  # `unit_times_s` has refused a replay without times.
        qps = shape.num_requests / (max(trace_s) - min(trace_s))
    due_s = ramped(unit_s, qps, shape.ramp_s)
    return [
        PlannedRequest(float(time_s), *pair, is_measured=bool(time_s >= shape.ramp_s))
        for time_s, pair in zip(due_s, lengths, strict=True)
    ]


def ramped(unit_s: np.ndarray, qps: float, ramp_s: float) -> np.ndarray:
    """Times at rate 1 -> times at a rate that rises linearly to `qps` in `ramp_s`.

    Args:
        unit_s: float [n], ascending.
    """
    # Expected arrivals by t are qps * t^2 / (2 ramp) in the ramp, qps * (t - ramp / 2) after it.
    in_ramp = unit_s <= qps * ramp_s / 2
    rising: np.ndarray = np.sqrt(2 * ramp_s * unit_s / qps)
    steady: np.ndarray = unit_s / qps + ramp_s / 2
    return np.where(in_ramp, rising, steady)


def scaled(lengths: Sequence[Lengths], factor: float) -> list[Lengths]:
    """Both lengths times a factor below 1, rounded down to at least one token."""
    if factor >= 1:
        return list(lengths)
    return [
        Lengths(max(1, int(prompt * factor)), max(1, int(output * factor)))
        for prompt, output in lengths
    ]


def _lengths(shape: LoadShape, max_model_len: int) -> tuple[list[Lengths], Sequence[float] | None]:
    if shape.fixed_lengths is not None:
        if sum(shape.fixed_lengths) > max_model_len:
            raise ConfigError(
                f"--input-len and --output-len need {sum(shape.fixed_lengths)} tokens; the "
                f"server's --max-model-len is {max_model_len}: lower one or raise the other"
            )
        return [shape.fixed_lengths] * shape.num_requests, None
    if shape.trace is None:
        context = _CONTEXT.get(shape.workload, _DEFAULT_CONTEXT)
        drawn = sample_lengths(
            shape.workload, shape.num_requests, shape.seed, max_model_len=context
        )
        return scaled(drawn, max_model_len / context), None
    recorded, times_s = read_trace(shape.trace)
    if len(recorded) < shape.num_requests:
        raise ConfigError(
            f"--trace {shape.trace} has {len(recorded)} requests: lower --num-requests from "
            f"{shape.num_requests}"
        )
    fitting = scaled(recorded, max_model_len / max(sum(pair) for pair in recorded))
    if shape.arrivals.kind == "replay":
        chosen = list(range(shape.num_requests))
    else:
        rng = np.random.default_rng(shape.seed)
        chosen = rng.choice(len(fitting), shape.num_requests, replace=False).tolist()
    trace_s = None if times_s is None else [times_s[index] for index in chosen]
    return [fitting[index] for index in chosen], trace_s
