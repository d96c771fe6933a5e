"""Load: how busy the server is, as `GetLoad` and `/v1/load` tell it."""

from __future__ import annotations

from typing import TYPE_CHECKING

# Not typing's: before Python 3.12 pydantic cannot read that one.
from typing_extensions import TypedDict

from jaxserve.engine import metrics
from jaxserve.server.state import ServerState

if TYPE_CHECKING:
    from jaxserve.engine.adapter_loader import AdapterLoader


class Histogram(TypedDict):
    upper_bounds: list[float]
    counts: list[int]
    """One more than bounds, not cumulative."""
    sum: float


class AdapterLoad(TypedDict):
    """Field by field the message of this name."""

    name: str
    num_open: int
    num_requests: int


class Load(TypedDict):
    """Field by field the message `GetLoadResponse`."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_pages_free: int
    num_pages_cached: int
    num_pages_total: int
    num_preemptions: int
    num_steps: int
    last_step_age_s: float | None
    num_compiles_after_ready: int
    num_startup_compiles: int
    oldest_waiting_s: float
    num_prompt_tokens: int
    num_generation_tokens: int
    num_finished: int
    num_refused: int
    num_step_rows: int
    num_step_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    step_s: Histogram
    ttft_s: Histogram
    itl_s: Histogram
    queue_s: Histogram
    adapters: list[AdapterLoad]


def load_of(state: ServerState) -> Load:
    """The load now. Runs on the event loop. Raises NotAccepting while the server starts."""
    serving = state.require_serving()
    load, counted = serving.engine.snapshot(), serving.engine.metrics
    return {
        "num_running": load.num_running,
        "num_waiting": load.num_waiting,
        "num_waiting_tokens": load.num_waiting_tokens,
        "num_pages_free": load.num_pages_free,
        "num_pages_cached": load.num_pages_cached,
        "num_pages_total": load.num_pages_total,
        "num_preemptions": load.num_preemptions,
        "num_steps": load.num_steps,
        "last_step_age_s": load.last_step_age_s,
        "num_compiles_after_ready": load.compiles_after_ready,
        "num_startup_compiles": serving.num_startup_compiles,
        "oldest_waiting_s": serving.async_engine.oldest_waiting_s(state.clock()),
        "num_prompt_tokens": counted.num_prompt_tokens,
        "num_generation_tokens": counted.num_generation_tokens,
        "num_finished": sum(counted.num_finished.values()),
        "num_refused": sum(state.num_refused.values()),
        "num_step_rows": counted.num_step_rows,
        "num_step_tokens": counted.num_step_tokens,
        "prefix_cache_queries": load.prefix_cache_queries,
        "prefix_cache_hits": load.prefix_cache_hits,
        "step_s": _histogram(counted.step_seconds),
        "ttft_s": _histogram(counted.time_to_first_token_seconds),
        "itl_s": _histogram(counted.inter_token_latency_seconds),
        "queue_s": _histogram(counted.request_queue_time_seconds),
        "adapters": [] if serving.adapters is None else _adapters(serving.adapters),
    }


def _adapters(adapters: AdapterLoader) -> list[AdapterLoad]:
    num_open = adapters.num_open()
    return [
        {"name": name, "num_open": num_open[name], "num_requests": num_requests}
        for name, num_requests in adapters.names.num_requests().items()
    ]


def _histogram(histogram: metrics.Histogram) -> Histogram:
    return {
        "upper_bounds": list(histogram.upper_bounds),
        "counts": list(histogram.counts),
        "sum": histogram.sum,
    }
