"""Runs one training in many arrangements of virtual devices and writes down their bits.

`python numerics_worker.py OUT.json CACHE_DIR SCENARIO...`, with 8 virtual devices.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import pytest
from numerics_rig import CONFIG, MODEL, SEQ_LEN, WORLD, Trace, make_runner, run

from jaxserve.trainer import exact_gradient
from jaxserve.trainer.errors import DeviceFault
from jaxserve.trainer.shard_gradient import init_trainable, shard_gradient
from jaxserve.trainer.step_config import OPTIMIZER_OPTIONS, IncidentConfig, OptimizerConfig
from jaxserve.trainer.world import LogicalWorld
from models.lora import LoraConfig
from schedules import ScheduleConfig, TunerConfig

Arrangements = dict[str, Trace]
TIED = dataclasses.replace(MODEL, tie_word_embeddings=True)
LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))


def arrangement(num_devices: int, sharding: str = "replicated", **changes: Any) -> dict[str, Any]:
    config = dataclasses.replace(changes.pop("config", CONFIG), sharding=sharding)
    return {"num_devices": num_devices, "config": config, **changes}


def same_run(num_steps: int, arrangements: list[tuple[int, str]], **changes: Any) -> Arrangements:
    return {
        f"{num_devices} {sharding}": run(
            make_runner(**arrangement(num_devices, sharding, **changes)), num_steps
        )
        for num_devices, sharding in arrangements
    }


def devices() -> Arrangements:
    """Every number of devices, and every sharding."""
    plain = [(number, "replicated") for number in range(1, 9)]
    return same_run(3, [*plain, (3, "zero1"), (5, "fsdp")])


def shardings() -> Arrangements:
    """Splits of the state that divide it evenly, unevenly, and not at all."""
    split = {"zero1": (2, 7, 8), "fsdp": (1, 4, 6, 8)}
    arrangements = [(number, kind) for kind, numbers in split.items() for number in numbers]
    return same_run(3, [(1, "replicated"), *arrangements])


def weights() -> Arrangements:
    """Devices of unequal speed get unequal shares."""
    traces = same_run(2, [(1, "replicated")])
    runner = make_runner(3, weights=[1.0, 0.2, 0.7])
    assert [len(part) for part in runner.ranges] == [4, 1, 3]
    traces["3 unequal"] = run(runner, 2)
    return traces


def variants() -> Arrangements:
    """Tied embeddings, bfloat16 parameters and products, averages, two micro-batches a shard."""
    config = dataclasses.replace(
        CONFIG,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        remat="dots",
        optimizer=OptimizerConfig(name="lion", weight_decay=0.1, ema_decay=0.9, clip_norm=0.1),
    )
    world = dataclasses.replace(WORLD, micro_batch_size=1, num_logical_shards=4)
    return same_run(
        3,
        [(1, "replicated"), (2, "zero1"), (3, "fsdp")],
        config=config,
        world=world,
        model=TIED,
    )


def lora() -> Arrangements:
    """Adapters beside frozen parameters."""
    return same_run(
        3,
        [(1, "replicated"), (2, "zero1"), (3, "fsdp")],
        lora=LORA,
        base_params=init_trainable(MODEL, None, 1),
    )


def resized() -> Arrangements:
    """Stops at steps 2, 3 and 5 and goes on with other devices and shardings."""
    traces = same_run(6, [(1, "replicated")])
    traces["8 > 3 > 1 > 5"] = chain(
        [(8, "replicated", 2), (3, "fsdp", 1), (1, "zero1", 2), (5, "replicated", 1)]
    )
    return traces


def tuned() -> Arrangements:
    """A rate that tunes itself, stopped at all places of its first probe and inside its second.

    A batch is measured every two updates, before those of steps 2, 4, 6 and 8.
    """
    rate = TunerConfig(
        total_steps=24, initial_lr=1e-4, probe_every=4, num_batches=2, max_ramp_fraction=0.5
    )
    changes = {"rate": rate}
    traces = same_run(10, [(1, "replicated"), (2, "zero1")], **changes)
    stops = [(3, "replicated", 3), (1, "fsdp", 1), (2, "replicated", 1)]
    stops += [(2, "zero1", 2), (3, "fsdp", 3)]
    traces["3 > 1 > 2 > 2 > 3"] = chain(stops, **changes)
    rates = {float(record.lr) for record in traces["1 replicated"].records}
    assert len(rates) > 1, "no probe has moved the rate"
    return traces


def knee() -> Arrangements:
    """The explore-exploit schedule, stopped in its exploring phase."""
    rate = ScheduleConfig(kind="knee", peak_value=3e-3, total=6, warmup=1)
    traces = same_run(5, [(1, "replicated")], rate=rate)
    traces["2 > 3"] = chain([(2, "zero1", 2), (3, "fsdp", 3)], rate=rate)
    return traces


def spike() -> Arrangements:
    """Updates dropped for their loss, whose history outlives a change of devices."""
    incidents = IncidentConfig(policy="skip", spike_sigmas=1.0, window=4, min_history=2)
    rate = ScheduleConfig(kind="constant", peak_value=0.1)
    config = dataclasses.replace(CONFIG, incidents=incidents)
    traces = same_run(6, [(1, "replicated")], config=config, rate=rate)
    verdicts = {record.verdict for record in traces["1 replicated"].records}
    assert verdicts == {"applied", "skipped"}, verdicts
    traces["3 > 2"] = chain([(3, "replicated", 3), (2, "zero1", 3)], config=config, rate=rate)
    return traces


def optimizer(name: str) -> Arrangements:
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(name=name, weight_decay=0.1))
    return same_run(3, [(1, "replicated"), (3, "zero1"), (2, "fsdp")], config=config)


def ordered() -> Arrangements:
    """Mode "ordered" promises closeness only; the caller compares losses."""
    world = dataclasses.replace(WORLD, mode="ordered")
    rate = ScheduleConfig(kind="cosine", peak_value=3e-3, total=100, warmup=5)
    traces = {
        f"{number} {sharding}": run(
            make_runner(**arrangement(number, sharding, world=world, rate=rate)), 100
        )
        for number, sharding in ((2, "replicated"), (8, "zero1"))
    }
    traces["1 replicated"] = run(make_runner(1, rate=rate), 100)
    return traces


def corrupted() -> Arrangements:
    """A bit flips in a gradient, and later one in a copy of the parameters."""
    traces = same_run(3, [(1, "replicated")])
    config = dataclasses.replace(CONFIG, replay_every=1)
    runner = make_runner(**arrangement(3, config=config))
    flips = [(1, jax.devices()[1])]
    with patch.object(exact_gradient, "shard_gradient", flipping(flips)):
        traces["3 with a flip"] = run(runner, 3)
    assert not flips, "the fault did not hit"
    found = [record.corrupted_device for record in traces["3 with a flip"].records]
    assert [one is not None for one in found] == [False, True, False], found
    assert found[1] is not None
    assert found[1].startswith("device 1 "), found

    runner = make_runner(**arrangement(3, config=config))
    runner.load_state(None)
    runner.run_step(0)
    state = runner._states[2]
    state.moments = state.moments._replace(master=flipped(state.moments.master))
    with pytest.raises(DeviceFault, match="device 2 "):
        runner.run_step(1)
    runner.close()
    return traces


def clean() -> Arrangements:
    """Two thousand steps in which no replay may find anything."""
    world = LogicalWorld(
        global_batch_size=2, num_logical_shards=2, micro_batch_size=1, seq_len=SEQ_LEN
    )
    config = dataclasses.replace(CONFIG, dropout=0.0)
    rate = ScheduleConfig(kind="constant", peak_value=1e-4)
    changes = {"world": world, "rate": rate}
    checked = dataclasses.replace(config, replay_every=1)
    traces = {
        "1 replicated": run(make_runner(**arrangement(1, config=config, **changes)), 2000),
        "2 checked": run(make_runner(**arrangement(2, config=checked, **changes)), 2000),
    }
    found = {record.corrupted_device for record in traces["2 checked"].records}
    assert found == {None}, found
    return traces


def flipped(vector: jax.Array) -> jax.Array:
    host = np.array(vector)
    host.reshape(-1).view(np.uint32)[7] ^= 1 << 12
    return jax.device_put(host, vector.device)


def flipping(flips: list[tuple[int, jax.Device]]) -> Callable[..., Any]:
    """`shard_gradient` that flips a bit in one result at each (step, device) of `flips`."""

    def gradient(spec: Any, params: Any, base: Any, rows: Any, step: Any, num_tokens: Any) -> Any:
        vector, tail = shard_gradient(spec, params, base, rows, step, num_tokens)
        if (int(step), rows.device) in flips:
            flips.remove((int(step), rows.device))
            vector = flipped(vector)
        return vector, tail

    return gradient


def chain(stages: list[tuple[int, str, int]], **changes: Any) -> Trace:
    """(devices, sharding, steps) one after the other, each from the last one's buffer."""
    records, buffer = [], None
    for num_devices, sharding, num_steps in stages:
        trace = run(make_runner(**arrangement(num_devices, sharding, **changes)), num_steps, buffer)
        records += trace.records
        buffer = trace.buffer
    assert buffer is not None
    return Trace(records, buffer)


SCENARIOS: dict[str, Callable[[], Arrangements]] = {
    one.__name__: one
    for one in (
        *(devices, shardings, weights, variants, lora, resized, tuned),
        *(knee, spike, ordered, corrupted, clean),
    )
} | {f"optimizer-{name}": (lambda name=name: optimizer(name)) for name in OPTIMIZER_OPTIONS}


def main() -> None:
    out, cache, *names = sys.argv[1:]
    assert jax.device_count() == 8, jax.devices()
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    found = {}
    for name in names:
        found[name] = {
            label: {
                "digest": trace.digest,
                "bits": trace.bits,
                "ids": [record.ids_sha256 for record in trace.records],
                "losses": [float(record.loss) for record in trace.records],
                "is_finite": bool(np.isfinite(trace.records[-1].loss)),
            }
            for label, trace in SCENARIOS[name]().items()
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
