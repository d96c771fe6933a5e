"""One of several processes of a run: `numerics_process.py OUT CACHE PORT NUM_PROCESSES INDEX`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from numerics_rig import CONFIG, make_runner


def main() -> None:
    out, cache, port, num_processes, index = sys.argv[1:]
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(num_processes), int(index))
    config = dataclasses.replace(CONFIG, sharding="zero1", replay_every=2)
    runner = make_runner(int(num_processes), config=config)
    runner.load_state(None)
    records = [runner.run_step(step) for step in range(3)]
    # Bytes of other processes stay as they are here.
    buffer = np.full(runner.layout.size_bytes, 0xCD, np.uint8)
    runner.store_state(buffer)
    runner.close()
    Path(f"{out}.{index}").write_bytes(buffer.tobytes())
    found = {
        "ranges": runner.state_ranges(),
        "losses": [record.loss.tobytes().hex() for record in records],
        "read": runner._reader.leaves,
    }
    Path(f"{out}.{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
