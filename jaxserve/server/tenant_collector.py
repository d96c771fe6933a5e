"""TenantCollector: what each tenant uses, for Prometheus. Its labels are the names in the keys
file, never anything that a client sends."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from jaxserve.server.access.door import Door

_COUNTERS = {
    "prompt_tokens": "Prompt tokens of a tenant's requests",
    "output_tokens": "Tokens generated for a tenant",
    "cached_tokens": "Prompt tokens that a tenant's requests found in the prefix cache",
}
_NAMES = {"output_tokens": "generation_tokens", "cached_tokens": "prefix_cache_hits"}


class TenantCollector:
    """Gives nothing on a server without keys."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def collect(self) -> Iterator[Metric]:
        if not self._door.ring.asks_for_keys:
            return
        yield CounterMetricFamily(
            "jaxserve_api_keys_reload_failures",
            "Changes of the keys file that were not taken: see the log",
            value=self._door.ring.num_failed_reloads,
        )
        usage = self._door.usage
        for field, text in _COUNTERS.items():
            counter = CounterMetricFamily(
                f"jaxserve_tenant_{_NAMES.get(field, field)}", text, labels=["tenant"]
            )
            for tenant, used in usage.items():
                counter.add_metric([tenant], getattr(used, f"num_{field}"))
            yield counter
        running = GaugeMetricFamily(
            "jaxserve_tenant_requests_open", "Requests that run or wait", labels=["tenant"]
        )
        refused = CounterMetricFamily(
            "jaxserve_tenant_requests_refused",
            "Requests refused by a limit of the tenant",
            labels=["tenant", "limit"],
        )
        for tenant, used in usage.items():
            running.add_metric([tenant], used.num_open)
            for limit, count in used.num_refused.items():
                refused.add_metric([tenant, limit], count)
        yield running
        yield refused
