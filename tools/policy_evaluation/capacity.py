"""SL3: the highest rate that keeps a TBT objective, through the socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.client import Client
from jaxserve.engine.config import EngineConfig
from jaxserve.loadgen.generator import run_open_loop
from jaxserve.loadgen.records import LoadRecord
from jaxserve.loadgen.schedule import LoadShape, make_schedule
from jaxserve.loadgen.server_process import own_server
from jaxserve.simulator.arrivals import ArrivalProcess
from tools.policy_evaluation.open_loop import saturated_qps
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.verdict import Check, NoiseMeter, Outcome

MAX_DELAY_S = 2.0
START_LOAD = 0.6
"""First rate, as a share of what full steps of the token budget compute."""
FACTOR = 1.3
MAX_PROBES = 6


@dataclass(frozen=True, slots=True)
class SocketProbe:
    qps: float
    tbt_p99_s: float
    delay_p50_s: float
    num_failed: int
    void_reasons: tuple[str, ...]

    def meets(self, slo_s: float) -> bool:
        return not self.num_failed and self.tbt_p99_s <= slo_s and self.delay_p50_s <= MAX_DELAY_S


def socket_capacity(rig: Rig, *, num_requests: int = 48, seed: int = 1) -> Outcome:
    """SL3. `jaxserve serve` with one flag changed; ShareGPT lengths scaled to the context."""
    if not rig.point.is_file:
        raise ValueError(
            f"operating point {rig.point.name} has no model file to serve: leave out sl3"
        )
    meter = NoiseMeter(rig)
    meter.sample()
    slo_s = 5 * meter.median_s("decode")
    point = rig.point
    first_qps = START_LOAD * saturated_qps(
        point.context, point.token_budget, meter.median_s("full")
    )
    capacity: dict[str, float] = {}
    probes: dict[str, list[SocketProbe]] = {}
    for policy in ("sarathi", "vllm_v0"):
        config = EngineConfig(
            model=str(rig.model),
            dtype=rig.point.dtype,
            policy=policy,
            token_budget=rig.point.token_budget,
            max_num_seqs=rig.point.max_num_seqs,
            max_model_len=rig.point.context,
            kv_cache_bytes=rig.point.pool_bytes,
            prefix_caching=False,
        )
        start_qps = capacity.get("sarathi", first_qps * 2) / 2 or first_qps / 8
        with _placed_server(rig, config) as address:
            capacity[policy], probes[policy] = _search(
                address, slo_s, start_qps, num_requests, seed
            )
        meter.sample()
    voids = [reason for found in probes.values() for one in found for reason in one.void_reasons]
    # If even the slowest rate was too fast, the true ratio is larger than this one.
    rival = capacity["vllm_v0"] or min(one.qps for one in probes["vllm_v0"])
    return Outcome(
        "sl3",
        (Check("capacity sarathi / vllm_v0", capacity["sarathi"] / rival, 1.5, at_most=False),),
        {
            "slo_ms": 1e3 * slo_s,
            "num_requests": num_requests,
            "capacity_qps": capacity,
            "probes": {policy: [_values(one) for one in found] for policy, found in probes.items()},
        }
        | meter.reference_ms(),
        meter.noise(),
        voids,
    )


@contextmanager
def _placed_server(rig: Rig, config: EngineConfig) -> Iterator[str]:
    """The whole server on the engine's cores, the load generator on the others."""
    with ExitStack() as stack:
        with rig.placement.on_engine_cores():
            address = stack.enter_context(own_server(config))
        yield address


def _search(
    address: str, slo_s: float, start_qps: float, num_requests: int, seed: int
) -> tuple[float, list[SocketProbe]]:
    """The highest rate of a geometric ladder that meets the objective; 0.0 if none does."""
    with Client(address) as client:
        info = client.model_info()

    def probe(qps: float) -> SocketProbe:
        shape = LoadShape(num_requests, qps, ArrivalProcess(), "sharegpt", seed=seed)
        schedule = make_schedule(shape, info.max_model_len)
        return _probe(qps, run_open_loop(address, schedule, vocab_size=info.vocab_size))

    probe(start_qps)  # The first requests of a server warm it up.
    probes = [probe(start_qps)]
    rising = probes[0].meets(slo_s)
    while len(probes) < MAX_PROBES and probes[-1].meets(slo_s) == rising:
        probes.append(probe(probes[-1].qps * (FACTOR if rising else 1 / FACTOR)))
    return max((one.qps for one in probes if one.meets(slo_s)), default=0.0), probes


def _probe(qps: float, run: LoadRecord) -> SocketProbe:
    good = [record for record in run.requests if record.is_ok]
    gaps_s = np.concatenate([record.tbt_s for record in good])
    delays_s = [record.queue_s for record in good if record.queue_s is not None]
    return SocketProbe(
        qps=qps,
        tbt_p99_s=float(np.percentile(gaps_s, 99)),
        delay_p50_s=float(np.median(delays_s)),
        num_failed=len(run.requests) - len(good),
        void_reasons=tuple(run.health.void_reasons()),
    )


def _values(one: SocketProbe) -> dict[str, Any]:
    return {
        "qps": one.qps,
        "tbt_p99_ms": 1e3 * one.tbt_p99_s,
        "delay_p50_ms": 1e3 * one.delay_p50_s,
    }
