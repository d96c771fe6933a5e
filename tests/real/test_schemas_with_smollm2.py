"""The first of the generated schemas through SmolLM2: what stops fits its schema.

`tools/validate_schemas.py` has all of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.request import FinishReason
from jaxserve.engine.startup import start_engine
from tools.schema_cases.cases import MAX_TOKENS, run_cases
from tools.validate_schemas import prompt_ids

NUM_SCHEMAS = 12
"""None of them is a list without an end, which a model of this size does not end."""

pytestmark = [pytest.mark.real_model, pytest.mark.long]


def test_answers_stop_and_fit_their_schemas(smollm2_path: Path, compilation_cache: Path) -> None:
    config = EngineConfig(
        model=str(smollm2_path),
        max_model_len=4 * MAX_TOKENS,
        compilation_cache_dir=compilation_cache,
    )
    running = start_engine(config)
    try:
        prompt_of = partial(prompt_ids, running.tokenizer, "examples")
        cases = list(run_cases(running.engine, range(NUM_SCHEMAS), prompt_of))
    finally:
        running.close()
    stopped = [case for case in cases if case.finish_reason is FinishReason.STOP]
    assert [case.seed for case in stopped if not case.is_valid] == []
    assert len(stopped) >= 0.95 * NUM_SCHEMAS
