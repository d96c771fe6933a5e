"""What one step did, as plain values: what a ledger line is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np

from jaxserve.trainer.state_layout import Buffer, StateLayout
from jaxserve.trainer.world import Range

Verdict: TypeAlias = Literal["applied", "skipped", "rollback"]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Equal on all processes, but for times.

    Attributes:
        step: its number, from 0.
        loss: mean negative log-likelihood of a target, in nats.
        grad_norm: Euclidean norm of the whole gradient, before clipping.
        lr: the rate that the update used.
        first_index: number of the first example among all of the run.
        last_index: number of the last one.
        ids_sha256: sha256 in hex of the example ids, as little-endian int64 in order.
        num_tokens: targets that counted.
        verdict: "applied"; "skipped": the update was dropped, and the run goes on with the next
            step; "rollback": it was dropped, and the supervisor is asked to start a generation
            from `rollback_to` in which `suspect_ids` are quarantined.
        reason: why an update was dropped, for a person.
        rollback_to: the step to go on from; of "rollback" only.
        suspect_ids: example ids that may have caused it.
        data_wait_s: time spent waiting for rows.
        probe_s: time spent on probes of a rate that tunes itself.
        corrupted_device: what a replay of a shard on another device found wrong, if anything;
            the step was computed again without it.
        params_digest: of the parameters after the step, see `params_digest.py`; every so many
            steps.
    """

    step: int
    loss: np.float32
    grad_norm: np.float32
    lr: np.float32
    first_index: int
    last_index: int
    ids_sha256: str
    num_tokens: int
    verdict: Verdict = "applied"
    reason: str = ""
    rollback_to: int | None = None
    suspect_ids: tuple[int, ...] = ()
    data_wait_s: float = 0.0
    probe_s: float = 0.0
    corrupted_device: str | None = None
    params_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """Loss over the evaluation set.

    Attributes:
        loss: mean negative log-likelihood of a target, in nats.
        num_tokens: targets that counted.
        num_examples: examples read.
    """

    loss: np.float32
    num_tokens: int
    num_examples: int


class Runner(Protocol):
    """What a trainer process drives; `jaxserve.trainer.step_runner.StepRunner` is one.

    All processes make the same calls in the same order: each call but `store_state` and `close`
    holds collectives.

    Attributes:
        num_devices: of all processes.
        ranges: the logical shards of each of them.
        on_exchange: called in each step once this process has its own gradients and waits for
            those of the others; None, and in mode "ordered": never.
    """

    num_devices: int
    ranges: tuple[Range, ...]
    on_exchange: Callable[[], None] | None

    @property
    def layout(self) -> StateLayout:
        """Segments of a state's buffer."""
        ...

    def load_state(self, buffer: Buffer | None) -> int:
        """Takes over a state and returns the next step; None: a fresh one at step 0."""
        ...

    def run_step(self, step: int) -> StepRecord:
        """Computes one step. The step must be the state's next one."""
        ...

    def store_state(self, buffer: Buffer) -> None:
        """Writes this process's part of the state: the parts of all processes are disjoint
        and together the whole buffer. Does not touch the other bytes."""
        ...

    def state_ranges(self) -> tuple[tuple[int, int], ...]:
        """The (offset, size) in bytes of what `store_state` writes, the same at every step. Over
        all processes they cover the buffer without overlap, the gaps between segments included:
        the supervisor checks digests of exactly these bytes."""
        ...

    def evaluate(self) -> EvalRecord:
        """Loss over the evaluation set, without dropout. Changes nothing."""
        ...

    def close(self) -> None:
        """Ends the threads that read ahead."""
        ...
