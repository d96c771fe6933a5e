"""What a load generator writes down: times at its own socket."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxserve.loadgen.schedule import PlannedRequest

LATE_S = 0.02
"""A request that leaves later than this after its due time was sent late."""
MAX_LATE_FRACTION = 0.01
MAX_RATE_SHORTFALL = 0.01
MAX_CPU_SHARE = 0.8


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are seconds since the start of the run."""

    planned: PlannedRequest
    sent_s: float = float("nan")
    message_s: list[float] = field(default_factory=list)
    """When each message that brought tokens was read."""
    num_tokens: int = 0
    status: str = "UNFINISHED"
    """OK, or the gRPC status that ended it."""
    queue_s: float | None = None
    """Arrival to first scheduled, as the server's last message tells."""

    @property
    def is_ok(self) -> bool:
        return self.status == "OK" and bool(self.message_s)

    @property
    def ttft_s(self) -> float:
        """From the due time: a late generator makes itself look worse, not better."""
        return self.message_s[0] - self.planned.due_s

    @property
    def e2e_s(self) -> float:
        return self.message_s[-1] - self.planned.due_s

    @property
    def tbt_s(self) -> np.ndarray:
        """Gaps between neighbouring messages with tokens, float [messages - 1].

        The wait for the first token is none of them; the gap that a preemption
        makes is. Tokens of one message are one event: a gap of zero that nobody
        waited for would dilute the percentiles.
        """
        gaps: np.ndarray = np.diff(self.message_s)
        return gaps

    @property
    def tpot_s(self) -> float | None:
        """Mean time a token after the first; None with one token."""
        if self.num_tokens < 2:
            return None
        return (self.message_s[-1] - self.message_s[0]) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """Whether the generator kept to its schedule."""

    cpu_share: float
    """CPU time of the generator over the run's time: 1 is a core."""
    lateness_p50_s: float
    lateness_max_s: float
    late_fraction: float
    """Requests that left more than `LATE_S` after they were due."""
    rate_shortfall: float
    """How much longer than planned it took to send everything, relative."""

    def void_reasons(self) -> list[str]:
        """Why the run says nothing about the server; empty for a good run."""
        reasons = []
        if self.late_fraction > MAX_LATE_FRACTION:
            reasons.append(
                f"{self.late_fraction:.1%} of the requests were sent more than "
                f"{LATE_S * 1e3:g} ms late (at most {MAX_LATE_FRACTION:.0%} may be)"
            )
        if self.rate_shortfall > MAX_RATE_SHORTFALL:
            reasons.append(
                f"sending took {self.rate_shortfall:.1%} longer than scheduled (at most "
                f"{MAX_RATE_SHORTFALL:.0%})"
            )
        if self.cpu_share > MAX_CPU_SHARE:
            reasons.append(
                f"the generator needed {self.cpu_share:.0%} of a core (at most {MAX_CPU_SHARE:.0%})"
            )
        return reasons


@dataclass(frozen=True, slots=True)
class LoadRecord:
    requests: list[RequestRecord]
    elapsed_s: float
    """Until the last answer ended."""
    health: GeneratorHealth


def generator_health(
    requests: list[RequestRecord], cpu_s: float, elapsed_s: float
) -> GeneratorHealth:
    due_s = np.array([request.planned.due_s for request in requests])
    lateness_s = np.array([request.sent_s for request in requests]) - due_s
    span_s = max(float(due_s[-1]), 1e-9)
    return GeneratorHealth(
        cpu_share=cpu_s / elapsed_s,
        lateness_p50_s=float(np.median(lateness_s)),
        lateness_max_s=float(lateness_s.max()),
        late_fraction=float((lateness_s > LATE_S).mean()),
        rate_shortfall=max(0.0, float(lateness_s[-1])) / span_s,
    )
