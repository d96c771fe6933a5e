"""Limits of each tenant: tokens, requests, turns."""

from __future__ import annotations

import grpc
import pytest

from jaxserve.engine.request import Account, GenerationRequest, Request
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.fair_shares import FairShares
from jaxserve.engine.scheduler.waiting import WaitingQueue
from jaxserve.errors import OverLimit, QueueFull
from jaxserve.server.access.meter import TenantMeter
from jaxserve.server.access.tenant import Tenant
from jaxserve.server.access.token_bucket import TokenBucket
from tests.security.keys import bearer, client_of, keyed_service, write_keys
from tests.server.http.raw_http import ask, post
from tests.server.scripted_service import SetClock, wait_for


def test_a_bucket_holds_a_burst_and_lets_debts_be_paid():
    bucket = TokenBucket(10.0, 100.0, 0.0)
    assert bucket.wait_s(100, 0.0) == 0
    bucket.take(130, 0.0)  # An answer that was longer than what was left.
    assert bucket.level(1.0) == -20
    assert bucket.wait_s(50, 1.0) == pytest.approx(7.0)
    assert bucket.wait_s(50, 8.0) == 0
    assert bucket.level(1000.0) == 100  # No more than a burst, however long the pause.
    assert bucket.wait_s(5000, 1000.0) == 0  # A prompt longer than a burst needs a full one.
    bucket.take(1, 1000.0)
    assert bucket.wait_s(5000, 1000.0) == pytest.approx(0.1)


def _metered(clock=None, **limits):
    tenants = {"a": Tenant(name="a", **limits)}
    return TenantMeter(lambda: tenants, clock or SetClock()), tenants


def _request(request_id, num_tokens=10, tenant="a", **fields):
    account = Account(tenant, **fields)
    return GenerationRequest(request_id, (1,) * num_tokens, account=account)


def test_a_withdrawn_request_costs_nothing():
    meter, _ = _metered(tokens_per_minute=60, burst_tokens=30, max_concurrent_requests=1)
    for index in range(5):
        meter.admit(_request(f"r{index}", 20))
        meter.withdraw(_request(f"r{index}", 20))
    usage = meter.usage["a"]
    assert (usage.num_open, usage.num_prompt_tokens) == (0, 0)


def test_changed_limits_give_no_new_burst():
    clock = SetClock()
    meter, tenants = _metered(clock, tokens_per_minute=60, burst_tokens=30)
    meter.admit(_request("r1", 30))
    tenants["a"] = Tenant(name="a", tokens_per_minute=120, burst_tokens=40)
    with pytest.raises(OverLimit) as refusal:
        meter.admit(_request("r2", 10))
    assert refusal.value.retry_after_s == pytest.approx(5.0)
    clock.now_s += 5
    meter.admit(_request("r2", 10))


@pytest.fixture
def make_keyed(tmp_path):
    services = []

    def make(limits=None, **settings):
        service = keyed_service(write_keys(tmp_path / "keys.toml", **settings), limits=limits)
        services.append(service)
        return service

    yield make
    for service in services:
        service.close()


def test_tokens_a_minute_bound_prompts_and_answers_together(make_keyed):
    service = make_keyed(alpha={"tokens_per_minute": 60, "burst_tokens": 50})
    clock = SetClock()
    service.server.state.clock = clock
    with client_of(service, "alpha") as alpha, client_of(service, "beta") as beta:
        list(alpha.generate("x" * 20, max_tokens=40))  # 10 tokens of debt.
        wait_for(lambda: service.num_streams() == 0)
        with pytest.raises(QueueFull, match="tokens_per_minute") as refusal:
            list(alpha.generate("x" * 15, max_tokens=1))
        error = refusal.value.__cause__
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["retry-after-ms"] == "25000"
        body = {"prompt": "x" * 15, "max_tokens": 1}
        status, headers, reply = post(service, "/v1/completions", body, bearer("alpha"))
        assert (status, headers["retry-after"]) == (429, "25")
        assert reply["error"]["code"] == "rate_limit_exceeded"
        assert list(beta.generate("x" * 15, max_tokens=1))  # Another tenant is served.
        clock.now_s += 24.9
        with pytest.raises(QueueFull):
            list(alpha.generate("x" * 15, max_tokens=1))
        clock.now_s += 0.2
        assert list(alpha.generate("x" * 15, max_tokens=1))
    refused = service.server.state.num_refused
    assert refused["over_limit"] == 3
    samples = ask(service, "GET", "/metrics", headers=bearer("watcher"))[2]
    name = 'jaxserve_tenant_requests_refused_total{limit="tokens_per_minute",tenant="alpha"} 3.0'
    assert name in samples
    assert 'jaxserve_tenant_prompt_tokens_total{tenant="alpha"} 35.0' in samples
    assert 'jaxserve_tenant_generation_tokens_total{tenant="alpha"} 41.0' in samples


def test_requests_of_a_tenant_are_bounded_running_and_waiting(make_keyed):
    service = make_keyed(alpha={"max_concurrent_requests": 6, "max_queued_requests": 2})
    service.executor.step_s = 0.02
    with client_of(service, "alpha") as alpha, client_of(service, "beta") as beta:
        calls = []
        for _ in range(4):  # As many as run at once; each has a token before the next.
            calls.append(alpha.generate("x", max_tokens=400))
            next(iter(calls[-1]))
        calls += [alpha.generate("x", max_tokens=400) for _ in range(2)]
        wait_for(lambda: service.num_streams() == 6, 30)
        with pytest.raises(QueueFull, match="max_concurrent_requests"):
            list(alpha.generate("x", max_tokens=1))
        calls.pop(0).cancel()
        wait_for(lambda: service.num_streams() == 5)
        # One that waited runs by now, or still waits for its first token.
        usage = service.server._door.usage["alpha"]
        wait_for(lambda: usage.num_queued == 1, 30)
        calls.append(alpha.generate("x", max_tokens=400))
        wait_for(lambda: usage.num_queued == 2, 30)
        calls.pop(0).cancel()
        wait_for(lambda: usage.num_queued == 1, 30)
        other = beta.generate("x", max_tokens=1)
        for call in calls:
            call.cancel()
        assert list(other)
    service.assert_idle()
    wait_for(lambda: usage.num_open == 0)


def test_the_queue_bound_counts_requests_without_a_token(make_keyed):
    service = make_keyed(alpha={"max_queued_requests": 2})
    service.executor.gate.clear()
    with client_of(service, "alpha") as alpha:
        calls = [alpha.generate("x", max_tokens=2) for _ in range(2)]
        wait_for(lambda: service.num_streams() == 2)
        with pytest.raises(QueueFull, match="max_queued_requests"):
            list(alpha.generate("x", max_tokens=1))
        service.executor.gate.set()
        assert all(list(call) for call in calls)
        assert list(alpha.generate("x", max_tokens=1))


def _queue(running=None):
    running = {} if running is None else running
    shares = FairShares(running)
    return WaitingQueue(1000, 10**6, shares=shares), shares, running


def _record(request_id, tenant, num_tokens=10, weight=1.0, priority=0):
    generation = GenerationRequest(
        request_id,
        (1,) * num_tokens,
        SamplingParams(),
        account=Account(tenant, weight),
        priority=priority,
    )
    return Request(generation, 10, 0, frozenset(), 0.0)


def _serve(queue, shares, count):
    """Ends `count` requests, one after the other, and names their tenants."""
    order = []
    for _ in range(count):
        request = queue.head
        queue.remove(request.request_id)
        shares.charge(request)
        order.append(request.generation.account.tenant)
    return order


def test_a_flood_of_one_tenant_delays_no_other():
    queue, shares, _ = _queue()
    for index in range(50):
        queue.append(_record(f"a{index}", "a"))
    _serve(queue, shares, 10)
    for index in range(3):
        queue.append(_record(f"b{index}", "b"))
    # b begins where a is, and they take turns: nobody has saved up, and nobody waits for 40.
    assert sorted(_serve(queue, shares, 6)) == ["a", "a", "a", "b", "b", "b"]
    assert _serve(queue, shares, 2) == ["a", "a"]


def test_weights_divide_tokens_not_requests():
    queue, shares, _ = _queue()
    for index in range(60):
        queue.append(_record(f"a{index}", "a", num_tokens=30, weight=3.0))
        queue.append(_record(f"b{index}", "b", num_tokens=10))
    order = _serve(queue, shares, 40)
    # 30 tokens of weight 3 and 10 of weight 1 cost the same, so they take turns.
    assert order.count("a") == 20
    tokens = {"a": 30 * order.count("a"), "b": 10 * order.count("b")}
    assert tokens["a"] == 3 * tokens["b"]


def test_running_requests_count_as_they_go():
    queue, _, running = _queue()
    long = _record("a0", "a")
    long.output_token_ids = [1] * 500
    running["a0"] = long
    running["b0"] = _record("b0", "b")
    queue.append(_record("a1", "a"))
    queue.append(_record("b1", "b"))
    assert queue.head.request_id == "b1"


def test_classes_go_before_shares_and_preempted_ones_before_new_ones():
    queue, shares, _ = _queue()
    queue.append(_record("a0", "a"))
    queue.append(_record("b0", "b", priority=1))
    shares.charge(_record("a9", "a", num_tokens=1000))
    assert queue.head.request_id == "a0"  # The lower class, whatever its tenant got.
    queue.append(_record("c0", "c"))
    queue.push_front(_record("a1", "a"))
    assert queue.head.request_id == "a1"
    assert [queue.remove(name).request_id for name in ("a1", "c0")] == ["a1", "c0"]
    assert len(queue) == 2


def test_requests_of_a_busy_tenant_reach_the_engine_in_turns(make_keyed):
    service = make_keyed(limits={"max_num_seqs": 1})
    service.executor.gate.clear()
    with client_of(service, "alpha") as alpha, client_of(service, "beta") as beta:
        calls = [alpha.generate("x", max_tokens=5, request_id="a0")]
        wait_for(lambda: service.engine.snapshot().num_running == 1)
        for count in range(1, 5):
            calls.append(alpha.generate("x", max_tokens=5, request_id=f"a{count}"))
            wait_for(lambda count=count: service.engine.snapshot().num_waiting == count)
        calls.append(beta.generate("x", max_tokens=5, request_id="b0"))
        wait_for(lambda: service.num_streams() == 6)
        service.executor.gate.set()
        for call in calls:
            list(call)
    loads = [load.request_id for plan in service.executor.plans for load in plan.slot_loads]
    assert loads.index("beta/b0") <= 2
    assert loads[0] == "alpha/a0"
