"""One of several processes of a run: `numerics_process.py OUT CACHE PORT NUM_PROCESSES INDEX`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from numerics_rig import CONFIG, make_runner

from jaxserve.trainer.launch import Place, set_up_jax


def main() -> None:
    out, cache, port, num_processes, index = sys.argv[1:]
    set_up_jax(Place(int(index), int(num_processes), 1, f"127.0.0.1:{port}", cache))
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
