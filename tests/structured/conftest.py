"""A real engine on a tiny random model whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.startup import RunningEngine, start_engine
from tests.server.tiny_model import write_tiny_model

CONTEXT = 544
PAGE_BYTES = 2 * 16 * 2 * 2 * 8 * 4
"""L 2, page of 16 tokens, K and V, K 2, D 8, float32."""


@pytest.fixture(scope="package")
def running(
    tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path
) -> Iterator[RunningEngine]:
    """One bucket, so that a request's bits don't depend on what runs beside it, and a pool that
    is too small for eight long requests."""
    engine = start_engine(
        EngineConfig(
            model=str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", CONTEXT)),
            dtype="float32",
            token_budget=16,
            buckets="one",
            max_num_seqs=8,
            max_model_len=CONTEXT,
            kv_cache_bytes=66 * PAGE_BYTES,
            compilation_cache_dir=compilation_cache,
        )
    )
    yield engine
    assert engine.engine.snapshot().compiles_after_ready == 0
    engine.close()
