"""`/metrics` for Prometheus and `/health`, on a small HTTP server of its own thread.

Names and buckets are vLLM's with the prefix `jaxserve_`, plus what a compiled
step adds: compilations, fill and step time.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric

import jaxserve
from jaxserve.engine.engine_core import EngineSnapshot
from jaxserve.engine.metrics import Histogram
from jaxserve.server.ports import listen_error
from jaxserve.server.state import ModelCard, Phase, Refusal, ServerState, Serving

REQUEST_TIMEOUT_S = 10.0
"""A client that sends nothing holds a thread no longer than this."""

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
    yield _gauge("kv_cache_pages_free", "Pages that hold nothing", load.num_pages_free)
    yield _gauge(
        "kv_cache_pages_cached", "Pages that only the prefix cache holds", load.num_pages_cached
    )
    yield _counter("num_preemptions", "Requests that lost their pages", load.num_preemptions)
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


class MetricsServer:
    """Listens from `start` to `stop`."""

    def __init__(self, host: str, port: int, state: ServerState) -> None:
        """Takes the port. Raises ConfigError when it cannot be had."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(EngineCollector(state))
        server_class = _Ipv6Server if ":" in host else _Server
        try:
            self._server = make_server(
                host, port, _application(state, registry), server_class, _Handler
            )
        except OSError as error:
            raise listen_error("--http-port", host, port, error) from error
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.05},
            name="jaxserve-http",
            daemon=True,
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _application(state: ServerState, registry: CollectorRegistry) -> Callable[..., Iterable[bytes]]:
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ.get("REQUEST_METHOD")
        if method != "GET":
            return _text(start_response, "405 Method Not Allowed", "GET only\n")
        if path == "/metrics":
            return metrics(environ, start_response)  # type: ignore[no-any-return]
        if path == "/health":
            # Live, which is more than "the process answers": a stuck engine is not.
            phase = state.phase
            status = "503 Service Unavailable" if phase is Phase.DEGRADED else "200 OK"
            return _text(start_response, status, f"{phase}\n")
        return _text(start_response, "404 Not Found", "there are /health and /metrics\n")

    return application


def _text(start_response: Any, status: str, body: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [body.encode()]


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for the host's name, which can
        # take seconds on a machine without a network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Ipv6Server(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""
