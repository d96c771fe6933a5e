"""Fixtures of the migration's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from rig import Forker


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    """Runs `jaxserve checkpoint` commands in processes that can be killed."""
    forker = Forker(tmp_path_factory.mktemp("forker"))
    yield forker
    forker.close()
