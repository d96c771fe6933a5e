"""What the engine counts: plain numbers that a server may export.

Only the engine's thread writes; any thread may read. A reader may see a step
that is half counted, which a monitor does not mind.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

from jaxserve.engine.request import FinishReason, Usage

STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
HOST_GAP_SECONDS = (0.00001, 0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Bounds of vLLM's metrics of the same names, so that dashboards carry over.
TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5)

DEFAULT_NUM_RECENT_STEPS = 1024


class Histogram:
    """Counts of values by upper bound, like a Prometheus histogram's."""

    def __init__(self, upper_bounds: tuple[float, ...]) -> None:
        self.upper_bounds = upper_bounds
        self.counts = [0] * (len(upper_bounds) + 1)
        """Not cumulative; the last counts values above every bound."""
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.upper_bounds, value)] += times
        self.sum += value * times


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One completed step, for benchmarks and for looking at a stall."""

    step_id: int
    completed_s: float
    """When the loop saw it complete, on the engine's clock."""
    step_s: float
    """From its submission, or the completion of the step before it if that
    was later, to its completion: what the step itself took."""
    host_gap_s: float
    """How long nothing was in flight, with work at hand, before it was
    submitted: from the completion seen before it (or from the arrival that
    ended an idle time) to its submission. 0 when another step was in flight."""
    device_wait_s: float
    """How long the loop then waited for it. Close to 0 all the time means
    that the host, not the device, is the limit."""
    num_tokens: int
    num_rows_bucket: int


@dataclass(slots=True)
class EngineMetrics:
    """Totals since the engine was made."""

    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    step_fill_ratio: Histogram = field(default_factory=lambda: Histogram(FRACTIONS))
    """Rows of a step that carry a token, divided by its bucket's rows."""
    host_gap_seconds: Histogram = field(default_factory=lambda: Histogram(HOST_GAP_SECONDS))
    """`StepRecord.host_gap_s`, one value a step."""
    time_to_first_token_seconds: Histogram = field(default_factory=lambda: Histogram(TTFT_SECONDS))
    inter_token_latency_seconds: Histogram = field(default_factory=lambda: Histogram(ITL_SECONDS))
    """Between two tokens of a request; the first token is not counted."""
    request_queue_time_seconds: Histogram = field(
        default_factory=lambda: Histogram(REQUEST_SECONDS)
    )
    e2e_request_latency_seconds: Histogram = field(
        default_factory=lambda: Histogram(REQUEST_SECONDS)
    )
    request_prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    request_generation_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    num_steps: int = 0
    num_step_tokens: int = 0
    num_step_rows: int = 0
    """Rows of all steps' buckets: `num_step_tokens` over it is the mean fill."""
    num_prompt_tokens: int = 0
    """Of requests whose first token is out, and of texts that have their embeddings."""
    num_generation_tokens: int = 0
    num_finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )
    last_step_s: float | None = None
    """When the last step completed, on the engine's clock."""
    recent_steps: deque[StepRecord] = field(
        default_factory=lambda: deque(maxlen=DEFAULT_NUM_RECENT_STEPS)
    )

    def keep_recent_steps(self, num_steps: int) -> None:
        """Forgets the recent steps and keeps this many from now on."""
        self.recent_steps = deque(maxlen=num_steps)

    def observe_step(self, record: StepRecord) -> None:
        self.num_steps += 1
        self.num_step_tokens += record.num_tokens
        self.num_step_rows += record.num_rows_bucket
        self.last_step_s = record.completed_s
        self.step_seconds.observe(record.step_s)
        self.step_fill_ratio.observe(record.num_tokens / record.num_rows_bucket)
        self.host_gap_seconds.observe(record.host_gap_s)
        self.recent_steps.append(record)

    def observe_tokens(self, num_tokens: int, *, since_last_s: float) -> None:
        """Tokens that follow the first one, `since_last_s` after the last."""
        self.num_generation_tokens += num_tokens
        self.inter_token_latency_seconds.observe(since_last_s / num_tokens, num_tokens)

    def observe_first_tokens(
        self, num_tokens: int, *, num_prompt_tokens: int, ttft_s: float
    ) -> None:
        self.num_prompt_tokens += num_prompt_tokens
        self.num_generation_tokens += num_tokens
        self.time_to_first_token_seconds.observe(ttft_s)

    def observe_embedded(self, num_tokens: int) -> None:
        """A text of this many tokens has its embedding."""
        self.num_prompt_tokens += num_tokens

    def observe_finished(self, reason: FinishReason, usage: Usage) -> None:
        self.num_finished[reason] += 1
        self.request_queue_time_seconds.observe(usage.queue_s)
        self.e2e_request_latency_seconds.observe(usage.e2e_s)
        self.request_prompt_tokens.observe(usage.num_prompt_tokens)
        self.request_generation_tokens.observe(usage.num_output_tokens)
