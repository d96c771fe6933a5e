"""The official client of OpenAI's API for the scripted service of the folder above."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.server.scripted_service import Service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with client_of(service) as client:
        yield client


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.http_url}/v1", api_key="none", max_retries=0)
