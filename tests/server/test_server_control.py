"""Control service, health service, reflection and the HTTP port."""

from __future__ import annotations

import errno
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from prometheus_client.parser import text_string_to_metric_families

import jaxserve
from jaxserve.errors import ConfigError, InvalidRequest, NotAccepting, QueueFull
from jaxserve.proto.v1 import control_pb2
from jaxserve.server import convert
from jaxserve.server.config import ServerConfig
from jaxserve.server.lifecycle import Server
from jaxserve.server.ports import listen_error
from jaxserve.server.state import Phase
from tests.server.scripted_service import SetClock, wait_for

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_server_info_answers_in_every_state(make_service):
    service = make_service(ready=False)
    info = service.client.server_info()
    assert info.version == jaxserve.__version__
    assert info.state == control_pb2.SERVER_STATE_STARTING
    with pytest.raises(NotAccepting):
        service.client.model_info()
    service.make_ready()
    assert service.client.server_info().state == control_pb2.SERVER_STATE_READY
    assert service.client.server_info().uptime_s > info.uptime_s


def test_advertised_fields_are_what_generate_accepts(service):
    fields = set(service.client.server_info().generate_fields)
    assert set(convert.SETTING_PATHS.values()) < fields
    others = fields - set(convert.SETTING_PATHS.values())
    assert others == {
        "request_id",
        "text.text",
        "text.add_special_tokens",
        "token_ids.ids",
        "chat.messages",
        "cache.cache_salt",
        "adapter",
        "pacing.flush_ms",
        "pacing.flush_tokens",
        "pacing.pad_bytes",
        "pacing.strict",
    }


def test_model_info(service):
    info = service.client.model_info()
    assert (info.name, info.family, info.vocab_size) == ("script", "llama", 258)
    assert (info.max_model_len, info.page_size, info.num_pages) == (512, 16, 128)
    assert (info.bos_token_id, list(info.eos_token_ids)) == (256, [257])
    assert (list(info.buckets), info.token_budget, info.max_num_seqs) == ([4, 32], 32, 4)
    assert info.has_chat_template
    assert info.max_prompt_bytes == 64 << 10
    assert info.weights == "scripted@7"


def test_load_follows_the_requests(service):
    load = service.client.load()
    assert (load.num_running, load.num_waiting, load.num_steps) == (0, 0, 0)
    assert not load.HasField("last_step_age_s")
    service.executor.step_s = 0.01
    calls = [service.client.generate("x" * 20, max_tokens=300) for _ in range(6)]

    def four_run() -> bool:
        nonlocal load
        load = service.client.load()
        return (load.num_running, load.num_waiting) == (4, 2)

    # The last calls may still be on their way, or the first ones not yet in a step.
    wait_for(four_run)
    assert load.num_waiting_tokens == 40
    assert 0 < load.num_pages_free < load.num_pages_total == 128
    assert load.last_step_age_s < 1
    for call in calls:
        call.cancel()
    service.assert_idle()
    assert service.client.load().num_compiles_after_ready == 0


def test_health_by_service_and_watch(make_service):
    service = make_service(ready=False)
    with grpc.insecure_channel(service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        names = ("", "jaxserve.v1.Inference", "jaxserve.v1.Control")
        requests = [health_pb2.HealthCheckRequest(service=name) for name in names]
        assert {stub.Check(request).status for request in requests} == {NOT_SERVING}
        watch = stub.Watch(requests[0])
        assert next(watch).status == NOT_SERVING
        service.make_ready()
        assert next(watch).status == SERVING
        assert {stub.Check(request).status for request in requests} == {SERVING}
        with pytest.raises(grpc.RpcError) as unknown:
            stub.Check(health_pb2.HealthCheckRequest(service="jaxserve.v1.Nothing"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        watch.cancel()


def test_a_stuck_engine_is_degraded(service):
    service.server.state.degraded_after_s = 0.2
    service.executor.gate.clear()  # From the very first step on.
    call = service.client.generate("x", max_tokens=2)
    wait_for(lambda: not service.client.is_serving())
    assert service.client.server_info().state == control_pb2.SERVER_STATE_DEGRADED
    assert _get(service, "/health") == (503, "degraded\n")
    assert _samples(service)["jaxserve_step_in_flight_seconds", ()] > 0.2
    service.executor.gate.set()
    list(call)
    wait_for(service.client.is_serving)
    wait_for(lambda: _samples(service)["jaxserve_step_in_flight_seconds", ()] == 0)


def test_an_idle_time_is_not_held_against_the_next_request(make_service):
    clock = SetClock()
    service = make_service(clock=clock)
    state, executor = service.server.state, service.executor
    state.degraded_after_s = 60.0
    list(service.client.generate("x", max_tokens=2))
    service.assert_idle()
    clock.now_s += 3600.0
    assert state.phase is Phase.READY
    executor.gate.clear()
    num_plans = len(executor.plans)
    call = service.client.generate("x", max_tokens=2)
    wait_for(lambda: len(executor.plans) > num_plans)
    assert state.phase is Phase.READY
    clock.now_s += 59.0
    assert state.phase is Phase.READY
    clock.now_s += 2.0
    assert state.phase is Phase.DEGRADED
    executor.gate.set()
    list(call)
    service.assert_idle()
    assert state.phase is Phase.READY


def test_refused_requests_are_counted_by_reason(make_service):
    service = make_service(ready=False, max_queued_requests=1)
    with pytest.raises(NotAccepting):
        list(service.client.generate("x"))
    service.make_ready()
    for settings in ({"top_p": 2.0}, {"stop": [""]}):
        with pytest.raises(InvalidRequest):
            list(service.client.generate("x", **settings))
    service.executor.step_s = 0.01
    calls = []
    for count in range(1, 5):  # One by one: the queue holds no more.
        calls.append(service.client.generate("o", max_tokens=400))
        wait_for(lambda count=count: service.engine.snapshot().num_running == count)
    calls.append(service.client.generate("o", max_tokens=2))
    wait_for(lambda: service.engine.snapshot().num_waiting == 1)
    with pytest.raises(QueueFull):
        list(service.client.generate("one too many"))
    for call in calls:
        call.cancel()
    service.assert_idle()
    samples = _samples(service)
    counts = {
        reason: samples["jaxserve_requests_refused_total", (("reason", reason),)]
        for reason in ("invalid", "queue_full", "not_accepting")
    }
    assert counts == {"invalid": 2, "queue_full": 1, "not_accepting": 1}


@pytest.mark.parametrize("reflection", [False, True])
def test_reflection_is_opt_in(make_service, reflection):
    service = make_service(server_settings={"reflection": reflection})
    with grpc.insecure_channel(service.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        if reflection:
            assert "jaxserve.v1.Inference" in database.get_services()
        else:
            with pytest.raises(grpc.RpcError) as refusal:
                database.get_services()
            assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_metrics_count_what_happened(service):
    before = _samples(service)
    assert before["jaxserve_num_requests_running", ()] == 0
    assert before["jaxserve_slots_total", ()] == 4
    for length in (3, 4):
        list(service.client.generate("x" * length, max_tokens=10))
    with service.client.generate("x", max_tokens=400, request_id="cut") as call:
        deltas = iter(call)
        assert sum(len(next(deltas).token_ids) for _ in range(20)) > 10
    service.assert_idle()
    after = _samples(service)
    expected = {
        ("jaxserve_prompt_tokens_total", ()): 8,
        ("jaxserve_request_success_total", (("finished_reason", "length"),)): 2,
        ("jaxserve_request_success_total", (("finished_reason", "cancelled"),)): 1,
        ("jaxserve_request_success_total", (("finished_reason", "error"),)): 0,
        ("jaxserve_time_to_first_token_seconds_count", ()): 3,
        ("jaxserve_time_to_first_token_seconds_bucket", (("le", "+Inf"),)): 3,
        ("jaxserve_request_generation_tokens_bucket", (("le", "10.0"),)): 2,
        ("jaxserve_unexpected_compiles_total", ()): 0,
        ("jaxserve_compiles_total", (("phase", "startup"),)): 2,
        ("jaxserve_compiles_total", (("phase", "serving"),)): 0,
        ("jaxserve_ready", ()): 1,
        ("jaxserve_kv_cache_usage_perc", ()): 0,
    }
    assert {key: after.get(key) for key in expected} == expected
    steps = after["jaxserve_steps_total", ()]
    assert steps == len(service.executor.plans)
    assert after["jaxserve_step_seconds_count", ()] == steps
    assert after["jaxserve_step_fill_ratio_count", ()] == steps
    assert after["jaxserve_prefix_cache_queries_total", ()] >= 8
    assert after["jaxserve_generation_tokens_total", ()] > 20


def test_live_and_ready_are_two_questions(make_service):
    service = make_service(ready=False)
    assert _get(service, "/health") == (200, "starting\n")
    assert _get(service, "/health/ready") == (503, "starting\n")
    service.make_ready()
    assert _get(service, "/health") == (200, "ready\n")
    assert _get(service, "/health/ready") == (200, "ready\n")
    assert _get(service, "/nowhere")[0] == 404
    assert _get(service, "/metrics/../health")[0] == 404
    assert _get(service, "/metrics", method="POST")[0] == 405


@pytest.mark.parametrize("flag", ["grpc_port", "http_port"])
def test_a_busy_port_is_an_error_with_its_flag(service, flag):
    busy = getattr(service.server, flag)
    message = _start_error(service, **{flag: busy})
    assert f"127.0.0.1:{busy}: another program uses the port" in message
    assert f"--{flag.replace('_', '-')} (0: any free port)" in message
    assert "--host" not in message
    assert service.client.is_serving()


@pytest.mark.parametrize(
    ("host", "cause"),
    [
        ("nohost.invalid", "cannot be resolved"),
        ("192.0.2.1", "is not an address of this machine"),  # Reserved for documentation.
    ],
)
def test_a_host_that_is_not_this_machine_is_told_from_a_busy_port(service, host, cause):
    message = _start_error(service, host=host)
    assert message.startswith(f"--host {host} {cause}")
    assert "127.0.0.1" in message
    assert "port" not in message


def test_every_cause_has_its_advice():
    denied = listen_error("--grpc-port", "::1", 80, PermissionError(errno.EACCES, "denied"))
    assert "above 1023 with --grpc-port" in str(denied)
    other = listen_error("--http-port", "::1", 80, OSError(errno.ENOBUFS, "no buffers"))
    assert "no buffers" in str(other)
    assert "--http-port or --host" in str(other)


def _start_error(service, **settings) -> str:
    async def start() -> None:
        ports = {"grpc_port": 0, "http_port": 0, "allow_unauthenticated": True}
        server = Server(ServerConfig(**(ports | settings)))
        try:
            await server.start()
        finally:
            await server.stop()

    with pytest.raises(ConfigError) as error:
        service.call(start())
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"grpc_port": -1}, "--grpc-port"),
        ({"http_port": 65536}, "--http-port"),
        ({"grpc_port": 8000}, "--grpc-port and --http-port"),
        ({"drain_timeout_s": -1.0}, "--drain-timeout-s"),
        ({"drain_timeout_s": float("nan")}, "--drain-timeout-s"),
        ({"host": ""}, "--host"),
    ],
)
def test_a_bad_server_config_names_its_flag(fields, flag):
    with pytest.raises(ConfigError, match=flag):
        ServerConfig(**fields)


def _get(service, path: str, method: str = "GET") -> tuple[int, str]:
    url = f"http://127.0.0.1:{service.server.http_port}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _samples(service) -> dict:
    _, text = _get(service, "/metrics")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
