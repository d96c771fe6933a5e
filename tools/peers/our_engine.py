"""Our own server, in this environment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tools.peers.engine import Engine


def make_engine(
    name: str,
    model: Path,
    options: Sequence[str],
    *,
    weights: str,
    compute: str,
    weights_bytes: int,
    kv_value_bytes: int,
    num_streams: int,
    max_len: int,
) -> Engine:
    """One way to serve a model.

    Args:
        name: in the table.
        model: GGUF file or folder of safetensors.
        options: of `jaxserve serve`, beyond the common ones.
        weights: their format.
        compute: what products are computed in.
        weights_bytes: as they are held in memory.
        kv_value_bytes: of one number in the KV cache.
        num_streams: most requests at once.
        max_len: longest request.
    """
    return Engine(
        name=name,
        weights=weights,
        compute=compute,
        weights_bytes=weights_bytes,
        kv_value_bytes=kv_value_bytes,
        command=(
            *(sys.executable, "-m", "jaxserve", "serve", "--model", str(model)),
            *("--grpc-port", "0", "--http-port", "{port}"),
            *("--max-num-seqs", str(num_streams), "--max-model-len", str(max_len)),
            *("--compilation-cache-dir", "{cache}"),
            *options,
        ),
        health_path="/health/ready",
        notes=" ".join(options),
    )
