"""SL3: the highest rate that keeps a TBT objective, through the socket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxserve.client import Client
from jaxserve.engine.config import EngineConfig
from jaxserve.loadgen.generator import run_open_loop
from jaxserve.loadgen.records import LoadRecord
from jaxserve.loadgen.schedule import LoadShape, make_schedule
from jaxserve.loadgen.server_process import own_server
from jaxserve.simulator.arrivals import ArrivalProcess
from tools.policy_evaluation.cells import Cells
from tools.policy_evaluation.ladder import Ladder
from tools.policy_evaluation.open_loop import saturated_qps
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.verdict import Check, NoiseMeter, Outcome

MAX_DELAY_S = 2.0
START_LOAD = 0.6
"""Rate of rung 0, as a share of what full steps of the token budget compute."""
LADDER = Ladder(1.3)
MIN_RATIO = 1.5


@dataclass(frozen=True, slots=True)
class Load:
    qps: float
    num_requests: int
    seed: int


WARM_UP = Load(qps=8.0, num_requests=12, seed=1)
"""What a new server gets first."""


@dataclass(frozen=True, slots=True)
class SocketProbe:
    qps: float
    tbt_p99_s: float
    delay_p50_s: float
    num_failed: int
    void_reasons: Sequence[str]

    def meets(self, slo_s: float) -> bool:
        return not self.num_failed and self.tbt_p99_s <= slo_s and self.delay_p50_s <= MAX_DELAY_S


def socket_capacity(rig: Rig, cells: Cells, *, num_requests: int = 32, seed: int = 1) -> Outcome:
    """SL3. `jaxserve serve` with one flag changed; ShareGPT lengths scaled to the context.

    Both policies are on the same ladder of rates. If Sarathi holds a rate, and its rival does not
    hold the rate that is lower by the ratio, that is enough.
    """
    if not rig.point.is_file:
        raise ValueError(
            f"operating point {rig.point.name} has no model file to serve: leave out sl3"
        )
    reference = cells.get("reference", partial(_reference, rig), is_basis=True)
    slo_s = 5 * reference["decode_s"]
    probes: dict[str, dict[int, SocketProbe]] = {"sarathi": {}, "vllm_v0": {}}

    def meets(policy: str, rung: int) -> bool:
        load = Load(reference["rung_0_qps"] * LADDER.factor**rung, num_requests, seed)
        found = cells.get(f"{policy}.{rung}", partial(_rung, rig, policy, load))
        probes[policy][rung] = SocketProbe(**found)
        return probes[policy][rung].meets(slo_s)

    rungs, may_be_more = LADDER.gain(
        partial(meets, "sarathi"), partial(meets, "vllm_v0"), -LADDER.rungs(MIN_RATIO), MIN_RATIO
    )
    readings = cells.readings()
    voids = [r for found in probes.values() for one in found.values() for r in one.void_reasons]
    return Outcome(
        "sl3",
        (Check("capacity sarathi / vllm_v0", LADDER.factor**rungs, MIN_RATIO, at_most=False),),
        {
            "slo_ms": 1e3 * slo_s,
            "num_requests": num_requests,
            "may_be_more": may_be_more,
            "probes": {
                policy: [_values(found[rung], slo_s) for rung in sorted(found)]
                for policy, found in probes.items()
            },
        }
        | readings.reference_ms(),
        readings.noise(),
        voids,
    )


def _reference(rig: Rig, meter: NoiseMeter) -> dict[str, Any]:
    meter.sample(20, whole_repeats=0)
    qps = START_LOAD * saturated_qps(
        rig.point.context, rig.point.token_budget, meter.median_s("full")
    )
    return {"decode_s": meter.median_s("decode"), "rung_0_qps": qps}


def _rung(rig: Rig, policy: str, load: Load, _: NoiseMeter) -> dict[str, Any]:
    """One rate on a server of its own."""
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
    with _placed_server(rig, config) as address, Client(address) as client:
        info = client.model_info()
        for one in (WARM_UP, load):
            shape = LoadShape(
                one.num_requests, one.qps, ArrivalProcess(), "sharegpt", seed=one.seed
            )
            schedule = make_schedule(shape, info.max_model_len)
            run = run_open_loop(address, schedule, vocab_size=info.vocab_size)
    return asdict(_probe(load.qps, run))


@contextmanager
def _placed_server(rig: Rig, config: EngineConfig) -> Iterator[str]:
    """The whole server on the engine's cores, the load generator on the others."""
    with ExitStack() as stack:
        with rig.placement.on_engine_cores():
            address = stack.enter_context(own_server(config))
        yield address


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


def _values(one: SocketProbe, slo_s: float) -> dict[str, Any]:
    return {
        "qps": one.qps,
        "meets": one.meets(slo_s),
        "tbt_p99_ms": 1e3 * one.tbt_p99_s,
        "delay_p50_ms": 1e3 * one.delay_p50_s,
    }
