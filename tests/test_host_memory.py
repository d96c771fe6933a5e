"""A container's limit counts, not the host's memory."""

from __future__ import annotations

from pathlib import Path

import psutil

from jaxserve.host_memory import read_host_memory

GIB = 1 << 30


def test_a_container_limit_less_what_it_uses(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{GIB // 4}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 8}\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1024\n")
    memory = read_host_memory(tmp_path)
    assert memory.total_bytes == GIB // 4
    assert memory.available_bytes == GIB // 8 + 1024


def test_no_limit_is_the_host(tmp_path: Path) -> None:
    for text in (None, "max\n", f"{1 << 62}\n"):
        if text is not None:
            (tmp_path / "memory.max").write_text(text)
        assert read_host_memory(tmp_path).total_bytes == psutil.virtual_memory().total
