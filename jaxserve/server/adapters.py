"""Adapters that clients ask the server to load: only from below a folder of the operator's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.errors import InvalidRequest, NotSupported
from jaxserve.server.prompt_limits import at_most, num_bytes

if TYPE_CHECKING:
    from jaxserve.engine.adapter_names import ServedAdapter
    from jaxserve.server.state import Serving

MAX_PATH_BYTES = 1024


async def load_adapter(
    serving: Serving, lora_dir: Path | None, name: str, path: str
) -> ServedAdapter:
    """Loads the adapter in a folder below `lora_dir`, without holding up the event loop.

    Raises what `AdapterLoader.load` does; InvalidRequest naming `path` for another folder, and
    NotSupported if there is no `lora_dir`.
    """
    loader = serving.require_adapters()
    if lora_dir is None:
        raise NotSupported(
            "adapters are not loaded over the network here: start the server with --lora-dir, or "
            "give it --lora"
        )
    folder = await asyncio.to_thread(_folder_below, lora_dir, path)
    return await asyncio.to_thread(loader.load, name, folder, path)


def _folder_below(lora_dir: Path, path: str) -> Path:
    """Raises InvalidRequest unless the folder and its files lie below, links followed."""
    at_most("path", num_bytes("path", path), MAX_PATH_BYTES, "bytes")
    root = lora_dir.resolve()
    try:
        folder = (root / path).resolve()
        inner = [entry.resolve() for entry in folder.iterdir()] if folder != root else []
    except (OSError, ValueError, RuntimeError):  # A loop of links is a RuntimeError.
        inner = []
    if not inner or not all(one.is_relative_to(root) for one in (folder, *inner)):
        raise InvalidRequest(
            "path", "must lead to a folder with an adapter, below the server's --lora-dir"
        )
    return folder
