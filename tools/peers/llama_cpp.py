"""llama.cpp on the GGUF file as it is."""

from __future__ import annotations

from pathlib import Path

from tools.peers.engine import Engine
from tools.peers.environment import PeerEnvironment

PACKAGES = ("xllamacpp==2026.10.11549",)
SERVER = Path(__file__).with_name("llama_cpp_server.py")


def make_engine(
    environments: Path, gguf: Path, *, num_threads: int, num_streams: int, max_len: int
) -> Engine:
    """Installs it if need be."""
    environment = PeerEnvironment(environments / "llama_cpp", PACKAGES)
    environment.make()
    return Engine(
        name="llama.cpp",
        weights="GGUF Q4_1",
        compute="int8 x 4 bits",
        weights_bytes=gguf.stat().st_size,
        kv_value_bytes=2,
        command=(
            str(environment.python),
            str(SERVER),
            str(gguf),
            "{port}",
            str(num_threads),
            str(num_streams),
            str(max_len),
        ),
        fields={"cache_prompt": False},
        notes=PACKAGES[0],
    )
