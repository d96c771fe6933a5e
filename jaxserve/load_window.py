"""LoadWindow: what a server did between two of its load reports."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.errors import NotAccepting
from jaxserve.proto.v1 import control_pb2 as pb

MS = 1e3


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of times, in milliseconds, as far as a histogram's bounds tell them; None when nothing was
    counted."""

    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class LoadWindow:
    """Rates and times of a window; a share is None when it would be of nothing."""

    window_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    """That came to an end."""
    refused_per_s: float
    steps_per_s: float
    step_fill: float | None
    """Rows of steps that carried a token."""
    prefix_hits: float | None
    """Prompt tokens that the prefix cache held."""
    num_preemptions: int
    step: Percentiles
    ttft: Percentiles
    itl: Percentiles
    queue: Percentiles

    @classmethod
    def between(
        cls, before: pb.GetLoadResponse, after: pb.GetLoadResponse, window_s: float
    ) -> LoadWindow:
        """Raises NotAccepting if the totals went back."""
        if after.num_steps < before.num_steps or after.num_finished < before.num_finished:
            raise NotAccepting("the server was started anew in between")

        def rate(field: str) -> float:
            return float(getattr(after, field) - getattr(before, field)) / window_s

        def times(field: str) -> Percentiles:
            return _percentiles(getattr(before, field), getattr(after, field))

        return cls(
            window_s=window_s,
            output_tokens_per_s=rate("num_generation_tokens"),
            prompt_tokens_per_s=rate("num_prompt_tokens"),
            requests_per_s=rate("num_finished"),
            refused_per_s=rate("num_refused"),
            steps_per_s=rate("num_steps"),
            step_fill=_share(rate("num_step_tokens"), rate("num_step_rows")),
            prefix_hits=_share(rate("prefix_cache_hits"), rate("prefix_cache_queries")),
            num_preemptions=after.num_preemptions - before.num_preemptions,
            step=times("step_s"),
            ttft=times("ttft_s"),
            itl=times("itl_s"),
            queue=times("queue_s"),
        )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percentiles(before: pb.Histogram, after: pb.Histogram) -> Percentiles:
    counts = [now - earlier for now, earlier in zip(after.counts, before.counts, strict=True)]
    bounds = list(after.upper_bounds)
    p50_ms, p90_ms, p99_ms = (
        None if (value := quantile(bounds, counts, q)) is None else MS * value
        for q in (0.5, 0.9, 0.99)
    )
    return Percentiles(p50_ms, p90_ms, p99_ms)


def quantile(upper_bounds: list[float], counts: list[int], q: float) -> float | None:
    """The value below which a share `q` lies, on a straight line within its bucket, as
    Prometheus' `histogram_quantile` has it; the last bound when it lies above all.

    Args:
        counts: one more than bounds, not cumulative.
    """
    rank = q * sum(counts)
    if rank <= 0:
        return None
    below, floor = 0, 0.0
    for bound, count in zip(upper_bounds, counts, strict=False):
        if below + count >= rank:
            return floor + (bound - floor) * (rank - below) / count
        below, floor = below + count, bound
    return upper_bounds[-1]
