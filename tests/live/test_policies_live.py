"""What SL1 times, counted in rows, in the real engine: it holds on a busy machine too.

The timings themselves need a quiet machine and are a command of their own:
`python tools/evaluate_policies.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.engine.step_log import CompletedStep
from tools.policy_evaluation.operating_point import CPU
from tools.policy_evaluation.placement import place_engine
from tools.policy_evaluation.rig import Rig, make_rig
from tools.policy_evaluation.stalls import max_rows_between_tokens
from tools.policy_evaluation.streams import run_long_prompts

# Rows are counted, not timed: a smaller model and fewer programs will do.
POINT = replace(
    CPU,
    hidden_size=64,
    intermediate_size=256,
    token_budget=64,
    control_budgets=(64,),
    slack_budget=64,
    slack_max_rows=64,
    whole_buckets=(CPU.context,),
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> Rig:
    folder = tmp_path_factory.mktemp("live")
    return make_rig(POINT, place_engine(None), folder, cache=compilation_cache)


@pytest.mark.parametrize(
    ("policy", "least", "most"),
    [("sarathi", 64, 64), ("vllm_v0", POINT.long_prompt, POINT.long_prompt + POINT.max_num_seqs)],
)
def test_rows_between_two_tokens(rig: Rig, policy: str, least: int, most: int) -> None:
    steps: list[CompletedStep] = []
    with rig.engine(policy, steps=steps) as engine:
        run_long_prompts(
            engine, num_steady=8, prompt_len=POINT.long_prompt, period_s=1.0, num_prompts=1
        )
    assert least <= max_rows_between_tokens(steps) <= most
