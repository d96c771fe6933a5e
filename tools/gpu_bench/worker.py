"""Runs one part in a process of its own: `python -m tools.gpu_bench.worker PART OPTIONS OUT`.

OPTIONS and OUT are JSON files. The GPU's memory is free again when the process ends, and a part
that fails costs the others nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.gpu_bench.case import DRY, GPU, Case

Options = Mapping[str, Any]


def _case(options: Options) -> Case:
    return DRY if options["small"] else GPU


def _battery(options: Options) -> dict[str, Any]:
    from time import perf_counter

    from tools.gpu_attention_check import run_parts

    parts = ["battery", "sm80", "bits"]
    return run_parts(parts, options["compute_capability"], perf_counter(), options["limit_s"])


def _ceilings(options: Options) -> dict[str, Any]:
    import jax

    from tools.gpu_bench import ceilings

    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "0")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "compute_capability": int(float(capability) * 10),
        "jax": jax.__version__,
        **ceilings.measure(_case(options)),
    }


def _steps(options: Options) -> dict[str, Any]:
    from tools.gpu_bench import steps

    settings = steps.step_settings(_case(options), Path(options["cache_dir"]), options["attention"])
    return steps.measure(_case(options), settings, options["rates"], options["profile"])


def _engine(options: Options) -> dict[str, Any]:
    from tools.gpu_bench import throughput

    cache_dir, attention = Path(options["cache_dir"]), options["attention"]
    return throughput.measure(_case(options), options["num_requests"], cache_dir, attention)


def _peer(options: Options) -> dict[str, Any]:
    from tools.gpu_bench import transformers_peer

    return transformers_peer.measure_continuous_batching(
        _case(options), options["num_requests"], options["limit_s"]
    )


def _static(options: Options) -> dict[str, Any]:
    from tools.gpu_bench import transformers_peer

    return transformers_peer.measure_static_cache(_case(options), options["batch_size"])


PARTS: Mapping[str, Callable[[Options], dict[str, Any]]] = {
    "battery": _battery,
    "ceilings": _ceilings,
    "steps": _steps,
    "engine": _engine,
    "peer": _peer,
    "static": _static,
}


def main() -> None:
    """See the file's head."""
    part, options, out = sys.argv[1:]
    result = PARTS[part](json.loads(Path(options).read_text()))
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
