"""What SL1 times, counted in rows, in the real engine: it holds on a busy machine too.

The timings themselves need a quiet machine and are a command of their own:
`python tools/evaluate_policies.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.engine.step_log import CompletedStep
from tools.policy_evaluation.model import write_model
from tools.policy_evaluation.rig import TOKEN_BUDGET, Rig, make_rig
from tools.policy_evaluation.stalls import max_rows_between_tokens
from tools.policy_evaluation.streams import run_long_prompts
from tools.policy_evaluation.verdict import LONG_PROMPT

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> Rig:
    return make_rig(write_model(tmp_path_factory.mktemp("live") / "model"), cache=compilation_cache)


@pytest.mark.parametrize(
    ("policy", "least", "most"),
    [("sarathi", TOKEN_BUDGET, TOKEN_BUDGET), ("vllm_v0", LONG_PROMPT, LONG_PROMPT + 20)],
)
def test_rows_between_two_tokens(rig: Rig, policy: str, least: int, most: int) -> None:
    steps: list[CompletedStep] = []
    with rig.engine(policy, steps=steps) as engine:
        run_long_prompts(engine, num_steady=8, prompt_len=LONG_PROMPT, period_s=1.0, num_prompts=1)
    assert least <= max_rows_between_tokens(steps) <= most
