from __future__ import annotations

import time

import pytest

from jaxserve.engine.offline import complete_in_order, stream
from jaxserve.engine.request import FinishReason
from jaxserve.errors import NotAccepting
from tests.engine.engine_rig import make_engine, request


def test_completions_come_in_order_and_whole() -> None:
    engine, _ = make_engine(max_num_seqs=4)
    engine.start()
    requests = [request(f"r{i}", seed=i, max_tokens=1 + (7 * i) % 23) for i in range(40)]
    completions = list(complete_in_order(engine, requests, max_ahead=10))
    assert [c.request_id for c in completions] == [r.request_id for r in requests]
    assert [len(c.token_ids) for c in completions] == [r.sampling.max_tokens for r in requests]
    assert [c.usage.num_output_tokens for c in completions] == [
        len(c.token_ids) for c in completions
    ]
    alone = next(iter(complete_in_order(engine, [requests[5]], max_ahead=1)))
    assert alone.token_ids == completions[5].token_ids
    engine.stop()


def test_no_more_than_max_ahead_are_taken_from_the_source() -> None:
    engine, _ = make_engine(step_s=0.001)
    engine.start()
    num_taken = 0

    def source():  # type: ignore[no-untyped-def]
        nonlocal num_taken
        for index in range(20):
            num_taken += 1
            yield request(f"r{index}", max_tokens=4)

    for num_done, _ in enumerate(complete_in_order(engine, source(), max_ahead=5), start=1):
        assert num_taken <= num_done - 1 + 5
    assert num_taken == 20
    engine.stop()


def test_a_small_queue_holds_requests_back() -> None:
    engine, _ = make_engine(max_num_seqs=1, max_queued_requests=2)
    engine.start()
    requests = [request(f"r{i}", max_tokens=3) for i in range(20)]
    assert len(list(complete_in_order(engine, requests, max_ahead=15))) == 20
    engine.stop()


def test_leaving_early_aborts() -> None:
    engine, _ = make_engine(step_s=0.002)
    engine.start()
    outputs = stream(engine, request("a", max_tokens=60))
    next(outputs)
    outputs.close()
    completions = complete_in_order(
        engine, [request(f"r{i}", max_tokens=2 if i == 0 else 60) for i in range(4)], max_ahead=4
    )
    next(completions)
    completions.close()
    assert engine.drain(0.0) in (True, False)
    assert engine.metrics.num_finished[FinishReason.CANCELLED] == 4
    with pytest.raises(NotAccepting):
        next(stream(engine, request("b")))
    engine.stop()


def test_stream_yields_until_the_last_output() -> None:
    engine, _ = make_engine()
    engine.start()
    started_s = time.monotonic()
    outputs = list(stream(engine, request("a", max_tokens=9)))
    assert sum(len(o.token_ids) for o in outputs) == 9
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert time.monotonic() - started_s < 5.0
    engine.stop()
