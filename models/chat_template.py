"""ChatTemplate: renders a model's Jinja template, which is somebody else's code.

The one place where a template is rendered. Jinja's sandbox keeps a template
from Python's internals; this module adds what the sandbox leaves open: every
construct that can make much out of little (loops, calls, text and list
building) draws on a budget, and what is not on a list does not exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_OUTPUT_CHARACTERS = 4 << 20
MAX_BUILT_CHARACTERS = 32 << 20
"""Characters and list items made on the way, all together."""
MAX_STEPS = 200_000
"""Loop rounds, calls and values looked through."""
MAX_RANGE = 10_000
MAX_SOURCE_CHARACTERS = 1 << 20
_MAX_INTEGER_BITS = 256

_BUDGET_KEY = "render budget"  # with a space, so that no template can name it


class ChatTemplateError(ValueError):
    """A template that cannot be compiled, refuses the messages or breaks a limit."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja source.
        bos_token, eos_token: what the template's variables of these names hold.

    Raises ChatTemplateError when the source does not compile.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, above the limit of "
                f"{MAX_SOURCE_CHARACTERS}"
            )
        try:
            self._template = _Environment().from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from None
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
    ) -> str:
        """The prompt text, at most MAX_OUTPUT_CHARACTERS long.

        Args:
            messages: from first to last, e.g. `{"role": "user", "content": "Hi"}`.
            add_generation_prompt: open the assistant's turn at the end.
            now: gives the template `strftime_now`; without it there is none.

        Raises ChatTemplateError with the template's own message, or the limit
        that it broke.
        """
        variables: dict[str, Any] = {
            **self._variables,
            _BUDGET_KEY: _Budget(),
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        if now is not None:
            variables["strftime_now"] = _Strftime(now)
        try:
            return _collect(self._template.generate(variables))
        except ChatTemplateError:
            raise
        except SecurityError as error:
            raise ChatTemplateError(f"the chat template does what it may not: {error}") from None
        except RecursionError:
            raise ChatTemplateError("the chat template recurses too deeply") from None
        except Exception as error:  # whatever the template's code brings about
            raise ChatTemplateError(
                f"the chat template failed: {type(error).__name__}: {str(error)[:500]}"
            ) from None


def _collect(pieces: Iterable[str]) -> str:
    parts: list[str] = []
    num_characters = 0
    for piece in pieces:
        num_characters += len(piece)
        if num_characters > MAX_OUTPUT_CHARACTERS:
            raise ChatTemplateError(
                f"the chat template's output passes {MAX_OUTPUT_CHARACTERS} characters"
            )
        parts.append(piece)
    return "".join(parts)


class _Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps_left = MAX_STEPS
        self.characters_left = MAX_BUILT_CHARACTERS

    def step(self) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise ChatTemplateError(f"the chat template takes more than {MAX_STEPS} steps")

    def build(self, size: int) -> None:
        """Draws before something of `size` characters or items is made."""
        self.characters_left -= size
        if self.characters_left < 0:
            raise ChatTemplateError(
                f"the chat template builds more than {MAX_BUILT_CHARACTERS} characters"
            )

    def text(self, value: Any) -> str:
        """`str(value)`, where a nest of shared lists cannot blow up."""
        if isinstance(value, str):
            return value
        self.look_through(value)
        return str(value)

    def look_through(self, value: Any) -> None:
        """Draws for everything in `value`, each shared part as often as it would be printed."""
        self.step()
        if isinstance(value, str):
            self.build(len(value))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.look_through(key)
                self.look_through(item)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                self.look_through(item)


class _Strftime:
    """`strftime_now(format)` of a fixed moment."""

    def __init__(self, now: datetime) -> None:
        self._now = now

    def __call__(self, format: str) -> str:
        # A field width such as %999999999d would be honoured by the C library.
        if len(format) > 64 or re.search(r"%[^A-Za-z%]", format):
            raise ChatTemplateError("strftime_now takes a short format of plain % letters")
        return self._now.strftime(format)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses the messages: {message}")


def _range(*args: int) -> range:
    values = range(*args)
    if len(values) > MAX_RANGE:
        raise ChatTemplateError(f"the chat template asks for a range of more than {MAX_RANGE}")
    return values


class _GenerationExtension(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_STRING_METHODS = frozenset(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit
    islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix
    replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper""".split()
)
_FILTERS = frozenset(
    """abs capitalize count d default dictsort e escape first float groupby int items last length
    list lower map max min reject rejectattr reverse round safe select selectattr sort string sum
    title trim unique upper""".split()
)
_OPERATORS = frozenset(["+", "*", "**", "%"])


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with Hugging Face's additions and our budget."""

    intercepted_binops = _OPERATORS

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _GenerationExtension],
            finalize=_finalize,
            optimized=False,
            cache_size=0,
        )
        self.globals = {
            "range": _range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
        }
        bounded: dict[str, Callable[..., Any]] = {
            "tojson": _to_json,
            "join": _join,
            "replace": _replace,
            "indent": _indent,
        }
        self.filters = {name: self.filters[name] for name in _FILTERS} | bounded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _draw_on_budget(template)
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes)) and attr not in _STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        budget.step()
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not offered; use ~ and filters")
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            budget.build(len(left) + len(right))
        if operator in ("*", "**"):
            _check_product(budget, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = _budget(__context)
        budget.step()
        owner = __obj.__self__ if isinstance(__obj, BuiltinMethodType) else None
        if isinstance(owner, str) and __obj.__name__ == "replace":
            return _replace(__context, owner, *args, **kwargs)
        if isinstance(owner, str) and __obj.__name__ == "join":
            return _join(__context, *args, d=owner, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def draw_rounds(self, context: Context, values: Iterable[Any]) -> Iterator[Any]:
        """The values of a loop, each drawing a step."""
        if isinstance(values, Undefined):
            return iter(values)
        budget = _budget(context)
        return _each(budget, values)

    def concatenate(self, context: Context, *values: Any) -> str:
        """The `~` operator."""
        budget = _budget(context)
        parts = [budget.text(value) for value in values]
        budget.build(sum(map(len, parts)))
        return "".join(parts)


def _each(budget: _Budget, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        budget.step()
        yield value


def _draw_on_budget(template: nodes.Template) -> None:
    """Rewrites every loop and every `~` to go through the environment's bounded forms."""
    for loop in template.find_all(nodes.For):
        loop.iter = _bounded_call("draw_rounds", [loop.iter])
    _replace_concatenations(template)


def _replace_concatenations(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_without_concat(item) for item in value])
        else:
            setattr(node, field, _without_concat(value))
    for child in node.iter_child_nodes():
        _replace_concatenations(child)


def _without_concat(value: Any) -> Any:
    if isinstance(value, nodes.Concat):
        return _bounded_call("concatenate", value.nodes)
    return value


def _bounded_call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method)
    return nodes.Call(function, [nodes.ContextReference(), *arguments], [], None, None)


def _budget(context: Context) -> _Budget:
    budget = context.parent[_BUDGET_KEY]
    assert isinstance(budget, _Budget)
    return budget


def _check_product(budget: _Budget, operator: str, left: Any, right: Any) -> None:
    for sequence, times in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(times, int):
            budget.build(len(sequence) * max(0, times))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length()
        if bits + right.bit_length() > _MAX_INTEGER_BITS:
            raise ChatTemplateError("the chat template makes too large a number")


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> str:
    budget = _budget(context)
    text = budget.text(value)
    budget.build(len(text))
    return text


@jinja2.pass_context
def _join(
    context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    budget = _budget(context)
    if attribute is not None:
        value = (context.environment.getitem(item, attribute) for item in value)
    parts: list[str] = []
    for item in value:
        budget.step()
        parts.append(budget.text(item))
        budget.build(len(parts[-1]) + len(d))
    return d.join(parts)


@jinja2.pass_context
def _replace(context: Context, s: Any, old: str, new: str, count: int | None = None) -> str:
    budget = _budget(context)
    text = budget.text(s)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    budget.build(len(text) + times * len(new))
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_context
def _indent(
    context: Context, s: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    budget = _budget(context)
    text = budget.text(s)
    budget.build(len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else 0))
    prefix = " " * width if isinstance(width, int) else width
    budget.build((text.count("\n") + 1) * len(prefix))
    lines = text.splitlines() or [""]
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
    budget = _budget(context)
    budget.look_through(value)
    if indent is not None and not 0 <= indent <= 8:
        raise ChatTemplateError("tojson takes an indent of 0 to 8")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
