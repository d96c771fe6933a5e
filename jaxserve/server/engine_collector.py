"""EngineCollector: the engine's figures for Prometheus.

Names and buckets are vLLM's with the prefix `jaxserve_`, plus what a compiled
step adds: compilations, fill and step time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric

import jaxserve
from jaxserve.engine.adapter_loader import AdapterLoader
from jaxserve.engine.engine_core import EngineSnapshot
from jaxserve.engine.metrics import Histogram
from jaxserve.server.state import ModelCard, Phase, Refusal, ServerState, Serving

_HISTOGRAMS = {
    "step_seconds": "What one step took",
    "step_fill_ratio": "Rows of a step that carried a token, over its rows",
    "host_gap_seconds": "How long the device waited for the host before a step",
    "time_to_first_token_seconds": "Arrival to first token",
    "inter_token_latency_seconds": "Between two tokens of a request",
    "request_queue_time_seconds": "Arrival to first scheduled",
    "e2e_request_latency_seconds": "Arrival to last token",
    "request_prompt_tokens": "Prompt tokens of a request",
    "request_generation_tokens": "Output tokens of a request",
}


class EngineCollector:
    """Reads the engine's figures when Prometheus asks."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        yield InfoMetricFamily(
            "jaxserve_build", "The running version", value={"version": jaxserve.__version__}
        )
        yield _gauge("uptime_seconds", "Since the process started", state.uptime_s)
        with contextlib.suppress(RuntimeError):  # Asked elsewhere than on the event loop.
            num_tasks = len(asyncio.all_tasks())
            yield _gauge("event_loop_tasks", "Tasks of the front ends", num_tasks)
        yield _gauge("ready", "1 when new requests are served", state.phase is Phase.READY)
        if state.serving is not None:
            yield from _engine_metrics(state.serving)
        refused = CounterMetricFamily(
            "jaxserve_requests_refused",
            "Requests that were not taken, by reason",
            labels=["reason"],
        )
        for reason in Refusal:
            refused.add_metric([reason.value], state.num_refused[reason])
        yield refused


def _engine_metrics(serving: Serving) -> Iterator[Metric]:
    load, metrics = serving.engine.snapshot(), serving.engine.metrics
    card = serving.card
    if load.num_pages_total:
        yield from _cache_metrics(load, card)
    yield from _weights_metrics(serving)
    if serving.adapters is not None and serving.adapters.max_loras:
        yield from _adapter_metrics(serving.adapters)
    yield _gauge("num_requests_running", "Requests in the running batch", load.num_running)
    yield _gauge("num_requests_waiting", "Requests in the queue", load.num_waiting)
    yield _gauge("num_tokens_waiting", "Prompt tokens in the queue", load.num_waiting_tokens)
    yield _gauge("slots_used", "Slots that hold a running request", load.num_running)
    yield _gauge("slots_total", "Requests that can run at once", card.max_num_seqs)
    if load.last_step_age_s is not None:
        yield _gauge("last_step_age_seconds", "Since the last step", load.last_step_age_s)
    yield _gauge(
        "step_in_flight_seconds",
        "How long the device has been at its step; large when it hangs, 0 when it has none",
        load.step_in_flight_s or 0.0,
    )
    yield _counter("steps", "Completed steps", load.num_steps)
    yield _counter("prompt_tokens", "Prompt tokens processed", metrics.num_prompt_tokens)
    yield _counter("generation_tokens", "Tokens generated", metrics.num_generation_tokens)
    yield _counter(
        "unexpected_compiles",
        "Compilations since the server was ready; healthy is 0",
        load.compiles_after_ready,
    )
    yield _counter(
        "steps_out_of_memory",
        "Steps that the device had no memory for; healthy is 0",
        load.num_steps_out_of_memory,
    )
    compiles = CounterMetricFamily(
        "jaxserve_compiles", "Programs compiled, by phase", labels=["phase"]
    )
    compiles.add_metric(["startup"], serving.num_startup_compiles)
    compiles.add_metric(["serving"], load.compiles_after_ready)
    yield compiles
    finished = CounterMetricFamily(
        "jaxserve_request_success", "Finished requests, by reason", labels=["finished_reason"]
    )
    for reason, count in metrics.num_finished.items():
        finished.add_metric([reason.value], count)
    yield finished
    for name, text in _HISTOGRAMS.items():
        yield _histogram(name, text, getattr(metrics, name))


def _weights_metrics(serving: Serving) -> Iterator[Metric]:
    """Of `serve --watch`; without it the version stays and the counts are 0."""
    swaps = serving.weight_swaps()
    yield InfoMetricFamily(
        "jaxserve_weights",
        "The weights that new requests get",
        value={"version": serving.weights_name()},
    )
    yield _counter("weight_swaps", "Times that newer weights took over", swaps.num_done)
    yield _counter(
        "weight_swaps_refused", "Weights that were not taken: see the log", swaps.num_refused
    )


def _adapter_metrics(adapters: AdapterLoader) -> Iterator[Metric]:
    """Labels are the names of adapters that are loaded, of which there are `max_loras` at most."""
    num_requests, num_open = adapters.names.num_requests(), adapters.num_open()
    yield _gauge("adapters_loaded", "Adapters that requests can name", len(num_requests))
    yield _gauge("adapters_room", "Adapters that there is room for", adapters.max_loras)
    taken = CounterMetricFamily(
        "jaxserve_adapter_requests",
        "Requests taken for an adapter since it was loaded",
        labels=["adapter"],
    )
    running = GaugeMetricFamily(
        "jaxserve_adapter_requests_open",
        "Requests for an adapter that run or wait",
        labels=["adapter"],
    )
    for name, count in num_requests.items():
        taken.add_metric([name], count)
        running.add_metric([name], num_open[name])
    yield taken
    yield running


def _cache_metrics(load: EngineSnapshot, card: ModelCard) -> Iterator[Metric]:
    """Of the keys and values that a model keeps which generates."""
    num_held = load.num_pages_total - load.num_pages_free - load.num_pages_cached
    yield InfoMetricFamily(
        "jaxserve_cache_config",
        "The KV cache",
        value={
            "page_size": str(card.page_size),
            "num_pages": str(card.num_pages),
            "dtype": card.dtype,
        },
    )
    yield _gauge(
        "kv_cache_usage_perc", "Pages in use by requests, 0 to 1", num_held / load.num_pages_total
    )
    yield _gauge("kv_cache_pages_total", "Pages that there are", load.num_pages_total)
    yield _gauge("kv_cache_pages_free", "Pages that hold nothing", load.num_pages_free)
    yield _gauge(
        "kv_cache_pages_cached", "Pages that only the prefix cache holds", load.num_pages_cached
    )
    yield _counter("num_preemptions", "Requests that lost their pages", load.num_preemptions)
    yield _counter("spec_decode_num_drafts", "Drafts that were checked", load.num_drafts)
    yield _counter("spec_decode_num_draft_tokens", "Tokens of these drafts", load.num_draft_tokens)
    yield _counter(
        "spec_decode_num_accepted_tokens", "Drafted tokens that came out", load.num_accepted_tokens
    )
    yield _counter(
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache",
        load.prefix_cache_queries,
    )
    yield _counter(
        "prefix_cache_hits", "Prompt tokens found in the prefix cache", load.prefix_cache_hits
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"jaxserve_{name}", text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"jaxserve_{name}", text, value=value)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets, total = [], 0
    bounds = [*map(str, histogram.upper_bounds), "+Inf"]
    for bound, count in zip(bounds, tuple(histogram.counts), strict=True):
        total += count
        buckets.append((bound, float(total)))
    return HistogramMetricFamily(f"jaxserve_{name}", text, buckets, sum_value=histogram.sum)
