"""GPT-3 on 64 A100s: bubbles of pipeline stages under Orca and SARATHI.

The published experiment: 8 stages of 8 GPUs against 8 replicas of 8 GPUs.
All requests are there at the start; hand-over and host cost nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxserve.simulator.cost_models.base import NO_HOST_COST
from jaxserve.simulator.cost_models.gpu import GpuCostModel
from jaxserve.simulator.cost_models.operators import packaged_a100
from jaxserve.simulator.deployments import Deployment, ModelShape, find_deployment
from jaxserve.simulator.run import SimEngine, SimRequest, SimRun, simulate
from jaxserve.simulator.scenarios import PAGE_SIZE, scheduler_config
from jaxserve.simulator.sim_executor import SimStep
from jaxserve.simulator.workloads import zipf_lengths

MAX_MODEL_LEN = 4096
CHUNK = 256
PROMPT_PER_OUTPUT = 10.0
_BYTES_PER_VALUE = 2
_GPU_BYTES = 80e9 * 0.9
_LEAST_TOKENS, _ZIPF_THETA = 1024, 0.4


@dataclass(frozen=True, slots=True)
class PipelineComparison:
    """By system: "orca_tp8_pp8", "sarathi_tp8_pp8" and "orca_tp8"."""

    max_num_seqs: dict[str, int]
    """Of one micro-batch, or of one replica."""
    makespan_s: dict[str, float]
    median_bubble_s: dict[str, float]
    """Over requests: idle stage time just before their micro-batches."""
    steps: Sequence[SimStep]
    """Of SARATHI's run, if recorded."""

    def summary(self) -> dict[str, object]:
        spans, bubbles = self.makespan_s, self.median_bubble_s
        ours = "sarathi_tp8_pp8"
        return {
            "max_num_seqs": self.max_num_seqs,
            "makespan_s": spans,
            "median_bubble_s": bubbles,
            "bubble_ratio": bubbles["orca_tp8_pp8"] / max(bubbles[ours], 1e-9),
            "speedup": {name: seconds / spans[ours] for name, seconds in spans.items()},
        }


def batch_that_fits(
    shape: ModelShape, *, num_gpus: int, num_stages: int, max_model_len: int
) -> int:
    """Longest requests of one micro-batch whose KV fits beside 16-bit weights
    in 90 % of 80 GB a GPU."""
    weights = _BYTES_PER_VALUE * shape.num_layers * shape.layer_weights
    key_values = 2 * _BYTES_PER_VALUE * shape.num_layers * shape.num_kv_heads * shape.head_dim
    room = num_gpus * _GPU_BYTES - weights
    return int(room / (max_model_len * key_values) / num_stages)


def compare_pipelines(
    num_requests: int, seed: int, *, record_steps: bool = False
) -> PipelineComparison:
    """Runs the three systems on the same requests."""
    deployment = find_deployment("gpt-3")
    stages = deployment.pipeline_parallel
    replica = replace(deployment, pipeline_parallel=1)
    requests = [
        SimRequest(lengths, 0.0)
        for lengths in zipf_lengths(
            num_requests,
            seed,
            least=_LEAST_TOKENS,
            most=MAX_MODEL_LEN,
            theta=_ZIPF_THETA,
            prompt_share=PROMPT_PER_OUTPUT,
        )
    ]
    orca = simulate(gpt3_engine(deployment, "orca"), requests)
    sarathi = simulate(
        gpt3_engine(deployment, "sarathi_decode_maximal"), requests, record_steps=record_steps
    )
    # The replicas share the requests in turn.
    shares = [requests[index::stages] for index in range(stages)]
    alone = [simulate(gpt3_engine(replica, "orca"), share) for share in shares if share]
    batch, replica_batch = _batch(deployment), _batch(replica)
    return PipelineComparison(
        max_num_seqs={
            "orca_tp8_pp8": batch,
            "sarathi_tp8_pp8": batch,
            "orca_tp8": replica_batch,
        },
        makespan_s={
            "orca_tp8_pp8": orca.end_s,
            "sarathi_tp8_pp8": sarathi.end_s,
            "orca_tp8": max(run.end_s for run in alone),
        },
        median_bubble_s={
            "orca_tp8_pp8": median_bubble_s(orca),
            "sarathi_tp8_pp8": median_bubble_s(sarathi),
            "orca_tp8": 0.0,
        },
        steps=sarathi.stats.steps or (),
    )


def gpt3_engine(deployment: Deployment, policy: str) -> SimEngine:
    """Memory for exactly the batch that fits, longest requests assumed."""
    batch, stages = _batch(deployment), deployment.pipeline_parallel
    num_seqs = batch * stages
    needed = num_seqs * math.ceil(MAX_MODEL_LEN / PAGE_SIZE)
    config = scheduler_config(
        deployment,
        policy,
        token_budget=CHUNK,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_seqs,
        max_seqs_per_step=batch if stages > 1 else None,
        # The watermark is not for requests that reserve all they can need.
        num_pages=math.ceil(needed / 0.98),
    )
    cost = GpuCostModel(deployment, packaged_a100(), NO_HOST_COST)
    return SimEngine(config, cost, stages)


def median_bubble_s(run: SimRun) -> float:
    """Over requests."""
    return statistics.median(run.stats.request_bubble_s.values())


def _batch(deployment: Deployment) -> int:
    stages = deployment.pipeline_parallel
    return batch_that_fits(
        deployment.shape,
        num_gpus=deployment.tensor_parallel * stages,
        num_stages=stages,
        max_model_len=MAX_MODEL_LEN,
    )
