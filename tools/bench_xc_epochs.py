"""How long an epoch takes by each sampler: its steps, and its share of a refresh.

    python tools/bench_xc_epochs.py --data build/wordnet

Each method, with the batch of the study (as many texts a step), starts afresh in every round: step
0 refreshes, the steps after it are timed. Methods take turns; the first round, which compiles, is
left out. Prints a line of JSON for each method, then the ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from jaxserve.engine.compilation import use_compilation_cache
from jaxserve.model_store import default_root
from jaxserve.trainer.run_identity import make_world
from jaxserve.trainer.xc_runner import XcRunner, build_runner
from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.encoders import spec_of
from tools.xc_study.plan import METHODS, Plan

COMPARED = ("random", "ngame", "ngame_centroid", "ance")


def runner_of(plan: Plan, dataset: XcDataset, method: str) -> XcRunner:
    """Of a run that begins with a refresh."""
    config = plan.encoder_config(method, 0)
    assert config.xc is not None
    config = replace(
        config, xc=replace(config.xc, sampler=replace(config.xc.sampler, warmup_epochs=0))
    )
    assert config.xc is not None
    spec = spec_of(config.xc.encoder, dataset)
    return build_runner(config, make_world(config), jax.devices()[:1], None, dataset, spec, None)


def one_round(runner: XcRunner, num_steps: int) -> tuple[float, float]:
    """Seconds of a refresh, and the median of the steps after it."""
    runner.load_state(None)
    mining_s = runner.run_step(0).data_wait_s
    seconds = []
    for step in range(1, num_steps + 1):
        begin_s = time.perf_counter()
        jax.block_until_ready(runner.run_step(step).loss)
        seconds.append(time.perf_counter() - begin_s)
    return mining_s, float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a prepared data set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--refresh-every", type=int, default=2, help="tau, epochs")
    options = parser.parse_args()
    use_compilation_cache(default_root() / "xla")
    dataset = XcDataset(options.data)
    num_points = dataset.split("train").labels.num_points
    plan = Plan(data=options.data, out=Path("unused"), num_points=num_points)
    runners = {method: runner_of(plan, dataset, method) for method in COMPARED}
    rounds = [
        {method: one_round(runner, options.steps) for method, runner in runners.items()}
        for _ in range(1 + options.rounds)
    ][1:]
    epoch_s = {}
    for method in COMPARED:
        mining_s, step_s = (
            float(np.median([one[method][part] for one in rounds])) for part in (0, 1)
        )
        steps = num_points / METHODS[method].batch_size
        epoch_s[method] = steps * step_s + mining_s / options.refresh_every
        fields = {
            "method": method,
            "batch_size": METHODS[method].batch_size,
            "refresh_s": round(mining_s, 3),
            "step_ms": round(1e3 * step_s, 1),
            "rounds": [[round(one, 4) for one in single[method]] for single in rounds],
            "epoch_s": round(epoch_s[method], 2),
            "mining_share": round(mining_s / options.refresh_every / (steps * step_s), 4),
        }
        print(json.dumps(fields), flush=True)
    print(
        json.dumps(
            {f"{one} / ngame": round(epoch_s[one] / epoch_s["ngame"], 3) for one in COMPARED}
        )
    )


if __name__ == "__main__":
    main()
