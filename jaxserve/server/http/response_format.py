"""The constraint that a chat's body asks for, by any of its fields."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.engine.grammar.constraint import Constraint, ConstraintKind
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest
from jaxserve.server.http.schema import ChatRequest, JsonSchemaFormat, TextFormat
from jaxserve.server.http.tools import ToolUse

SCHEMA_FIELD = "response_format.json_schema.schema"


def with_constraint(
    sampling: SamplingParams, body: ChatRequest, tools: ToolUse | None
) -> SamplingParams:
    """The settings with the one constraint that the answer has. Raises InvalidRequest when the
    body asks for two."""
    asked = {
        "constraint": sampling.constraint,
        "response_format": _of_format(body),
        "tools": None if tools is None else tools.constraint,
    }
    given = [name for name, constraint in asked.items() if constraint is not None]
    if tools is not None and given not in ([], ["tools"]):
        raise InvalidRequest(given[0], "does not go with tools: send one of them")
    if len(given) > 1:
        raise InvalidRequest(given[0], f"does not go with {given[1]}: send one of them")
    return replace(sampling, constraint=asked[given[0]]) if given else sampling


def constraint_names(body: ChatRequest) -> dict[str, str]:
    """What the client calls the fields that errors name, beside those that have one name."""
    if isinstance(body.response_format, JsonSchemaFormat):
        return {"constraint.json_schema": SCHEMA_FIELD}
    return {"constraint.grammar": "tools"} if body.tools is not None else {}


def _of_format(body: ChatRequest) -> Constraint | None:
    form = body.response_format
    if form is None or isinstance(form, TextFormat):
        return None
    if isinstance(form, JsonSchemaFormat) and form.json_schema.schema_ is not None:
        return Constraint.json_schema(form.json_schema.schema_, SCHEMA_FIELD)
    return Constraint(ConstraintKind.JSON_OBJECT)
