"""/openapi.json: requests made from it never make the server fail, and replies are as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from jaxserve.server.http import schema as bodies
from jaxserve.server.http.endpoints import ENDPOINTS
from jaxserve.server.http.openapi import document
from tests.server.http.raw_http import ask
from tests.server.scripted_service import start_service

DOCS = Path(__file__).parents[3] / "docs" / "http.md"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
described = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def shared():
    service = start_service()
    service.make_ready()
    yield service
    assert not service.engine.snapshot().failed
    service.assert_idle()
    service.close()


@described.parametrize()
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_any_request_gets_the_reply_that_is_described(shared, case):
    case.call_and_validate(base_url=shared.http_url, checks=CHECKS)


def test_the_document_is_served_and_complete(shared):
    served = ask(shared, "GET", "/openapi.json")[2]
    assert served == document()
    assert set(served["paths"]) == {endpoint.path for endpoint in ENDPOINTS}


def test_the_documentation_has_every_field():
    rows = set(re.findall(r"^\| `([a-z_.]+)`", DOCS.read_text(), re.MULTILINE))
    classes = [endpoint.body for endpoint in ENDPOINTS if endpoint.body is not None]
    fields = {name for body in classes for name in body.model_fields}
    options = {f"stream_options.{name}" for name in bodies.StreamOptions.model_fields}
    assert fields | options | bodies.REFUSED_FIELDS.keys() == rows
