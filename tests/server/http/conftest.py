"""A scripted service and the official client of OpenAI's API for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.server.scripted_service import Service, start_service


@pytest.fixture
def make_service() -> Iterator[Callable[..., Service]]:
    """A function that starts services; all are stopped at the end."""
    services: list[Service] = []

    def make(*, ready: bool = True, **options: Any) -> Service:
        service = start_service(**options)
        services.append(service)
        if ready:
            service.make_ready()
        return service

    yield make
    for service in services:
        service.close()


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    return make_service()


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with client_of(service) as client:
        yield client


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.http_url}/v1", api_key="none", max_retries=0)
