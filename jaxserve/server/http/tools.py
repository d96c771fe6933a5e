"""What a chat's body says of tools: checked, as the template takes it, and as a constraint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.errors import InvalidRequest
from jaxserve.server.grammars import grammar_of
from jaxserve.server.http.schema import ChatRequest, NamedTool
from jaxserve.server.http.schema import Tool as ToolBody
from jaxserve.server.prompt_limits import PromptLimits, at_most
from jaxserve.server.state import Serving
from jaxserve.server.tool_calls.formats import FORMATS, MAX_FORCED_CALLS, Tool, ToolCallFormat

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that the answer may call."""

    format: ToolCallFormat
    described: Sequence[Mapping[str, Any]]
    """For the chat template."""
    constraint: Constraint | None
    """None: the model writes calls as it likes."""


async def tool_use(body: ChatRequest, format_name: str | None, serving: Serving) -> ToolUse | None:
    """None when the answer is to call no tools. Raises InvalidRequest naming the field."""
    if body.tools is None:
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(body, name) not in (None, "none"):
                raise InvalidRequest(name, "needs tools")
        return None
    if body.tool_choice == "none":
        return None
    if format_name is None:
        raise InvalidRequest(
            "tools",
            "are not read by this server: start it with --tool-call-parser "
            f"{' or '.join(FORMATS)}, as the model writes its calls",
        )
    tools = _tools(body.tools, serving.limits)
    constraint = _constraint(body, tools, FORMATS[format_name])
    if constraint is not None:
        for index, tool in enumerate(tools):
            await _check_parameters(index, tool, serving)
    return ToolUse(
        format=FORMATS[format_name],
        described=[tool.model_dump(exclude_none=True) for tool in body.tools],
        constraint=constraint,
    )


def _tools(bodies: Sequence[ToolBody], limits: PromptLimits) -> list[Tool]:
    tools: list[Tool] = []
    for index, one in enumerate(bodies):
        function, field = one.function, f"tools[{index}].function"
        if any(tool.name == function.name for tool in tools):
            raise InvalidRequest(f"{field}.name", f"{function.name} appears twice")
        schema = NO_ARGUMENTS if function.parameters is None else function.parameters
        if schema.get("type") != "object":
            raise InvalidRequest(f"{field}.parameters", 'must have the "type" "object"')
        constraint = Constraint.json_schema(schema, f"{field}.parameters")
        try:
            constraint.validate()
        except InvalidRequest as error:
            raise _renamed(error, f"{field}.parameters") from error
        tools.append(Tool(function.name, constraint.source))
    size = sum(len(json.dumps(body.model_dump())) for body in bodies)
    at_most("tools", size, limits.max_prompt_bytes, "bytes")
    return tools


def _constraint(
    body: ChatRequest, tools: Sequence[Tool], form: ToolCallFormat
) -> Constraint | None:
    assert body.tools is not None
    max_calls = 1 if body.parallel_tool_calls is False else MAX_FORCED_CALLS
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        chosen = [tool for tool in tools if tool.name == name]
        if not chosen:
            raise InvalidRequest("tool_choice.function.name", "is no name in tools")
        return form.forced_constraint(chosen, 1)
    if body.tool_choice == "required":
        return form.forced_constraint(tools, max_calls)
    is_strict = any(tool.function.strict for tool in body.tools)
    if is_strict or body.parallel_tool_calls is False:
        return form.free_constraint(tools, max_calls)
    return None


async def _check_parameters(index: int, tool: Tool, serving: Serving) -> None:
    """Names the tool whose parameters cannot be kept to."""
    try:
        await grammar_of(Constraint.json_schema(json.loads(tool.parameters)), serving)
    except InvalidRequest as error:
        raise _renamed(error, f"tools[{index}].function.parameters") from error


def _renamed(error: InvalidRequest, field: str) -> InvalidRequest:
    return InvalidRequest(field, str(error).removeprefix(f"{error.field}: "))
