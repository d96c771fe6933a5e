"""Adapters on meshes of virtual devices, in a process of its own.

    python -m tests.engine.adapter_mesh_run MODEL ADAPTER OTHER CACHE_DIR MESH...

Prints JSON: mesh -> token ids of requests with no adapter, with ADAPTER, and with OTHER, which is
loaded while the server runs; and the compilations meanwhile.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxserve.engine.launch import start_devices

NUM_DEVICES = 4


def main(model: str, adapter: str, other: str, cache_dir: str, *meshes: str) -> None:
    start_devices(NUM_DEVICES)

    from jaxserve.engine.config import EngineConfig
    from jaxserve.engine.offline import complete_in_order
    from jaxserve.engine.request import GenerationRequest
    from jaxserve.engine.sampling_params import SamplingParams
    from jaxserve.engine.startup import start_engine
    from models.mesh_shape import parse_mesh

    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    found = {}
    for mesh in meshes:
        running = start_engine(
            EngineConfig(
                model=model,
                mesh=parse_mesh(mesh),
                virtual_devices=NUM_DEVICES,
                kernels="xla",
                token_budget=8,
                buckets="one",
                max_num_seqs=4,
                max_model_len=64,
                page_size=4,
                lora=(("first", Path(adapter)),),
                max_loras=2,
                compilation_cache_dir=Path(cache_dir),
            )
        )
        try:
            running.adapters.load("second", Path(other))
            requests = [
                GenerationRequest(name or "base", tuple(range(40, 60)), greedy, adapter=name)
                for name in ("", "first", "second")
            ]
            outputs = complete_in_order(running.engine, requests, max_ahead=3)
            found[mesh] = [list(one.token_ids) for one in outputs]
            assert running.engine.snapshot().compiles_after_ready == 0
        finally:
            running.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
