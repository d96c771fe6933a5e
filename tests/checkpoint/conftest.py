"""Fixtures of the store's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from store_writer import WriterTemplate


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WriterTemplate]:
    """Starts writer processes."""
    template = WriterTemplate(tmp_path_factory.mktemp("writers"))
    yield template
    template.close()
