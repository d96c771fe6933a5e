"""The sandbox that chat templates run in.

Jinja's own sandbox keeps a template from Python's internals. This one also
keeps it from making much out of little: loops, calls, filters and whatever
builds text or lists draw on a budget, and a filter, function or string method
that is not on a list does not exist. Memory is bounded by the budget; time is
bounded by the budget times the length of the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_BUILT_CHARACTERS = 32 << 20
"""Characters and list items made or looked through, all together."""
MAX_STEPS = 100_000
"""Loop rounds, calls, filters and nested values looked through."""
MAX_RANGE = 10_000
_MAX_INTEGER_BITS = 256

BUDGET_KEY = "render budget"
"""Where a rendering's Budget is found. It has a space, so no template can name it."""


class ChatTemplateError(ValueError):
    """A template that cannot be compiled, refuses the messages or breaks a limit."""


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._steps_left = MAX_STEPS
        self._characters_left = MAX_BUILT_CHARACTERS

    def step(self, *values: Any) -> None:
        """Draws for one operation that goes through `values` once."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise ChatTemplateError(f"the chat template takes more than {MAX_STEPS} steps")
        self.build(sum(len(value) for value in values if isinstance(value, _SIZED)))

    def build(self, size: int) -> None:
        """Draws for `size` characters or items, before they are made."""
        self._characters_left -= size
        if self._characters_left < 0:
            raise ChatTemplateError(
                f"the chat template builds more than {MAX_BUILT_CHARACTERS} characters"
            )

    def text(self, value: Any) -> str:
        """`str(value)`, where lists that share their parts cannot blow up."""
        if isinstance(value, str):
            return value
        self.look_through(value)
        return str(value)

    def look_through(self, value: Any) -> None:
        """Draws for all parts of `value`, a shared one as often as it would be printed."""
        self.step(value)
        if isinstance(value, Mapping):
            for key, item in value.items():
                self.look_through(key)
                self.look_through(item)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                self.look_through(item)


_SIZED = (str, bytes, list, tuple, set, frozenset, dict, range)

_STRING_METHODS = frozenset(
    [
        *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha"),
        *("isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle"),
        *("isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix"),
        *("replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines"),
        *("startswith", "strip", "swapcase", "title", "upper"),
    ]
)
_JINJA_FILTERS = frozenset(
    [
        *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby"),
        *("int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
        *("rejectattr", "reverse", "select", "selectattr", "sort", "title", "trim", "unique"),
        "upper",
    ]
)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates as Hugging Face does, with every construct on the budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _GenerationExtension],
            finalize=_finalize,
            optimized=False,  # constants too are computed on the budget, not at compile time
            cache_size=0,
        )
        self.globals = {
            "range": _range,
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
        }
        own = {"tojson": _to_json, "join": _join, "replace": _replace, "indent": _indent}
        text = {"string": _to_text, "safe": _to_text}
        jinja = {name: _on_budget(FILTERS[name]) for name in _JINJA_FILTERS}
        self.filters = {**jinja, **own, **text}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _rewrite(template)
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use `obj.attr`."""
        if isinstance(obj, (str, bytes)) and attr not in _STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leaves `str.format` to `is_safe_attribute`: its field widths have no limit."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Stops the template at once, where Jinja would wait for a use of the value."""
        raise SecurityError(f"{attribute!r} of {type(obj).__name__} is out of bounds")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, for the operators that can build without limit."""
        budget = _budget(context)
        budget.step()
        if operator == "%" and isinstance(left, (str, bytes)):
            raise SecurityError("text is formatted with %, whose field widths have no limit")
        if operator == "+":
            budget.step(left, right)
        if operator in ("*", "**"):
            _check_product(budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call from the template."""
        owner = __obj.__self__ if isinstance(__obj, BuiltinMethodType) else None
        _budget(__context).step(owner, *args, *kwargs.values())
        if isinstance(owner, str) and __obj.__name__ == "replace":
            return _replace(__context, owner, *args, **kwargs)
        if isinstance(owner, str) and __obj.__name__ == "join":
            return _join(__context, args[0], owner)
        return super().call(__context, __obj, *args, **kwargs)

    def rounds(self, context: Context, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop, each drawing a step."""
        budget = _budget(context)
        for value in values:
            budget.step()
            yield value

    def concatenate(self, context: Context, *values: Any) -> str:
        """The `~` operator."""
        budget = _budget(context)
        parts = [budget.text(value) for value in values]
        budget.step(*parts)
        return "".join(parts)

    def slice_of(self, context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        _budget(context).step(value)
        return value[start:stop:step]


class _GenerationExtension(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (declared by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _rewrite(node: nodes.Node) -> None:
    """Sends loops, `~`, slices and literal text through the environment's bounded forms."""
    if isinstance(node, nodes.For):
        node.iter = _environment_call("rounds", [node.iter])
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_bounded(item) for item in value])
        else:
            setattr(node, field, _bounded(value))
    for child in node.iter_child_nodes():
        _rewrite(child)


def _bounded(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _environment_call("concatenate", node.nodes)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return _environment_call(
            "slice_of", [node.node, *(nodes.Const(None) if end is None else end for end in ends)]
        )
    if isinstance(node, nodes.TemplateData):
        return nodes.Const(node.data)  # an expression, which _finalize counts
    return node


def _environment_call(method: str, arguments: Sequence[nodes.Node]) -> nodes.Call:
    given: list[Any] = [nodes.ContextReference(), *arguments]
    return nodes.Call(nodes.EnvironmentAttribute(method), given, [], None, None)


def _budget(context: Context) -> Budget:
    budget = context.parent[BUDGET_KEY]
    assert isinstance(budget, Budget)
    return budget


def _check_product(budget: Budget, operator: str, left: Any, right: Any) -> None:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, _SIZED) and isinstance(times, int):
            budget.build(len(sequence) * max(0, times))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (right if operator == "**" else 1)
        if bits + right.bit_length() > _MAX_INTEGER_BITS:
            raise ChatTemplateError("the chat template makes too large a number")


def _on_budget(function: Callable[..., Any]) -> Callable[..., Any]:
    """One of Jinja's filters, drawing a step and the size of what it is given."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @jinja2.pass_context
    def bounded(context: Context, *args: Any, **kwargs: Any) -> Any:
        _budget(context).step(*args, *kwargs.values())
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(wanted or "", ())
        return function(*first, *args, **kwargs)

    return bounded


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> str:
    budget = _budget(context)
    text = budget.text(value)
    budget.step(text)
    return text


@jinja2.pass_context
def _to_text(context: Context, value: Any) -> str:
    budget = _budget(context)
    text = budget.text(value)
    budget.step(text)
    return text


@jinja2.pass_context
def _join(
    context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    budget = _budget(context)
    parts: list[str] = []
    get = make_attrgetter(context.environment, attribute)
    for item in value:
        parts.append(budget.text(get(item)))
        budget.step(parts[-1], d)
    return d.join(parts)


@jinja2.pass_context
def _replace(context: Context, s: Any, old: str, new: str, count: int | None = None) -> str:
    budget = _budget(context)
    text = budget.text(s)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    budget.step(text)
    budget.build(times * len(new))
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_context
def _indent(
    context: Context, s: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    budget = _budget(context)
    lines = budget.text(s).splitlines() or [""]
    num_added = width if isinstance(width, int) else len(width)
    budget.step(lines)
    budget.build(sum(map(len, lines)) + len(lines) * num_added)
    prefix = " " * width if isinstance(width, int) else width
    indented = [prefix + line if line or blank else line for line in lines[1:]]
    return "\n".join([(prefix if first else "") + lines[0], *indented])


@jinja2.pass_context
def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, without escapes for HTML: a prompt is not a web page."""
    _budget(context).look_through(value)
    if indent is not None and not 0 <= indent <= 8:
        raise ChatTemplateError("the chat template asks tojson for an indent outside 0 to 8")
    if separators is not None and sum(map(len, separators)) > 16:
        raise ChatTemplateError("the chat template gives tojson long separators")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses the messages: {message}")


def _range(*args: int) -> range:
    values = range(*args)
    if len(values) > MAX_RANGE:
        raise ChatTemplateError(f"the chat template asks for a range of more than {MAX_RANGE}")
    return values
