"""Step time of one GPU stage from measured operators (`table` and `fitted`)."""

from __future__ import annotations

from jaxserve.engine.step_features import StepFeatures
from jaxserve.simulator.cost_models.base import HostCost, StageCost
from jaxserve.simulator.cost_models.curve import Curve
from jaxserve.simulator.cost_models.operators import AttentionTimes, OperatorTimes
from jaxserve.simulator.deployments import Deployment

_MS = 1e-3
_BYTES_PER_VALUE = 2
_ALL_REDUCE_LAUNCH_MS = 0.02
_PREFILL_HEAD_DIM = 128
_MAX_REMEMBERED_ROWS = 65536


class GpuCostModel:
    """Layers x (linear + elementwise + attention + all-reduces) + host.

    Linear operators run on tiles: their time is that of the rows rounded up
    to 8. Embedding and LM head are not counted.

    Args:
        bucketed: the rows are those of the compiled step, padding included,
            as in an engine with fixed shapes; else those that carry a token.
    """

    def __init__(
        self,
        deployment: Deployment,
        times: OperatorTimes,
        host: HostCost,
        *,
        bucketed: bool = False,
    ) -> None:
        shape, size = deployment.shape, deployment.tensor_parallel
        table = f"{shape.linear_table}/tp{shape.linear_table_tp or size}"
        self._deployment = deployment
        self._host = host
        self._bucketed = bucketed
        self._layers = shape.num_layers // deployment.pipeline_parallel
        self._linear = times.curve("linear", table)
        self._elementwise = times.curve("elementwise", table)
        self._all_reduce: Curve | None = None
        if size > 1:
            self._all_reduce = times.curve("all_reduce", f"{deployment.fabric}/tp{size}")
        self._attention = _Attention(times.attention, deployment)
        self._row_bytes = shape.hidden_size * _BYTES_PER_VALUE
        self._rows_ms: dict[int, tuple[float, float, float]] = {}

    def stage_cost(self, step: StepFeatures) -> StageCost:
        """What one stage takes for this step, by what takes it."""
        linear_ms, elementwise_ms, all_reduce_ms = self._of_rows(self._num_rows(step))
        layers = self._layers
        return StageCost(
            linear_s=linear_ms * layers * _MS,
            elementwise_s=elementwise_ms * layers * _MS,
            attention_s=self._attention.ms(step) * layers * _MS,
            all_reduce_s=all_reduce_ms * layers * _MS,
            host_s=self._host.seconds(step.num_seqs),
        )

    def predict_s(self, step: StepFeatures) -> float:
        return self.stage_cost(step).total_s

    def transfer_s(self, num_rows: int) -> float:
        return num_rows * self._row_bytes / self._deployment.transfer_bytes_per_s

    def _num_rows(self, step: StepFeatures) -> int:
        rows = step.num_rows_bucket if self._bucketed else step.num_tokens
        return -(-rows // 8) * 8

    def _of_rows(self, num_rows: int) -> tuple[float, float, float]:
        """Milliseconds of one layer: linear, elementwise, all-reduces."""
        known = self._rows_ms.get(num_rows)
        if known is None:
            shape = self._deployment.shape
            all_reduce_ms = 0.0
            if self._all_reduce is not None:
                one_ms = self._all_reduce(num_rows * self._row_bytes) + _ALL_REDUCE_LAUNCH_MS
                all_reduce_ms = shape.all_reduces_per_layer * one_ms
            known = (
                self._linear(num_rows) * shape.linear_scale,
                self._elementwise(num_rows),
                all_reduce_ms,
            )
            if len(self._rows_ms) < _MAX_REMEMBERED_ROWS:
                self._rows_ms[num_rows] = known
        return known


class _Attention:
    """Milliseconds of one layer on one GPU of a deployment."""

    def __init__(self, times: AttentionTimes, deployment: Deployment) -> None:
        shape, size = deployment.shape, deployment.tensor_parallel
        kv_width = max(1, shape.num_kv_heads // size) * shape.head_dim
        q_heads = shape.num_q_heads / size * shape.head_dim / _PREFILL_HEAD_DIM
        prefill_scale = q_heads / times.q_heads
        self._decode_ms = times.decode_ms
        self._key_ms = times.decode_ms_per_key * kv_width / times.kv_width
        self._chunk_ms = times.prefill_ms
        self._token_ms = times.prefill_ms_per_token * prefill_scale
        self._pair_ms = times.prefill_ms_per_pair * prefill_scale

    def ms(self, step: StepFeatures) -> float:
        ms = self._key_ms * step.decode_context
        if step.num_decodes:
            ms += self._decode_ms
        if step.num_prefills:
            ms += self._chunk_ms * step.num_prefills
            ms += self._token_ms * step.num_prefill_tokens + self._pair_ms * step.prefill_pairs
        return ms
