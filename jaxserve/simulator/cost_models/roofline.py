"""Step time of one GPU stage from two numbers: memory bandwidth and FLOP/s."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.engine.step_features import StepFeatures
from jaxserve.simulator.cost_models.base import HostCost, StageCost
from jaxserve.simulator.deployments import Deployment

_BYTES_PER_VALUE = 2
_TILE = 128


@dataclass(frozen=True, slots=True)
class Roofline:
    """A device as its sustained limits; the default is an A100-80GB."""

    bytes_per_s: float = 1.5e12
    flops_per_s: float = 220e12


class RooflineCostModel:
    """Linear layers take max(weight bytes, FLOPs of whole tiles); attention
    takes max(KV bytes, FLOPs). The network is free."""

    def __init__(self, deployment: Deployment, device: Roofline, host: HostCost) -> None:
        shape = deployment.shape
        self._deployment = deployment
        self._device = device
        self._host = host
        self._layers = shape.num_layers // deployment.pipeline_parallel
        self._weights = shape.layer_weights / deployment.tensor_parallel
        self._key_bytes = (
            2 * shape.num_kv_heads * shape.head_dim * _BYTES_PER_VALUE / deployment.tensor_parallel
        )
        self._pair_flops = 4 * shape.num_q_heads * shape.head_dim / deployment.tensor_parallel

    def stage_cost(self, step: StepFeatures) -> StageCost:
        """What one stage takes for this step, by what takes it."""
        device, layers = self._device, self._layers
        rows = step.num_tokens
        tiled = rows if rows <= _TILE else -(-rows // _TILE) * _TILE
        linear_s = max(
            self._weights * _BYTES_PER_VALUE / device.bytes_per_s,
            2 * self._weights * tiled / device.flops_per_s,
        )
        attention_s = (
            step.decode_context * self._key_bytes / device.bytes_per_s
            + step.prefill_pairs * self._pair_flops / device.flops_per_s
        )
        return StageCost(
            linear_s=linear_s * layers,
            elementwise_s=0.0,
            attention_s=attention_s * layers,
            all_reduce_s=0.0,
            host_s=self._host.seconds(step.num_seqs),
        )

    def predict_s(self, step: StepFeatures) -> float:
        return self.stage_cost(step).total_s

    def transfer_s(self, num_rows: int) -> float:
        row_bytes = self._deployment.shape.hidden_size * _BYTES_PER_VALUE
        return num_rows * row_bytes / self._deployment.transfer_bytes_per_s
