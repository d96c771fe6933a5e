"""jaxserve: serves language models with compiled JAX steps of fixed shapes.

The distribution installs packages with plain names (`jaxserve`, `models`,
`checkpoint`, `schedules`). Python takes the first `models` on its path, so a `models.py`
in the working directory could be run in place of ours; importing `jaxserve`
checks for that first and says what to do.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"

SIBLING_PACKAGES = ("models", "checkpoint", "schedules")
"""Packages of this distribution, in folders beside this package's."""


def foreign_packages() -> dict[str, str]:
    """Sibling packages that Python would take from elsewhere.

    Nothing is imported: only where each would come from is looked up.

    Returns:
        Package name -> the file Python would load, or "nothing" if there is none.
    """
    root = Path(__file__).resolve().parent.parent
    return {
        name: found
        for name in SIBLING_PACKAGES
        if (found := _location(name)) != str(root / name / "__init__.py")
    }


def _location(name: str) -> str:
    loaded = sys.modules.get(name)
    if loaded is not None:
        origin = getattr(loaded, "__file__", None)
    else:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
    return str(Path(origin).resolve()) if origin else "nothing"


def _require_own_packages() -> None:
    foreign = foreign_packages()
    if foreign:
        found = ", ".join(f"`{name}` is {origin}" for name, origin in foreign.items())
        raise ImportError(
            f"jaxserve needs its own packages {', '.join(SIBLING_PACKAGES)}, but {found}. "
            "A file or package of that name comes first on Python's path, often because it lies in "
            "the working directory: start from another directory, run the `jaxserve` command or "
            "`python -P` (neither looks there), or rename it. If another installed package owns "
            "the name, install jaxserve in an environment of its own."
        )


_require_own_packages()
