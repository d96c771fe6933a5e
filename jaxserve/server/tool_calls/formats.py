"""ToolCallFormat: one way in which models write calls. `--tool-call-parser` names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxserve.engine.grammar.constraint import Constraint, ConstraintKind
from jaxserve.engine.grammar.terms import json_term
from jaxserve.server.tool_calls import hermes
from jaxserve.server.tool_calls.hermes import HermesParser
from jaxserve.server.tool_calls.llama3 import Llama3Parser
from jaxserve.server.tool_calls.pieces import ToolCallParser

MAX_FORCED_CALLS = 8
"""Of an answer that must hold calls."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: str
    """JSON schema of its arguments, an object."""


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    make_parser: Callable[[], ToolCallParser]
    forced: Callable[[Sequence[Tool], int], str]
    """The grammar of an answer that is 1 to so many calls."""
    free: Callable[[Sequence[Tool], int], str]
    """The grammar of an answer that may hold so many calls at most, each of which is sound."""

    def forced_constraint(self, tools: Sequence[Tool], max_calls: int) -> Constraint:
        """The answer is nothing but calls of these tools."""
        return Constraint(ConstraintKind.GRAMMAR, self.forced(tools, max_calls))

    def free_constraint(self, tools: Sequence[Tool], max_calls: int) -> Constraint:
        """The answer is text, and what is a call in it is sound."""
        return Constraint(ConstraintKind.GRAMMAR, self.free(tools, max_calls))


def _rules(tools: Sequence[Tool], arguments_key: str) -> str:
    """The rule `object`: a call of one of the tools, as JSON."""
    lines = [f"object: {' | '.join(f'object_{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name)}, "{arguments_key}": '
        lines.append(f'object_{index}: {json.dumps(head)} arguments_{index} "}}"')
        lines.append(f"arguments_{index}: {json_term(tool.parameters)}")
    return "\n".join(lines)


_TAGS = json.dumps(f"{hermes.BEGIN}\n"), json.dumps(f"\n{hermes.END}")


def _forced_hermes(tools: Sequence[Tool], max_calls: int) -> str:
    begin, end = _TAGS
    more = f' ("\\n" call){{0,{max_calls - 1}}}' if max_calls > 1 else ""
    rules = _rules(tools, "arguments")
    return f"start: call{more}\ncall: {begin} object {end}\n{rules}"


def _free_hermes(tools: Sequence[Tool], max_calls: int) -> str:
    begin, end = json.dumps(hermes.BEGIN), _TAGS[1]
    return (
        f"start: call{{0,{max_calls}}} text\n"
        f"call: head call_body\n"
        f"head[lazy]: TEXT {begin}\n"
        f'call_body: "\\n" object {end}\n'
        "text: TEXT\n"
        "TEXT: /(.|\\n)*/\n"
        f"{_rules(tools, 'arguments')}"
    )


def _forced_llama3(tools: Sequence[Tool], max_calls: int) -> str:
    more = f' ("; " object){{0,{max_calls - 1}}}' if max_calls > 1 else ""
    return f"start: object{more}\n{_rules(tools, 'parameters')}"


def _free_llama3(tools: Sequence[Tool], max_calls: int) -> str:
    more = f' ("; " object){{0,{max_calls - 1}}}' if max_calls > 1 else ""
    return (
        f"start: object{more} | text\n"
        "text: TEXT\n"
        f"TEXT: /[^{{\\s<;](.|\\n)*/\n{_rules(tools, 'parameters')}"
    )


FORMATS: Mapping[str, ToolCallFormat] = {
    "hermes": ToolCallFormat(HermesParser, _forced_hermes, _free_hermes),
    "llama3": ToolCallFormat(Llama3Parser, _forced_llama3, _free_llama3),
}
