"""The scripted service of the server's tests."""

from __future__ import annotations

from tests.server.conftest import make_service, service

__all__ = ["make_service", "service"]
