"""Traces of requests, as a collector gets them over a real socket."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.convert import generate_request
from jaxserve.server.lifecycle import Server
from tests.security.keys import bearer, client_of, keyed_service, write_keys
from tests.server.http.raw_http import post
from tests.server.scripted_service import start_service, wait_for

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACE_PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
CANARY = "canary4711"


class Collector(HTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self):
        """All spans, by the name of the service that sent them."""
        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                assert names["service.name"] == "jaxserve"
                for scope in resource.scope_spans:
                    found += scope.spans
        return found


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append(body)
        self.server.paths.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.shutdown()
    collector.server_close()


def attributes(span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_requests_of_both_front_ends_have_traces(collector):
    service = start_service(server_settings={"otlp_endpoint": collector.url})
    service.make_ready()
    try:
        request = generate_request(CANARY, request_id="one", max_tokens=5)
        call = service.client._inference.Generate(
            request, metadata=(("traceparent", TRACE_PARENT),), timeout=60
        )
        assert len(list(call)) > 0
        body = {"prompt": CANARY, "max_tokens": 3}
        headers = {"traceparent": TRACE_PARENT, "x-request-id": "two"}
        assert post(service, "/v1/completions", body, headers)[0] == 200
        headers = {"traceparent": "nonsense", "x-request-id": "three"}
        assert post(service, "/v1/completions", body, headers)[0] == 200
    finally:
        service.close()  # Sends what is left.
    assert set(collector.paths) == {"/v1/traces"}
    spans = collector.spans()
    wholes = {attributes(s)["gen_ai.response.id"]: s for s in spans if s.name == "generate"}
    assert set(wholes) == {"one", "two", "three"}
    for name in ("one", "two"):
        assert wholes[name].trace_id.hex() == TRACE_ID
        assert wholes[name].parent_span_id.hex() == PARENT_ID
    assert wholes["three"].trace_id.hex() != TRACE_ID
    assert wholes["three"].parent_span_id == b""
    seen = attributes(wholes["one"])
    assert seen["gen_ai.request.model"] == "script"
    assert seen["gen_ai.usage.input_tokens"] == len(CANARY)
    assert seen["gen_ai.usage.output_tokens"] == seen["gen_ai.request.max_tokens"] == 5
    assert "jaxserve.tenant" not in seen
    for whole in wholes.values():
        stages = [s for s in spans if s.parent_span_id == whole.span_id]
        assert [s.name for s in stages] == ["queue", "prefill", "decode"]
        assert {s.trace_id for s in stages} == {whole.trace_id}
        times = [whole.start_time_unix_nano]
        for stage in stages:
            assert stage.start_time_unix_nano == times[-1]
            times.append(stage.end_time_unix_nano)
        assert times == sorted(times)
        assert times[-1] == whole.end_time_unix_nano
    assert not any(CANARY.encode() in body for body in collector.bodies)


def test_what_never_ran_has_waited_and_a_tenant_has_its_name(collector, tmp_path):
    keys = write_keys(tmp_path / "keys.toml")
    service = keyed_service(keys, otlp_endpoint=f"{collector.url}/elsewhere/v1/traces")
    try:
        assert post(service, "/v1/completions", {"prompt": "x"}, bearer("alpha"))[0] == 200
        service.executor.gate.clear()
        with client_of(service, "beta") as client:
            calls = [client.generate("x", request_id=f"r{index}") for index in range(6)]
            wait_for(lambda: service.num_streams() == 6, 30)
            # Four can run, so two wait when their ends have come to the engine.
            assert all(client.abort(f"r{index}") for index in range(6))
            service.executor.gate.set()
            for call in calls:
                list(call)
        service.assert_idle(30)
    finally:
        service.close()
    assert set(collector.paths) == {"/elsewhere/v1/traces"}
    spans = collector.spans()
    wholes = [s for s in spans if s.name == "generate"]
    tenants = [attributes(s)["jaxserve.tenant"] for s in wholes]
    assert sorted(tenants) == ["alpha"] + ["beta"] * 6
    names = [[s.name for s in spans if s.parent_span_id == whole.span_id] for whole in wholes]
    assert ["queue"] in names


def test_a_collector_that_is_away_holds_up_nobody(caplog):
    closed = HTTPServer(("127.0.0.1", 0), _Handler)
    url = f"http://127.0.0.1:{closed.server_port}"
    closed.server_close()
    service = start_service(server_settings={"otlp_endpoint": url})
    service.make_ready()
    try:
        for _ in range(5):
            assert len(list(service.client.generate(CANARY, max_tokens=2))) > 0
        service.assert_idle(30)
    finally:
        service.close()
    assert CANARY not in caplog.text


def test_without_its_packages_only_the_option_is_refused(monkeypatch, make_service):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    service = make_service()
    assert len(list(service.client.generate("x", max_tokens=2))) > 0
    with pytest.raises(ConfigError, match=r"pip install 'jaxserve\[otel\]'"):
        Server(ServerConfig(otlp_endpoint="http://127.0.0.1:4318"))


@pytest.mark.parametrize("url", ["", "127.0.0.1:4318", "ftp://x", "http://", "http://x:99999"])
def test_a_bad_url_is_refused(url):
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        ServerConfig(otlp_endpoint=url)
