"""Where the compiled kernels lie; `models.ops.native` loads them."""

from __future__ import annotations

from pathlib import Path

LIBRARY_PATH = Path(__file__).parent / "libjaxserve_native.so"
SOURCES_PATH = Path(__file__).parent / "sources.txt"
"""Holds the digest of what it was compiled from, by `build_kernels.sources_digest`."""
