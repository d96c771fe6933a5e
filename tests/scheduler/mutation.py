"""Seeded bugs: the real source with a few words changed, swapped in for a while."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType

import pytest

_PATCHABLE = (FunctionType, property, classmethod, staticmethod)


@dataclass(frozen=True, slots=True)
class Edit:
    module: str
    """Below `jaxserve.engine`."""
    old: str
    """Must occur exactly once in the module's source."""
    new: str


@contextmanager
def mutated(edits: Sequence[Edit]) -> Iterator[None]:
    """Runs with `edits` applied to the engine's modules; all is put back after."""
    with pytest.MonkeyPatch.context() as patches:
        for name in dict.fromkeys(edit.module for edit in edits):
            module = importlib.import_module(f"jaxserve.engine.{name}")
            source = inspect.getsource(module)
            for edit in edits:
                if edit.module == name:
                    count = source.count(edit.old)
                    assert count == 1, f"{edit.old!r} occurs {count} times in {name}"
                    source = source.replace(edit.old, edit.new)
            _swap(patches, module, source)
        yield


def _swap(patches: pytest.MonkeyPatch, module: ModuleType, source: str) -> None:
    """Replaces methods of the module's classes and its functions, wherever imported."""
    namespace: dict[str, object] = {"__name__": module.__name__}
    exec(compile(source, f"<mutant of {module.__name__}>", "exec"), namespace)
    for name, original in list(vars(module).items()):
        if getattr(original, "__module__", None) != module.__name__:
            continue
        changed = namespace[name]
        if inspect.isclass(original):
            for attribute, value in list(vars(changed).items()):
                if isinstance(value, _PATCHABLE):
                    patches.setattr(original, attribute, value)
        elif inspect.isfunction(original):
            for user in _users(name, original):
                patches.setattr(user, name, changed)


def _users(name: str, original: object) -> list[ModuleType]:
    modules = [m for n, m in sys.modules.items() if n.startswith("jaxserve.engine")]
    return [module for module in modules if getattr(module, name, None) is original]
