"""Which model on which GPUs: shapes, parallelism, memory, published settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a step's cost depends on; of the whole model, not of one GPU."""

    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    layer_weights: int
    """Parameters of one layer's matrices."""
    linear_table: str
    """The measured model whose linear operators stand for this one's, with
    `linear_scale`: the ratio of the parameters of a layer."""
    linear_scale: float = 1.0
    linear_table_tp: int | None = None
    """Tensor parallelism of that table, where it is not the deployment's."""
    all_reduces_per_layer: int = 2


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model spread over A100-80GB GPUs."""

    model: str
    shape: ModelShape
    tensor_parallel: int
    pipeline_parallel: int
    fabric: str
    """Whose all-reduce times: `pairwise_nvlink` (4 GPUs a node) or `dgx` (8)."""
    num_pages: int
    """KV pages of 16 tokens that all GPUs together hold."""
    slo_s: Mapping[str, float]
    """P99 time between tokens, by name."""
    token_budget: Mapping[str, int]
    """The published token budget for each SLO."""
    start_qps: Mapping[str, float]
    """Where a capacity search starts, by workload."""
    orca_max_num_seqs: int
    transfer_bytes_per_s: float = 2.05e9
    """Between stages, over 100 Gb Ethernet, as measured for large messages."""


def _llama_layer(hidden: int, ffn: int, q_heads: int, kv_heads: int, head_dim: int) -> int:
    attention = 2 * hidden * q_heads * head_dim + 2 * hidden * kv_heads * head_dim
    return attention + 3 * hidden * ffn


MODELS = {
    # The layers of Llama-3-8B are those of Mistral-7B.
    "mistral-7b": ModelShape(
        32, 4096, 32, 8, 128, _llama_layer(4096, 14336, 32, 8, 128), "llama3-8b"
    ),
    "yi-34b": ModelShape(
        60, 7168, 56, 8, 128, _llama_layer(7168, 20480, 56, 8, 128), "codellama-34b", 0.806
    ),
    "llama2-70b": ModelShape(
        80, 8192, 64, 8, 128, _llama_layer(8192, 28672, 64, 8, 128), "llama2-70b"
    ),
    # Falcon's MLP has no gate and is four times as wide as the model; attention
    # and MLP run side by side, with one all-reduce.
    "falcon-180b": ModelShape(
        80,
        14848,
        232,
        8,
        64,
        2 * 14848 * (14848 + 8 * 64) + 8 * 14848**2,
        "llama2-70b",
        2.59,
        all_reduces_per_layer=1,
    ),
    # 12 heads of 128 on each of 8 GPUs; its layer on 8 GPUs is about one of
    # Llama-2-70B on 4.
    "gpt-3": ModelShape(
        96, 12288, 96, 96, 128, 12 * 12288**2, "llama2-70b", 1.06, linear_table_tp=4
    ),
}

_CHAT_STRICT_RELAXED = {"strict": 512, "relaxed": 2048}

DEPLOYMENTS = {
    "mistral-7b": Deployment(
        model="mistral-7b",
        shape=MODELS["mistral-7b"],
        tensor_parallel=1,
        pipeline_parallel=1,
        fabric="pairwise_nvlink",
        num_pages=25_000,
        slo_s={"strict": 0.1, "relaxed": 0.5},
        token_budget=_CHAT_STRICT_RELAXED,
        start_qps={"chat": 2.0, "arxiv": 0.7},
        orca_max_num_seqs=16,
    ),
    "yi-34b": Deployment(
        model="yi-34b",
        shape=MODELS["yi-34b"],
        tensor_parallel=2,
        pipeline_parallel=1,
        fabric="pairwise_nvlink",
        num_pages=15_500,
        slo_s={"strict": 0.2, "relaxed": 1.0},
        token_budget=_CHAT_STRICT_RELAXED,
        start_qps={"chat": 0.8, "arxiv": 0.3},
        orca_max_num_seqs=16,
    ),
    "llama2-70b": Deployment(
        model="llama2-70b",
        shape=MODELS["llama2-70b"],
        tensor_parallel=4,
        pipeline_parallel=2,
        fabric="pairwise_nvlink",
        num_pages=75_000,
        slo_s={"strict": 1.0, "relaxed": 5.0},
        token_budget={"strict": 512, "relaxed": 1536},
        start_qps={"chat": 1.0, "arxiv": 0.5},
        orca_max_num_seqs=8,
    ),
    "falcon-180b": Deployment(
        model="falcon-180b",
        shape=MODELS["falcon-180b"],
        tensor_parallel=4,
        pipeline_parallel=2,
        fabric="pairwise_nvlink",
        num_pages=60_000,
        slo_s={"strict": 1.0, "relaxed": 5.0},
        token_budget=_CHAT_STRICT_RELAXED,
        start_qps={"chat": 0.5, "arxiv": 0.2},
        orca_max_num_seqs=8,
    ),
    "gpt-3": Deployment(
        model="gpt-3",
        shape=MODELS["gpt-3"],
        tensor_parallel=8,
        pipeline_parallel=8,
        fabric="dgx",
        num_pages=55_296,
        slo_s={},
        token_budget={},
        start_qps={},
        orca_max_num_seqs=27,
        transfer_bytes_per_s=float("inf"),
    ),
}


def find_deployment(
    model: str,
    *,
    tensor_parallel: int | None = None,
    pipeline_parallel: int | None = None,
    device: str = "a100",
) -> Deployment:
    """A known deployment, with other parallelism where given.

    Raises ConfigError for a model or a device without measured constants.
    """
    if device != "a100":
        raise ConfigError(
            f"there are no measured constants for {device!r}: --device a100 is the only one, or "
            "give your own measurements with --cost-model table --profile FOLDER"
        )
    if model not in DEPLOYMENTS:
        raise ConfigError(f"--model must be one of {', '.join(DEPLOYMENTS)}, not {model!r}")
    deployment = DEPLOYMENTS[model]
    stages = pipeline_parallel or deployment.pipeline_parallel
    if deployment.shape.num_layers % stages:
        raise ConfigError(
            f"--pipeline-parallel {stages} does not divide the {deployment.shape.num_layers} "
            f"layers of {model}"
        )
    return replace(
        deployment,
        tensor_parallel=tensor_parallel or deployment.tensor_parallel,
        pipeline_parallel=stages,
    )
