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
SLO_STEPS = 5
"""P99 between tokens, in steps of the steady decodes alone."""


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
    slo_s: float
    tbt_p99_s: float
    delay_p50_s: float
    num_failed: int
    void_reasons: Sequence[str]

    @property
    def meets(self) -> bool:
        in_time = self.tbt_p99_s <= self.slo_s and self.delay_p50_s <= MAX_DELAY_S
        return in_time and not self.num_failed


def socket_capacity(rig: Rig, cells: Cells, *, num_requests: int = 32, seed: int = 1) -> Outcome:
    """SL3. `jaxserve serve` with one flag changed; ShareGPT lengths scaled to the context.

    Both policies are on the same ladder of rates. If Sarathi holds a rate, and its rival does not
    hold the rate that is lower by the ratio, that is enough. A rung's rate and its objective are
    in units of the steps that were timed just before it.
    """
    if not rig.point.is_file:
        raise ValueError(
            f"operating point {rig.point.name} has no model file to serve: leave out sl3"
        )
    probes: dict[str, dict[int, SocketProbe]] = {"sarathi": {}, "vllm_v0": {}}

    def meets(policy: str, rung: int) -> bool:
        measure = partial(_rung, rig, policy, rung, num_requests, seed)
        probes[policy][rung] = SocketProbe(**cells.get(f"{policy}.{rung}", measure))
        return probes[policy][rung].meets

    rungs, may_be_more = LADDER.gain(
        partial(meets, "sarathi"), partial(meets, "vllm_v0"), -LADDER.rungs(MIN_RATIO), MIN_RATIO
    )
    voids = [r for found in probes.values() for one in found.values() for r in one.void_reasons]
    return Outcome(
        "sl3",
        (Check("capacity sarathi / vllm_v0", LADDER.factor**rungs, MIN_RATIO, at_most=False),),
        {
            "num_requests": num_requests,
            "may_be_more": may_be_more,
            "probes": {
                policy: [{"rung": rung} | _values(found[rung]) for rung in sorted(found)]
                for policy, found in probes.items()
            },
        }
        | cells.readings().reference_ms(),
        cells.worst_noise(),
        voids,
    )


def _rung(
    rig: Rig, policy: str, rung: int, num_requests: int, seed: int, meter: NoiseMeter
) -> dict[str, Any]:
    """One rate on a server of its own."""
    point = rig.point
    full_s, decode_s = meter.median_s("full"), meter.median_s("decode")
    qps = START_LOAD * saturated_qps(point.context, point.token_budget, full_s)
    load = Load(qps * LADDER.factor**rung, num_requests, seed)
    config = EngineConfig(
        model=str(rig.model),
        dtype=point.dtype,
        policy=policy,
        token_budget=point.token_budget,
        max_num_seqs=point.max_num_seqs,
        max_model_len=point.context,
        kv_cache_bytes=point.pool_bytes,
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
    return asdict(_probe(load.qps, SLO_STEPS * decode_s, run))


@contextmanager
def _placed_server(rig: Rig, config: EngineConfig) -> Iterator[str]:
    """The whole server on the engine's cores, the load generator on the others."""
    with ExitStack() as stack:
        with rig.placement.on_engine_cores():
            address = stack.enter_context(own_server(config))
        yield address


def _probe(qps: float, slo_s: float, run: LoadRecord) -> SocketProbe:
    good = [record for record in run.requests if record.is_ok]
    gaps_s = np.concatenate([record.tbt_s for record in good])
    delays_s = [record.queue_s for record in good if record.queue_s is not None]
    return SocketProbe(
        qps=qps,
        slo_s=slo_s,
        tbt_p99_s=float(np.percentile(gaps_s, 99)),
        delay_p50_s=float(np.median(delays_s)),
        num_failed=len(run.requests) - len(good),
        void_reasons=tuple(run.health.void_reasons()),
    )


def _values(one: SocketProbe) -> dict[str, Any]:
    return {
        "qps": one.qps,
        "meets": one.meets,
        "slo_ms": 1e3 * one.slo_s,
        "tbt_p99_ms": 1e3 * one.tbt_p99_s,
        "delay_p50_ms": 1e3 * one.delay_p50_s,
    }
