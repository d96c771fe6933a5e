"""Rules of the code base that ruff cannot express, checked on the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxserve", "models", "checkpoint", "schedules", "tools")

_HOST_ONLY = ("jax", "jaxlib", "flax", "optax", "models", "time", "datetime")
LAYERS = {
    "": ("tests",),
    "jaxserve/": ("tools",),
    "checkpoint/": ("jaxserve", "models", "tools"),
    "models/": ("jaxserve", "tools"),
    "schedules/": ("jaxserve", "models", "checkpoint", "tools"),
    "jaxserve/engine/": ("jaxserve.server", "jaxserve.cli", "grpc"),
    "jaxserve/engine/scheduler/": _HOST_ONLY,
    "jaxserve/engine/pages.py": _HOST_ONLY,
    "jaxserve/engine/encoder/scheduler.py": _HOST_ONLY,
    "jaxserve/engine/encoder/plan.py": _HOST_ONLY,
    "jaxserve/server/": ("jaxserve.cli",),
}
"""Path prefix -> what modules there must not import: calls run downwards only,
and the scheduler is plain Python that reads no clock."""

# Unpickling runs whatever code the bytes say; YAML's default loader does too.
UNSAFE_MODULES = ("pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
UNSAFE_CALLS = (
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "multiprocessing.connection.Listener",
    "multiprocessing.connection.Client",
)
UNPICKLING_ATTRIBUTES = ("serialize_executable", "deserialize_and_load")
READABLE_VARIABLES = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR")
"""Places of the user's own. Behaviour is set by options, never by variables."""
LAUNCHERS = ("jaxserve/trainer/launch.py", "jaxserve/engine/launch.py", "jaxserve/distributed.py")
"""Set variables that XLA reads when it starts, of their own process or of those they start."""


def offences(source: str, path: str) -> list[str]:
    """What `source`, lying at `path` below the root, does against the rules."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    found = [
        (node.lineno, text)
        for node in ast.walk(tree)
        for rule in (_layer_rule, _pickle_rule, _call_rule, _global_rule)
        for text in rule(node, path, names)
    ]
    if path not in LAUNCHERS:
        found += list(_environment_rule(tree, names))
    return [f"{path}:{line}: {text}" for line, text in sorted(found)]


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for: {"np": "numpy", "load": "numpy.load"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return "?"


def _is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _layer_rule(node: ast.AST, path: str, _: dict[str, str]) -> Iterator[str]:
    for name in _imports(node):
        for prefix, forbidden in LAYERS.items():
            if path.startswith(prefix) and _is_within(name, forbidden):
                yield f"imports {name}, which {prefix or 'nobody'} must not"


def _pickle_rule(node: ast.AST, _path: str, _names: dict[str, str]) -> Iterator[str]:
    for name in _imports(node):
        if _is_within(name, UNSAFE_MODULES) or set(name.split(".")) & set(UNPICKLING_ATTRIBUTES):
            yield f"imports {name}, which unpickles"
    if isinstance(node, ast.Attribute) and node.attr in UNPICKLING_ATTRIBUTES:
        yield f"uses {node.attr}, which unpickles"


def _call_rule(node: ast.AST, _path: str, names: dict[str, str]) -> Iterator[str]:
    if not isinstance(node, ast.Call):
        return
    called = _dotted(node.func, names)
    if called in UNSAFE_CALLS:
        yield f"calls {called}"
    if called == "numpy.load":
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("allow_pickle", None) and not is_false:
                yield "calls numpy.load with allow_pickle"


def _global_rule(node: ast.AST, _path: str, _names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Global):
        yield f"global {', '.join(node.names)}"


def _environment_rule(tree: ast.Module, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Named reads may name a place of the user's; a subprocess may be handed the
    whole environment (`env={**os.environ, ...}`); assignments are not reads."""
    named: set[ast.AST] = set()
    for node in ast.walk(tree):
        key: ast.AST | None = None
        if isinstance(node, ast.Subscript) and _dotted(node.value, names) == "os.environ":
            key, source = node.slice, node.value
            if not isinstance(node.ctx, ast.Load):
                named.add(source)
                continue
        elif isinstance(node, ast.Call) and node.args:
            called = _dotted(node.func, names)
            if called == "os.getenv":
                key, source = node.args[0], node.func
            elif called in ("os.environ.get", "os.environ.setdefault", "os.environ.pop"):
                key, source = node.args[0], node.func.value  # type: ignore[attr-defined]
        elif isinstance(node, ast.keyword) and node.arg == "env":
            named.update(ast.walk(node.value))
        if key is not None:
            named.add(source)
            variable = key.value if isinstance(key, ast.Constant) else ast.unparse(key)
            if variable not in READABLE_VARIABLES:
                yield node.lineno, f"reads the environment variable {variable}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and node not in named:
            name = _dotted(node, names)
            if name in ("os.environ", "os.environb", "os.getenv"):
                yield node.lineno, f"uses {name} as a whole"


def _modules() -> list[Path]:
    return sorted(
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if not path.stem.endswith(("_pb2", "_pb2_grpc"))
    )


def test_code_base_keeps_the_rules() -> None:
    modules = _modules()
    assert len(modules) > 30
    found = [
        text
        for path in modules
        for text in offences(path.read_text(), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("import pickle", "jaxserve/x.py"),
        ("from pickle import loads", "tools/x.py"),
        ("def f():\n    import cloudpickle", "checkpoint/x.py"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "checkpoint/x.py"),
        ("import numpy as np\nnp.load(f, **options)", "checkpoint/x.py"),
        ("from numpy import load as read\nread(f, allow_pickle=flag)", "checkpoint/x.py"),
        ("import torch\ntorch.load(f)", "tools/x.py"),
        ("import yaml\nyaml.load(f)", "jaxserve/x.py"),
        ("from jax.experimental import serialize_executable", "jaxserve/x.py"),
        ("jax.experimental.serialize_executable.serialize(c)", "jaxserve/x.py"),
        ("from multiprocessing.connection import Listener\nListener(a)", "jaxserve/x.py"),
        ("import jax", "jaxserve/engine/scheduler/x.py"),
        ("from time import monotonic", "jaxserve/engine/scheduler/x.py"),
        ("import jax.numpy as jnp", "jaxserve/engine/pages.py"),
        ("from jaxserve.errors import ConfigError", "models/x.py"),
        ("import models.llama", "checkpoint/x.py"),
        ("from models import llama", "checkpoint/x.py"),
        ("import checkpoint", "schedules/x.py"),
        ("from jaxserve.server import convert", "jaxserve/engine/x.py"),
        ("from tools import demo", "jaxserve/x.py"),
        ("def f():\n    global n\n    n = 1", "models/x.py"),
        ("import os\nos.environ['JAXSERVE_FAST']", "jaxserve/x.py"),
        ("import os\nos.environ.get('JAXSERVE_FAST')", "models/x.py"),
        ("import os\nos.getenv(name)", "models/x.py"),
        ("from os import environ\nenviron.get('FAST')", "models/x.py"),
        ("import os\n'FAST' in os.environ", "models/x.py"),
        ("import os\nrun(env={'A': os.environ.get('FAST')})", "models/x.py"),
    ],
)
def test_planted_offence_is_found(source: str, path: str) -> None:
    assert len(offences(source, path)) == 1


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("import numpy as np\nnp.load(f, allow_pickle=False)", "checkpoint/x.py"),
        ("import os\nos.environ.get('XDG_CACHE_HOME')", "jaxserve/x.py"),
        ("import os\nrun(env={**os.environ, 'A': 'b'})", "jaxserve/x.py"),
        ("import os\nos.environ['A'] = 'b'", "jaxserve/x.py"),
        ("import jax", "jaxserve/engine/step.py"),
        ("from checkpoint.errors import FormatError", "models/x.py"),
        ("import jaxlike", "jaxserve/engine/scheduler/x.py"),
    ],
)
def test_lawful_code_is_left_alone(source: str, path: str) -> None:
    assert offences(source, path) == []


@pytest.mark.parametrize(
    "module", ["jaxserve.engine.scheduler", "jaxserve.engine.pages", "jaxserve.engine.plan"]
)
def test_scheduler_loads_no_jax_by_any_road(module: str) -> None:
    program = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
