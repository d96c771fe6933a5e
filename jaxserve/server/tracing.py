"""RequestTracer: a trace of each request, for an OpenTelemetry collector.

Names of attributes are those of OpenTelemetry's conventions for generative AI, as far as they have
one. Spans hold counts and times, never texts or token ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import jaxserve
from jaxserve.engine.request import FinishReason, Request, RequestOutput, Usage
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

EXPORT_TIMEOUT_S = 5.0
DEFAULT_PATH = "/v1/traces"
NS = 1e9


class RequestTracer:
    """Makes a request's spans when it ends, on the event loop; a thread of the SDK sends them.

    A collector that is slow or away costs requests nothing: what the SDK's bounded queue cannot
    hold is dropped.

    Args:
        endpoint: URL of the collector; without a path, `/v1/traces` is added.
        clock: the engine's, in seconds.

    Raises ConfigError if OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, clock: Callable[[], float]) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                "--otlp-endpoint needs OpenTelemetry: pip install 'jaxserve[otel]'"
            ) from error
        path = urlsplit(endpoint).path.rstrip("/")
        url = endpoint if path else f"{endpoint.rstrip('/')}{DEFAULT_PATH}"
        version = jaxserve.__version__
        resource = Resource.create({"service.name": "jaxserve", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(url, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxserve", version)
        self._clock = clock
        self._model = ""

    def name_model(self, name: str) -> None:
        """Of the requests from now on."""
        self._model = name

    def ended(self, request: Request, output: RequestOutput) -> None:
        """Makes the spans of a request whose last output this is."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        usage = output.usage
        if usage is None:
            return
        # The engine's clock has no date: the request came so long before now.
        arrival_ns = time.time_ns() - int(NS * (self._clock() - request.arrival_s))
        sent = {"traceparent": request.generation.trace_parent}
        whole = self._tracer.start_span(
            "embed" if output.embedding is not None else "generate",
            # A header that is wrong begins a new trace, as the standard wants.
            context=TraceContextTextMapPropagator().extract(sent),
            kind=trace.SpanKind.SERVER,
            start_time=arrival_ns,
            attributes=self._attributes(request, output, usage),
        )
        if output.finish_reason is FinishReason.ERROR:
            whole.set_status(trace.StatusCode.ERROR)
        within = trace.set_span_in_context(whole)
        for name, start_s, end_s, counts in _stages(request, usage):
            stage: Span = self._tracer.start_span(
                name,
                context=within,
                start_time=arrival_ns + int(NS * start_s),
                attributes=counts,
            )
            stage.end(arrival_ns + int(NS * end_s))
        whole.end(arrival_ns + int(NS * usage.e2e_s))

    def _attributes(
        self, request: Request, output: RequestOutput, usage: Usage
    ) -> Mapping[str, AttributeValue]:
        sampling = request.sampling
        is_embedding = output.embedding is not None
        values: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "embeddings" if is_embedding else "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.response.id": request.request_id,
            "gen_ai.usage.input_tokens": usage.num_prompt_tokens,
            "gen_ai.usage.output_tokens": usage.num_output_tokens,
            "gen_ai.response.finish_reasons": [str(output.finish_reason)],
            "jaxserve.num_preemptions": request.num_preemptions,
        }
        if not is_embedding:
            values |= {
                "gen_ai.request.max_tokens": request.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
            }
        if request.generation.account.tenant:
            values["jaxserve.tenant"] = request.generation.account.tenant
        return values

    def close(self) -> None:
        """Sends what is left, for a bounded time."""
        self._provider.shutdown()


Stage = tuple[str, float, float, Mapping[str, int]]


def _stages(request: Request, usage: Usage) -> Iterator[Stage]:
    """Name, start and end in seconds after the arrival, and counts, of those that it came to."""
    yield "queue", 0.0, usage.queue_s, {}
    if request.first_scheduled_s is None:
        return
    has_output = usage.num_output_tokens > 0
    prefill_end_s = usage.ttft_s if has_output else usage.e2e_s
    counts = {
        "jaxserve.num_tokens": usage.num_prompt_tokens,
        "jaxserve.num_cached_tokens": usage.num_cached_tokens,
    }
    yield "prefill", usage.queue_s, prefill_end_s, counts
    if has_output:
        yield "decode", usage.ttft_s, usage.e2e_s, {"jaxserve.num_tokens": usage.num_output_tokens}
