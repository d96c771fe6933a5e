"""Traces on 8 virtual devices: `xc_worker.py FOLDER OUT CACHE PLANS CASE...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxserve.engine.compilation import use_compilation_cache
from tests.xc.xc_rig import tiny_config, trace

SAMPLERS = {
    "ngame": (),
    "zero1": ("placement.sharding='zero1'",),
    "softmax": ("xc.loss.name='softmax'", "placement.sharding='fsdp'"),
    "bank": ("xc.sampler.memory_bank=true",),
    "centroid": (
        "xc.sampler.name='ngame_centroid'",
        "xc.sampler.num_mined=16",
        "xc.sampler.pool=4",
    ),
    "ance": ("xc.sampler.name='ance'", "xc.sampler.pool=4"),
}
"""Case -> settings. A refresh falls into step 7: 111 training points, 16 a step."""
FAST = ([(1, 9)], [(2, 7), (3, 2)])
LONG = ([(1, 9)], [(8, 9)], [(3, 6), (1, 1), (5, 2)])


def main() -> None:
    folder, out, cache, plans, *cases = sys.argv[1:]
    use_compilation_cache(Path(cache))
    found = {}
    for case in cases:
        settings = SAMPLERS.get(case, ())
        if case == "classifiers":
            settings = ("xc.stage='classifiers'", f"xc.encoder_run={folder}/encoder")
        config = tiny_config(Path(folder), *settings)
        found[case] = [trace(config, plan) for plan in {"fast": FAST, "long": LONG}[plans]]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
