"""Streaming over a real socket: deltas, options, cancellation, deadlines, overload."""

from __future__ import annotations

import threading
import time

import grpc
import pytest

from jaxserve.client import Client
from jaxserve.engine.request import FinishReason
from jaxserve.errors import NotAccepting, QueueFull
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.proto.v1 import inference_pb2_grpc
from tests.server.scripted_service import text_from, wait_for


def test_deltas_concatenate_to_the_whole(service):
    outputs = list(service.client.generate("hello", max_tokens=100))
    assert "".join(output.text for output in outputs) == text_from(5, 100)
    assert sum(len(output.token_ids) for output in outputs) == 100
    assert len(outputs) > 50
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert all(output.usage is None for output in outputs[:-1])
    last = outputs[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert (last.usage.num_prompt_tokens, last.usage.num_output_tokens) == (5, 100)
    assert 0 < last.usage.ttft_s <= last.usage.e2e_s
    service.assert_idle()


def test_every_kind_of_prompt_gives_the_same(service):
    client = service.client
    ids = client.tokenize("<user>hi<assistant>")
    messages = [{"role": "user", "content": "hi"}]
    assert client.tokenize(messages) == ids
    texts = [
        "".join(output.text for output in client.generate(prompt, max_tokens=9))
        for prompt in ("<user>hi<assistant>", ids, messages)
    ]
    assert texts == [text_from(len(ids), 9)] * 3


def test_stop_string_ends_the_answer_before_it(service):
    outputs = list(service.client.generate("x", stop=["fox"], max_tokens=60))
    assert "".join(output.text for output in outputs) == "he quick brown "
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_match == "fox"
    service.assert_idle()


def test_stop_token_is_named(service):
    comma = service.client.tokenize(";")[0]
    outputs = list(service.client.generate("x", stop_token_ids=[comma], max_tokens=60))
    assert outputs[-1].stop_match == comma
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_logprobs_of_output_and_prompt(service):
    prompt = "p" * 100
    outputs = list(service.client.generate(prompt, logprobs=2, prompt_logprobs=3, max_tokens=4))
    with_logprobs = [entry for output in outputs for entry in output.logprobs]
    ids = [token_id for output in outputs for token_id in output.token_ids]
    assert [entry.token_id for entry in with_logprobs] == ids
    assert all(len(entry.top) == 2 and entry.rank == 1 for entry in with_logprobs)
    of_prompt = [entry for output in outputs for entry in output.prompt_logprobs]
    assert [entry.token_id for entry in of_prompt] == service.client.tokenize(prompt)[1:]
    assert all(len(entry.top) == 3 for entry in of_prompt)
    first_output = next(i for i, output in enumerate(outputs) if output.token_ids)
    assert not any(output.prompt_logprobs for output in outputs[first_output + 1 :])


def test_no_logprobs_unless_asked(service):
    outputs = list(service.client.generate("x", max_tokens=4))
    assert not any(output.logprobs or output.prompt_logprobs for output in outputs)


def test_request_id_comes_from_field_then_metadata(service):
    call = service.client.generate("x", max_tokens=1, request_id="mine")
    assert call.request_id == "mine"
    assert {output.request_id for output in call} == {"mine"}
    with grpc.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(text=pb.TextPrompt(text="x"))
        request.stopping.max_tokens = 1
        raw = stub.Generate(request, metadata=[("x-request-id", "from-metadata")])
        assert ("x-request-id", "from-metadata") in raw.initial_metadata()
        made = {dict(stub.Generate(request).initial_metadata())["x-request-id"] for _ in range(2)}
    assert len(made) == 2


def test_two_clients_stream_at_once(service):
    service.executor.step_s = 0.002
    texts: dict[int, str] = {}

    def run(length: int) -> None:
        with Client(service.address) as client:
            texts[length] = "".join(o.text for o in client.generate("y" * length, max_tokens=60))

    threads = [threading.Thread(target=run, args=(length,)) for length in (3, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {length: text_from(length, 60) for length in (3, 40)}
    assert any(len(plan.decodes) == 2 for plan in service.executor.plans)


@pytest.mark.parametrize("stage", ["queue", "prefill", "decode"])
def test_cancel_frees_pages_within_two_steps(service, stage):
    executor, client = service.executor, service.client
    others = []
    if stage == "queue":
        executor.step_s = 0.005
        others = [client.generate("o", max_tokens=400) for _ in range(4)]
        wait_for(lambda: service.engine.snapshot().num_running == 4)
    if stage == "prefill":
        executor.gate.clear()
    if stage == "decode":
        executor.step_s = 0.01
    call = client.generate("p" * 200, max_tokens=300)
    if stage == "queue":
        wait_for(lambda: service.engine.snapshot().num_waiting == 1)
    elif stage == "prefill":
        wait_for(lambda: service.engine.snapshot().num_running == 1)
    else:
        next(iter(call))
        executor.gate.clear()
    held = service.held_pages()
    call.cancel()
    if stage == "queue":
        wait_for(lambda: service.engine.snapshot().num_waiting == 0)
    else:
        assert held > 0
        wait_for(lambda: service.engine._inbox._ends)
        num_plans = len(executor.plans)
        executor.gate.set()
        service.assert_idle()
        # The loop may have planned two more before it looked at its inbox.
        assert len(executor.plans) - num_plans <= 2
    for other in others:
        other.cancel()
    service.assert_idle()


def test_deadline_ends_a_running_request(service):
    service.executor.step_s = 0.01
    call = service.client.generate("x", max_tokens=500, timeout_s=0.3)
    start_s = time.monotonic()
    with pytest.raises(TimeoutError):
        list(call)
    assert time.monotonic() - start_s < 4.5  # The 500 steps would take 5 s.
    service.assert_idle(timeout_s=1.0)


def test_deadline_ends_a_waiting_request(service):
    service.executor.step_s = 0.01
    running = [service.client.generate("o", max_tokens=400) for _ in range(4)]
    wait_for(lambda: service.engine.snapshot().num_running == 4)
    with pytest.raises(TimeoutError):
        list(service.client.generate("late", timeout_s=0.2))
    wait_for(lambda: service.engine.snapshot().num_waiting == 0, 0.5)
    assert service.engine.snapshot().num_running == 4
    for call in running:
        call.cancel()
    service.assert_idle()


def test_overload_is_refused_and_recovers(service):
    service.executor.step_s = 0.01
    calls = [service.client.generate("o", max_tokens=400) for _ in range(4)]
    wait_for(lambda: service.engine.snapshot().num_running == 4)
    calls += [service.client.generate("o", max_tokens=2) for _ in range(8)]
    wait_for(lambda: service.engine.snapshot().num_waiting == 8)
    with pytest.raises(QueueFull) as refusal:
        list(service.client.generate("one too many"))
    status = refusal.value.__cause__
    assert status.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(status.trailing_metadata())["retry-after-ms"]) > 0
    service.executor.step_s = 0.0
    for call in calls:
        assert list(call)[-1].finish_reason is FinishReason.LENGTH
    assert list(service.client.generate("now", max_tokens=2))
    service.assert_idle()


def test_abort_matches_the_exact_id_only(service):
    service.executor.step_s = 0.005
    call = service.client.generate("x", max_tokens=400, request_id="abc")
    deltas = iter(call)
    next(deltas)
    assert not service.client.abort("ab")
    assert not service.client.abort("abcd")
    assert service.client.abort("abc")
    assert list(deltas)[-1].finish_reason is FinishReason.CANCELLED
    assert not service.client.abort("abc")
    service.assert_idle()


def test_an_engine_failure_tells_clients_no_details(service, caplog):
    service.executor.gate.clear()
    service.executor.fails = True
    call = service.client.generate("x", request_id="unlucky")
    wait_for(lambda: service.engine.snapshot().num_running == 1)
    service.executor.gate.set()
    with pytest.raises(grpc.RpcError) as failure:
        list(call)
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert failure.value.details() == ("the server failed on this request (request id unlucky)")
    wait_for(lambda: not service.client.is_serving())


def test_unavailable_until_ready_and_while_draining(make_service):
    service = make_service(ready=False)
    assert not service.client.is_serving()
    with pytest.raises(NotAccepting, match="starting"):
        list(service.client.generate("x"))
    service.make_ready()
    assert service.client.is_serving()
    service.executor.step_s = 0.01
    running = service.client.generate("x", max_tokens=400)
    deltas = iter(running)
    next(deltas)
    draining = threading.Thread(target=lambda: service.call(service.server.drain()))
    draining.start()
    wait_for(lambda: not service.client.is_serving())
    with pytest.raises(NotAccepting, match="draining"):
        list(service.client.generate("x"))
    service.executor.step_s = 0.0
    assert list(deltas)[-1].finish_reason is FinishReason.LENGTH
    draining.join()
