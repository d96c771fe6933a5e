from __future__ import annotations

import pytest

from jaxserve.engine.inbox import Arrival, Inbox
from jaxserve.engine.request import FinishReason, Request
from jaxserve.errors import NotAccepting, QueueFull
from tests.engine.engine_rig import CollectingSink, request


def arrival(request_id: str) -> Arrival:
    return Arrival(Request(request(request_id), 1, 0, frozenset(), 0.0), CollectingSink())


def test_requests_count_as_queued_on_their_way_to_the_scheduler() -> None:
    inbox = Inbox(max_queued_requests=2, max_queued_tokens=100)
    inbox.put(arrival("a"))
    inbox.put(arrival("b"))
    assert len(inbox.take().arrivals) == 2
    assert inbox.num_queued == (2, 4)
    with pytest.raises(QueueFull):
        inbox.put(arrival("c"))
    inbox.publish_waiting(1, 2)
    inbox.put(arrival("c"))
    assert inbox.num_queued == (2, 4)


def test_an_id_is_live_from_put_to_release_and_gone_after_delivery() -> None:
    inbox = Inbox(max_queued_requests=9, max_queued_tokens=100)
    assert not inbox.end("a", FinishReason.CANCELLED)
    inbox.put(arrival("a"))
    inbox.take()
    assert inbox.end("a", FinishReason.CANCELLED)
    inbox.release(["a"])
    assert not inbox.end("a", FinishReason.CANCELLED)
    assert not inbox.wait_until_none_live(0.0), "the last output is not delivered yet"
    inbox.delivered()
    assert inbox.wait_until_none_live(0.0)


def test_an_end_never_outlives_the_request_it_was_meant_for() -> None:
    inbox = Inbox(max_queued_requests=9, max_queued_tokens=100)
    first, other, second = arrival("a"), arrival("b"), arrival("a")
    inbox.put(first)
    inbox.put(other)
    inbox.take()
    assert inbox.end("a", FinishReason.CANCELLED)
    assert inbox.end_request(first.request, FinishReason.CANCELLED)
    assert inbox.end_request(other.request, FinishReason.CANCELLED)
    inbox.release(["a"])
    inbox.put(second)
    assert not inbox.end_request(first.request, FinishReason.CANCELLED)
    mail = inbox.take()
    assert mail.arrivals == (second,)
    assert mail.ends == (("b", FinishReason.CANCELLED),)
    assert inbox.end_request(second.request, FinishReason.CANCELLED)
    assert inbox.take().ends == (("a", FinishReason.CANCELLED),)


def test_a_refused_request_leaves_no_trace() -> None:
    inbox = Inbox(max_queued_requests=1, max_queued_tokens=100)
    inbox.put(arrival("a"))
    with pytest.raises(QueueFull):
        inbox.put(arrival("b"))
    assert not inbox.end("b", FinishReason.CANCELLED)
    assert [a.request.request_id for a in inbox.take().arrivals] == ["a"]
    inbox.publish_waiting(0, 0)
    inbox.put(arrival("b"))


def test_waiting_ends_with_mail_or_a_stop() -> None:
    inbox = Inbox(max_queued_requests=1, max_queued_tokens=100)
    assert not inbox.wait(0.0)
    inbox.put(arrival("a"))
    assert inbox.wait(0.0)
    inbox.take()
    assert not inbox.wait(0.0)
    inbox.stop()
    assert inbox.wait(None)


def test_room_is_known_before_a_request_is_made() -> None:
    inbox = Inbox(max_queued_requests=2, max_queued_tokens=100)
    inbox.check_room()
    inbox.publish_waiting(2, 10)
    with pytest.raises(QueueFull, match="max-queued-requests"):
        inbox.check_room()
    inbox.publish_waiting(1, 100)
    with pytest.raises(QueueFull, match="max-queued-tokens"):
        inbox.check_room()
    inbox.publish_waiting(0, 0)
    inbox.check_room()
    inbox.refuse("gone")
    with pytest.raises(NotAccepting, match="gone"):
        inbox.check_room()
