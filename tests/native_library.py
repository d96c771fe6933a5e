"""The native kernels for tests: compiled once for each version of their sources, and kept."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from models.ops.native import NativeLibrary, is_installed, load_library

SOURCES = Path(__file__).parents[1] / "models" / "ops" / "native_kernels"


@cache
def builder() -> ModuleType:
    """`build_kernels.py`, which lies in a distribution of its own."""
    spec = importlib.util.spec_from_file_location("build_kernels", SOURCES / "build_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def native_library() -> NativeLibrary:
    """Loads the installed one, or another one; skips where there is no compiler."""
    build = builder()
    if is_installed():
        # A process can load one library only, and this is what its servers take.
        import jaxserve_native

        installed = jaxserve_native.SOURCES_PATH.read_text(encoding="ascii")
        if installed != build.sources_digest(build.find_compiler()):
            pytest.fail("the installed kernels are not those of the sources: run `make native`")
        return load_library()
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        path = build.build_cached_library(cache_home / "jaxserve" / "native-tests")
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    return load_library(path)
