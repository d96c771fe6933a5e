"""When requests arrive, in an open loop: nobody waits for an answer first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.errors import ConfigError

_KINDS = ("poisson", "gamma", "replay")


@dataclass(frozen=True, slots=True)
class ArrivalProcess:
    """Gaps between requests, for a rate of one request a second."""

    kind: str = "poisson"
    burstiness: float = 1.0
    """Of gamma gaps: the variance over the squared mean. 1 is Poisson."""
    clip: float | None = None
    """Cuts Poisson gaps at so many means. Without it the rate is exact; with 3,
    as in the public generator of Sarathi-Serve, the true rate is 1.053 times
    the nominal one. For replication only."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(f"--arrivals must be one of {', '.join(_KINDS)}, not {self.kind!r}")
        if self.burstiness <= 0 or (self.clip is not None and self.clip <= 0):
            raise ConfigError("--burstiness and --clip-gaps must be positive")

    def unit_times_s(
        self, num_requests: int, seed: int, trace_s: Sequence[float] | None = None
    ) -> np.ndarray:
        """float [num_requests]: arrival times at a mean rate of about 1/s.

        Divide by the rate: a search over rates then sees the same pattern.
        Raises ConfigError if a replay has no times, or too few.
        """
        if self.kind == "replay":
            return _replayed(num_requests, trace_s)
        # Apart from the lengths' stream, so that both stay the same when one changes.
        rng = np.random.default_rng((seed, 1))
        if self.kind == "gamma":
            gaps = rng.gamma(1 / self.burstiness, self.burstiness, num_requests)
        else:
            gaps = rng.exponential(1.0, num_requests)
        if self.clip is not None:
            gaps = np.minimum(gaps, self.clip)
        times: np.ndarray = np.cumsum(gaps)
        return times


def _replayed(num_requests: int, trace_s: Sequence[float] | None) -> np.ndarray:
    if trace_s is None or len(trace_s) < num_requests:
        have = 0 if trace_s is None else len(trace_s)
        raise ConfigError(
            f"--arrivals replay needs a --trace with arrived_at for {num_requests} requests; it "
            f"has {have}"
        )
    times: np.ndarray = np.sort(np.asarray(trace_s[:num_requests], float))
    times -= times[0]
    if times[-1] <= 0:
        raise ConfigError("--arrivals replay: the trace's requests all arrive at once")
    times *= num_requests / times[-1]
    return times
