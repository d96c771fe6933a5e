"""TOML to frozen dataclasses: every error names the file, the field and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from jaxserve.errors import ConfigError
from jaxserve.trainer.errors import TrainConfigError

Config = TypeVar("Config")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's tables.

    Raises:
        TrainConfigError: it cannot be read or is no TOML; names the line.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise TrainConfigError(f"{path} is no TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainConfigError(
            f"{path} cannot be read: {reason}. Give the path of a training config, "
            "such as examples/train/tiny.toml"
        ) from None


def with_settings(table: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`table` with `a.b=VALUE` applied; VALUE is TOML, or else taken as text.

    Raises:
        TrainConfigError: a setting has no `=`, or goes through something that is no table.
    """
    changed = _copied(table)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise TrainConfigError(f"--set {setting}: write it as FIELD=VALUE, with a dot between "
                                   "table and field, as in optimizer.b1=0.9")  # fmt: skip
        *parents, last = name.strip().split(".")
        node = changed
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise TrainConfigError(f"--set {setting}: {parent} is a value, not a table")
        node[last] = _parsed(text.strip())
    return changed


def build(kind: type[Config], table: Mapping[str, Any], source: str) -> Config:
    """A config dataclass from a table; nested dataclasses are nested tables.

    Args:
        kind: the dataclass.
        table: its fields.
        source: where the table comes from, for messages.

    Raises:
        TrainConfigError: an unknown field (with the nearest known one), a missing one, or a
            value of another type.
    """
    return _build(kind, table, source, "")


def dump_toml(value: Any) -> str:
    """A config dataclass as TOML, with every field; `build` reads it back.

    Fields that are None are left out.
    """
    return "\n".join(_dump_table(to_plain(value), ())) + "\n"


def flat_fields(value: Any) -> dict[str, Any]:
    """Dotted field name -> JSON value, for every leaf of a config."""
    flat: dict[str, Any] = {}

    def visit(node: Any, prefix: str) -> None:
        for name, held in node.items():
            if isinstance(held, dict):
                visit(held, f"{prefix}{name}.")
            else:
                flat[prefix + name] = held

    visit(to_plain(value), "")
    return flat


def _build(kind: type[Config], table: Any, source: str, prefix: str) -> Config:
    if not isinstance(table, Mapping):
        raise TrainConfigError(f"{source}: {prefix.rstrip('.')} must be a table, [{prefix[:-1]}]")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for name in table:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(fields)}"
            raise TrainConfigError(f"{source}: unknown field {prefix}{name}; {hint}")
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], source, prefix + name)
        elif field.default is dataclasses.MISSING and (
            field.default_factory is dataclasses.MISSING
        ):
            raise TrainConfigError(f"{source}: {prefix}{name} is missing")
    try:
        return kind(**values)
    except (ValueError, ConfigError) as error:
        where = f", [{prefix[:-1]}]" if prefix else ""
        raise TrainConfigError(f"{source}{where}: {error}") from None


def _convert(hint: Any, value: Any, source: str, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        if len(options) == 1:
            return _convert(options[0], value, source, name)
        for option in options:
            try:
                return _convert(option, value, source, name)
            except TrainConfigError:
                continue
        raise _wrong(source, name, value, " or ".join(_describe(option) for option in options))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, source, f"{name}.")
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise _wrong(source, name, value, _describe(hint))
        return value
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _wrong(source, name, value, f"a table, [{name}]")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(source, name, value, "a list")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, one, source, f"{name}[{i}]") for i, one in enumerate(value))
    return _convertto_plain(hint, value, source, name)


def _convertto_plain(hint: Any, value: Any, source: str, name: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _wrong(source, name, value, "a finite number")
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise _wrong(source, name, value, _describe(hint))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(repr(choice) for choice in typing.get_args(hint))}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, str(hint))


def _wrong(source: str, name: str, value: Any, wanted: str) -> TrainConfigError:
    return TrainConfigError(f"{source}: {name} is {value!r}; it must be {wanted}")


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _copied(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _copied(value) if isinstance(value, Mapping) else value
        for name, value in table.items()
    }


def to_plain(value: Any) -> Any:
    """A config as dicts, lists and JSON scalars; fields that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_plain(held) for name, held in fields if held is not None}
    if isinstance(value, Mapping):
        return {name: to_plain(held) for name, held in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(one) for one in value]
    return value


def _dump_table(table: Mapping[str, Any], path: Sequence[str]) -> Iterable[str]:
    if path:
        yield f"\n[{'.'.join(path)}]"
    for name, value in table.items():
        if not isinstance(value, dict):
            yield f"{name} = {_dump(value)}"
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _dump_table(value, (*path, name))


def _dump(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, list):
        return f"[{', '.join(_dump(one) for one in value)}]"
    return repr(value)
