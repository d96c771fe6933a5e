"""SL1: what decodes suffer when long prompts arrive. SL2: what the prompts pay."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.engine.step_log import CompletedStep
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.streams import TokenLog, make_request, run_long_prompts
from tools.policy_evaluation.verdict import Check, NoiseMeter, Outcome


def long_prompt_arrival(rig: Rig, *, num_rounds: int = 2, num_prompts: int = 8) -> Outcome:
    """SL1. Sarathi and vLLM v0 in turns, on the same executables."""
    meter = NoiseMeter(rig)
    meter.sample()
    # Sarathi must get through a prompt before the next one comes; for v0 a
    # prompt then stalls more than a hundredth of the tokens.
    period_s = 1.4 * chunked_prefill_s(meter)
    gaps_s: dict[str, list[np.ndarray]] = {"sarathi": [], "vllm_v0": []}
    most_rows = dict.fromkeys(gaps_s, 0)
    for _ in range(num_rounds):
        for policy, found in gaps_s.items():
            steps: list[CompletedStep] = []
            with rig.engine(policy, steps=steps) as engine:
                run = run_long_prompts(
                    engine,
                    num_steady=rig.point.num_steady,
                    prompt_len=rig.point.long_prompt,
                    period_s=period_s,
                    num_prompts=num_prompts,
                )
            found.append(run.gaps_s)
            most_rows[policy] = max(most_rows[policy], max_rows_between_tokens(steps))
            meter.sample()
    full_s, whole_s = meter.median_s("full"), meter.median_s("whole")
    figures = {policy: _tbt_ms(np.concatenate(found)) for policy, found in gaps_s.items()}
    sarathi, rival = figures["sarathi"], figures["vllm_v0"]
    return Outcome(
        "sl1",
        (
            Check("sarathi P99 TBT / full step", sarathi["p99"] / (1e3 * full_s), 1.25),
            Check("sarathi max TBT / full step", sarathi["max"] / (1e3 * full_s), 2.0),
            Check(
                "vllm_v0 max TBT / whole prefill",
                rival["max"] / (1e3 * whole_s),
                0.8,
                at_most=False,
            ),
            Check("P99 TBT vllm_v0 / sarathi", rival["p99"] / sarathi["p99"], 4.0, at_most=False),
        ),
        {
            "period_s": period_s,
            "prompt_tokens": rig.point.long_prompt,
            "tbt_ms": figures,
            "max_rows_between_tokens": most_rows,
        }
        | meter.reference_ms(),
        meter.noise(),
    )


def max_rows_between_tokens(steps: Sequence[CompletedStep]) -> int:
    """The most rows that were computed from one decode of a request to its next.

    Stall-free batching keeps it at one token budget, on any machine at any load.
    """
    total, most = 0, 0
    last_total: dict[str, int] = {}
    for step in steps:
        total += step.plan.num_tokens
        for chunk in step.plan.decodes:
            most = max(most, total - last_total.get(chunk.request_id, total))
            last_total[chunk.request_id] = total
    return most


def time_to_first_token_price(rig: Rig, *, repeats: int = 8, num_prompts: int = 6) -> Outcome:
    """SL2. An idle engine, chunked and unchunked in turns; then decodes beside prompts."""
    meter = NoiseMeter(rig)
    meter.sample()
    ttft_s: dict[str, list[float]] = {"sarathi": [], "vllm_v0": []}
    for index in range(repeats):
        for policy, found in ttft_s.items():
            with rig.engine(policy) as engine:
                log = TokenLog()
                start_s = time.monotonic()
                engine.add(make_request("one", rig.point.long_prompt, 1, seed=index), log)
                log.wait_finished(["one"])
                found.append(log.token_s["one"][0] - start_s)
    meter.sample()
    alone_s, beside_s = _decode_steps(rig, meter, num_prompts)
    meter.sample()
    median_s = {policy: float(np.median(found)) for policy, found in ttft_s.items()}
    return Outcome(
        "sl2",
        (
            Check(
                "TTFT chunked / unchunked, idle", median_s["sarathi"] / median_s["vllm_v0"], 1.35
            ),
            Check("decode throughput lost beside prompts", 1 - alone_s / beside_s, 0.10),
        ),
        {
            "ttft_ms": {policy: 1e3 * seconds for policy, seconds in median_s.items()},
            "decode_step_alone_ms": 1e3 * alone_s,
            "decode_step_beside_prompts_ms": 1e3 * beside_s,
        }
        | meter.reference_ms(),
        meter.noise(),
    )


def chunked_prefill_s(meter: NoiseMeter) -> float:
    """A long prompt in chunks beside the steady decodes."""
    point = meter.rig.point
    return point.long_prompt / (point.token_budget - point.num_steady) * meter.median_s("full")


def _decode_steps(rig: Rig, meter: NoiseMeter, num_prompts: int) -> tuple[float, float]:
    """Median seconds of steps with decodes alone: without prompts, and between them."""
    steps: list[CompletedStep] = []
    with rig.engine("sarathi", steps=steps) as engine:
        run = run_long_prompts(
            engine,
            num_steady=rig.point.num_steady,
            prompt_len=rig.point.long_prompt,
            period_s=1.8 * chunked_prefill_s(meter),
            num_prompts=num_prompts,
            alone_tokens=100,
        )
    start_s, end_s = run.quiet_s
    full = [step for step in steps if len(step.plan.decodes) == rig.point.num_steady]
    decodes = [step for step in full if not step.plan.prefills]
    beside = [s.duration_s for s in decodes if start_s <= s.completed_s <= end_s]
    before = [s.duration_s for s in decodes if s.completed_s < start_s]
    after = [s.duration_s for s in decodes if s.completed_s > end_s]
    # Contexts grow all the time; those before and after enclose those between.
    alone_s = float(np.median(before) + np.median(after)) / 2
    return alone_s, float(np.median(beside))


def _tbt_ms(gaps_s: np.ndarray) -> dict[str, Any]:
    p50, p90, p99, most = (1e3 * np.percentile(gaps_s, (50, 90, 99, 100))).tolist()
    return {"num_gaps": len(gaps_s), "p50": p50, "p90": p90, "p99": p99, "max": most}
