"""SL6: what a decode costs that rides with a prefill chunk."""

from __future__ import annotations

import numpy as np

from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.steps import StepShape, time_steps
from tools.policy_evaluation.verdict import Check, NoiseMeter, Outcome

NUM_DECODES = 4
CONTEXT = 500


def marginal_decode_cost(rig: Rig, *, repeats: int = 60) -> Outcome:
    """SL6. Both hybrid and prefill-only steps have the token budget's rows."""
    meter = NoiseMeter(rig)
    meter.sample()
    rows = rig.point.token_budget
    shapes = {
        "decode": StepShape(min(rig.point.buckets), NUM_DECODES, CONTEXT),
        "prefill": StepShape(rows, 0, 0, rows, CONTEXT),
        "hybrid": StepShape(rows, NUM_DECODES, CONTEXT, rows - NUM_DECODES, CONTEXT),
    }
    seconds = time_steps(rig.executor, shapes, repeats)
    meter.sample()
    median_ms = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
    # Neighbours in time, so that a slow spell takes from both sides.
    marginal_ms = 1e3 * float(np.median(seconds["hybrid"] - seconds["prefill"])) / NUM_DECODES
    alone_ms = median_ms["decode"] / NUM_DECODES
    return Outcome(
        "sl6",
        (Check("decode in a hybrid step / alone", marginal_ms / alone_ms, 0.2),),
        {
            "step_ms": median_ms,
            "marginal_decode_ms": marginal_ms,
            "decode_only_ms_per_token": alone_ms,
        },
        meter.noise(),
    )
