"""How busy the server is: GetLoad and /v1/load tell the same, and what they tell is so."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict

from jaxserve.proto.v1 import control_pb2
from jaxserve.server.load import Load
from tests.server.http.raw_http import ask
from tests.server.scripted_service import wait_for


def test_totals_and_histograms_count_what_was_served(service):
    for _ in range(3):
        list(service.client.generate("hello", max_tokens=5, temperature=0))
    service.assert_idle()
    load = service.client.load()
    assert (load.num_prompt_tokens, load.num_generation_tokens, load.num_finished) == (15, 15, 3)
    assert [sum(part.counts) for part in (load.ttft_s, load.itl_s, load.queue_s)] == [3, 12, 3]
    assert sum(load.step_s.counts) == load.num_steps
    assert 0 < load.num_step_tokens <= load.num_step_rows
    assert len(load.step_s.counts) == len(load.step_s.upper_bounds) + 1
    assert load.num_startup_compiles == 2
    assert load.oldest_waiting_s == 0


def test_the_age_of_the_queue_is_that_of_its_first(service):
    service.executor.gate.clear()
    calls = [service.client.generate("x", max_tokens=2) for _ in range(6)]
    wait_for(lambda: service.num_streams() == 6, 30)
    # Four can run, so two wait at least; the device does not move.
    before_s = service.client.load().oldest_waiting_s
    assert before_s > 0
    wait_for(lambda: service.client.load().oldest_waiting_s > before_s + 0.05, 30)
    service.executor.gate.set()
    for call in calls:
        list(call)
    assert service.client.load().oldest_waiting_s == 0


def test_http_tells_the_same(service):
    list(service.client.generate("hello", max_tokens=5))
    service.assert_idle()
    status, headers, reply = ask(service, "GET", "/v1/load")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert (reply["state"], reply["model"]) == ("ready", "script")
    message = service.client.load()
    reply["load"]["last_step_age_s"] = message.last_step_age_s
    assert control_pb2.GetLoadResponse(**reply["load"]) == message
    assert set(MessageToDict(message, preserving_proto_field_name=True)) <= set(reply["load"])


def test_both_have_the_same_fields():
    fields = {field.name for field in control_pb2.GetLoadResponse.DESCRIPTOR.fields}
    assert fields == set(Load.__annotations__)


def test_there_is_no_load_before_the_engine(make_service):
    assert ask(make_service(ready=False), "GET", "/v1/load")[0] == 503
