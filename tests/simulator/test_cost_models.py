"""Cost models against reference outputs of their constants and published figures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from jaxserve.engine.step_features import StepFeatures
from jaxserve.errors import ConfigError
from jaxserve.simulator.cost_models.base import NO_HOST_COST, HostCost
from jaxserve.simulator.cost_models.curve import Curve, thinned
from jaxserve.simulator.deployments import DEPLOYMENTS, find_deployment
from jaxserve.simulator.experiment import make_cost_model

prefill, decodes = StepFeatures.of_prefill, StepFeatures.of_decodes


def model(name: str, cost_model: str = "fitted", host: HostCost = NO_HOST_COST) -> object:
    return make_cost_model(cost_model, find_deployment(name), host)


@pytest.mark.parametrize(
    ("name", "step", "seconds"),
    [
        ("yi-34b", decodes(32, 4096), 0.0447),
        ("mistral-7b", decodes(32, 4096), 0.0223),
        ("yi-34b", prefill(512), 0.101),
        ("yi-34b", prefill(1024), 0.200),
        ("yi-34b", prefill(2048), 0.370),
        ("yi-34b", prefill(4096), 0.762),
        ("yi-34b", prefill(8192), 1.629),
        ("yi-34b", decodes(1, 1024), 0.030),
        ("yi-34b", decodes(32, 1024), 0.037),
        ("yi-34b", decodes(128, 1024), 0.050),
        ("falcon-180b", prefill(4096), 1.164),
    ],
)
def test_reference_outputs(name: str, step: StepFeatures, seconds: float) -> None:
    assert model(name).predict_s(step) == pytest.approx(seconds, rel=0.025)


def test_parts_add_up_and_host_is_counted_once() -> None:
    step = StepFeatures.of_hybrid(31, 2048, 481, start=1024)
    without = model("yi-34b").stage_cost(step)
    with_host = model("yi-34b", host=HostCost(0.005, 0.0001)).stage_cost(step)
    assert without.host_s == 0
    assert with_host.host_s == pytest.approx(0.005 + 32 * 0.0001)
    assert with_host.total_s - without.total_s == pytest.approx(with_host.host_s)
    assert without.linear_s > without.attention_s > 0
    assert without.linear_s == pytest.approx(model("yi-34b").stage_cost(prefill(512)).linear_s)


@pytest.mark.parametrize("name", ["fitted", "roofline"])
def test_more_work_never_takes_much_less_time(name: str) -> None:
    """Measured curves wiggle; a longer chunk is never faster by more than that."""
    yi = model("yi-34b", name)
    times = [yi.predict_s(prefill(tokens)) for tokens in range(64, 4096, 8)]
    assert all(b > 0.9 * a for a, b in pairwise(times))
    assert yi.predict_s(decodes(32, 8192)) > yi.predict_s(decodes(32, 4096))


def test_roofline_of_yi() -> None:
    """Weights over bandwidth: 557.8M parameters a layer on two GPUs."""
    linear_s = model("yi-34b", "roofline").stage_cost(decodes(1, 1)).linear_s
    assert linear_s == pytest.approx(60 * 557.8e6 / 2 * 2 / 1.5e12, rel=0.001)


def test_bucketed_steps_pay_for_their_bucket() -> None:
    deployment = find_deployment("yi-34b")
    exact = make_cost_model("fitted", deployment, NO_HOST_COST)
    padded = make_cost_model("fitted", deployment, NO_HOST_COST, bucketed=True)
    step = decodes(4, 100)._replace(num_rows_bucket=512)
    assert padded.stage_cost(step).linear_s == exact.stage_cost(prefill(512)).linear_s


def test_transfer_between_falcon_stages_is_14_5_us_a_token() -> None:
    assert model("falcon-180b").transfer_s(1) == pytest.approx(14.5e-6, rel=0.01)


def test_every_deployment_has_constants() -> None:
    for name in DEPLOYMENTS:
        assert model(name).predict_s(decodes(1, 1)) > 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"model": "yi-34b", "device": "a40"}, "--device"),
        ({"model": "llama-9000"}, "--model"),
        ({"model": "yi-34b", "pipeline_parallel": 7}, "--pipeline-parallel"),
    ],
)
def test_unknown_deployments_are_refused(arguments: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        find_deployment(**arguments)


def test_a_parallelism_without_measurements_is_refused() -> None:
    deployment = find_deployment("yi-34b", tensor_parallel=3)
    with pytest.raises(ConfigError, match="--tensor-parallel"):
        make_cost_model("fitted", deployment, NO_HOST_COST)
    with pytest.raises(ConfigError, match="--profile"):
        make_cost_model("table", deployment, NO_HOST_COST)


def test_table_from_csv_files(tmp_path: Path) -> None:
    operators = [
        *("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"),
        *("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add"),
    ]
    columns = [f"time_stats.{name}.median" for name in operators]
    lines = [",".join([*columns, "num_tokens", "num_tensor_parallel_workers"])]
    lines += [
        ",".join([str(tokens / 1000)] * len(columns) + [str(tokens), "1"]) for tokens in (8, 4096)
    ]
    (tmp_path / "llama3-8b.mlp.csv").write_text("\n".join(lines) + "\n")
    table = make_cost_model("table", find_deployment("mistral-7b"), NO_HOST_COST, profile=tmp_path)
    cost = table.stage_cost(prefill(1024))
    assert cost.linear_s == pytest.approx(32 * 4 * 1.024e-3)
    assert cost.elementwise_s == pytest.approx(32 * 5 * 1.024e-3)
    with pytest.raises(ConfigError, match=r"mlp\.csv"):
        make_cost_model(
            "table", find_deployment("mistral-7b"), NO_HOST_COST, profile=tmp_path / "empty"
        )


def test_thinned_curves_keep_their_tolerance() -> None:
    knots = [(float(x), 1.0 + x // 64 + 0.001 * x) for x in range(1, 1000, 3)]
    kept = thinned(knots, 0.02)
    curve = Curve(kept)
    assert len(kept) < len(knots) / 2
    assert max(abs(curve(x) / y - 1) for x, y in knots) <= 0.02


def test_a_curve_is_level_before_and_straight_beyond() -> None:
    curve = Curve([(10, 1.0), (20, 2.0), (40, 4.0)])
    assert curve(1) == 1.0
    assert curve(15) == pytest.approx(1.5)
    assert curve(80) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="ascending"):
        Curve([(2, 1.0), (2, 2.0)])
