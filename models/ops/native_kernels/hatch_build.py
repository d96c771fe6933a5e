"""Compiles the library while the wheel is built, and puts it beside the package's `__init__`."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Tell hatchling of the library."""
        del version
        sys.path.insert(0, self.root)
        from build_kernels import build_library, find_compiler, sources_digest

        compiler = find_compiler()
        library = build_library(Path(mkdtemp(prefix="jaxserve-native-wheel-")), compiler)
        digest = library.with_name("sources.txt")
        digest.write_text(sources_digest(compiler), encoding="ascii")
        build_data["pure_python"] = False
        # No Python ABI is used, so one wheel serves every Python of this machine.
        machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{machine}"
        for file in (library, digest):
            build_data["force_include"][str(file)] = f"jaxserve_native/{file.name}"
