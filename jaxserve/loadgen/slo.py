"""ServiceLevel: what an answer must keep to count as good."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.loadgen.records import RequestRecord


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Limits of one request, in seconds; None is no limit."""

    ttft_s: float | None = None
    tbt_s: float | None = None
    """Of the request's own P99: one gap in a hundred may be longer."""

    def __post_init__(self) -> None:
        for name, value in (("--goal-ttft-ms", self.ttft_s), ("--goal-tbt-ms", self.tbt_s)):
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive")

    @classmethod
    def of_ms(cls, *, ttft_ms: float | None, tbt_ms: float | None) -> ServiceLevel:
        return cls(
            ttft_s=None if ttft_ms is None else ttft_ms / 1e3,
            tbt_s=None if tbt_ms is None else tbt_ms / 1e3,
        )

    @property
    def is_set(self) -> bool:
        return self.ttft_s is not None or self.tbt_s is not None

    def is_met_by(self, record: RequestRecord) -> bool:
        """A request that failed meets nothing."""
        if not record.is_ok:
            return False
        if self.ttft_s is not None and record.ttft_s > self.ttft_s:
            return False
        gaps_s = record.tbt_s
        if self.tbt_s is None or not len(gaps_s):
            return True
        return float(np.percentile(gaps_s, 99)) <= self.tbt_s
