"""Generated JSON schemas: what ends by itself fits its schema; most end in 512 tokens."""

from __future__ import annotations

import pytest

from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.engine.request import FinishReason
from jaxserve.errors import InvalidRequest
from tools.schema_cases.cases import Case, run_cases
from tools.schema_cases.schemas import UNSUPPORTED, Schema


def prompt_of(_: Schema) -> bytes:
    """One token a byte."""
    return b"Answer in JSON: "


def check(cases: list[Case], least_stopped: float) -> None:
    stopped = [case for case in cases if case.finish_reason is FinishReason.STOP]
    assert {case.finish_reason for case in cases} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert [case for case in stopped if not case.is_valid] == []
    assert len(stopped) >= least_stopped * len(cases)
    # Both ways of drawing did their part, and cut texts are not whole ones.
    assert {case.temperature for case in stopped} == {0.0, 1.0}
    cut = [case for case in cases if case.finish_reason is FinishReason.LENGTH]
    assert all(case.num_tokens == 512 for case in cut)


def test_a_sample_of_the_schemas(running):
    check(list(run_cases(running.engine, range(24), prompt_of)), least_stopped=0.8)


@pytest.mark.long
def test_500_schemas(running):
    check(list(run_cases(running.engine, range(500), prompt_of)), least_stopped=0.95)


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_what_cannot_be_kept_to_is_refused_by_name(running, keyword):
    constraint = Constraint.json_schema(UNSUPPORTED[keyword])
    with pytest.raises(InvalidRequest, match=keyword) as refusal:
        running.engine.grammars.compile(constraint)
    assert refusal.value.field == "constraint.json_schema"
