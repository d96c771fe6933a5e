"""What clients see when the device has no memory for a step."""

from __future__ import annotations

import pytest

from jaxserve.errors import NotAccepting
from jaxserve.server.state import Phase
from tests.server.http.raw_http import post
from tests.server.scripted_service import text_from, wait_for


def test_one_step_without_memory_is_not_noticed(service):
    service.executor.num_out_of_memory = 1
    outputs = list(service.client.generate("hello", max_tokens=20))
    assert "".join(output.text for output in outputs) == text_from(5, 20)
    assert service.engine.snapshot().num_steps_out_of_memory == 1
    assert service.server.state.phase is Phase.READY
    service.assert_idle()


def test_a_request_that_cannot_go_on_is_sent_elsewhere(service):
    phases = []
    service.engine._recovery._pause = lambda _: phases.append(service.server.state.phase)
    service.executor.num_out_of_memory = 2
    with pytest.raises(NotAccepting, match="out of memory"):
        list(service.client.generate("hello", max_tokens=20))
    # Its end is planned: what the step before it found no memory for is over.
    assert phases == [Phase.DEGRADED]
    wait_for(lambda: service.server.state.phase is Phase.READY)

    service.executor.num_out_of_memory = 2
    reply = post(service, "/v1/completions", {"prompt": "x", "max_tokens": 9})
    status, headers, body = reply
    assert (status, body["error"]["code"]) == (503, "engine_lost")
    assert headers["retry-after"] == "1"
    assert list(service.client.generate("hello", max_tokens=2))
    assert sum(service.server.state.num_refused.values()) == 0
    service.assert_idle()
