"""Fixtures that every area shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How fast examples are made depends on what else the machine does.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

DEFAULT_MODEL = "smollm2-135m-instruct"
SLOWEST_FILES = (
    "trainer/test_real_runs.py",
    "real/test_smollm2_engine.py",
    "server/test_server_leaks.py",
    "trainer/numerics/test_numerics_bits.py",
    "step/test_meshes.py",
    "engine/test_engine_flags.py",
    "migration/test_damage.py",
    "group/test_group_server.py",
    "step/test_families.py",
)
"""Of the long tests. A file's tests stay together, so that one of these at the end would keep a
worker long after the others have nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the slowest files."""
    folder = Path(__file__).parent
    rank = {folder / name: index for index, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache() -> Path:
    """Keeps compiled programs of the tests between sessions.

    Tiny models compile to the same programs in many tests and in every run.
    The directory holds native code, so only its owner may enter it.
    """
    import jax

    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache_home / "jaxserve" / "xla-tests"
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """XLA leaves most optimisations out: for tests that compile much and compute little."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, pulled at first use."""
    from jaxserve import model_store

    return model_store.resolve(DEFAULT_MODEL)
