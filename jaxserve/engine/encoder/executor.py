"""EncoderExecutor: an encoder's compiled steps, and what runs plans through them.

    step(params, inputs) -> vectors

`inputs` is int32 `[num_texts, 1 + num_positions]`: each text's number of tokens,
then its ids; so a step costs one copy to the device and one back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.encoder.plan import EncodeBucket, EncodePlan, EncodeResults
from jaxserve.engine.encoder.settings import EncoderSettings
from models.decoder import Params


@dataclass(frozen=True, slots=True)
class EncoderPrograms:
    """The compiled objects that the hot path calls. A call with another shape
    raises; it never compiles."""

    steps: Mapping[EncodeBucket, Callable[..., Any]]
    temp_bytes: int
    """Most temporary memory of any program, from XLA's memory analysis."""
    seconds: Mapping[str, float]
    """Trace, lower and compile time of each program."""


class EncoderBuild:
    """A compilation that runs in threads while the weights load.

    A context manager: leaving it drops what has not been compiled yet.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="compile")
        self._steps: dict[EncodeBucket, Future[tuple[Any, float]]] = {
            bucket: self._pool.submit(_compile_step, settings, bucket)
            for bucket in sorted(settings.buckets, key=lambda bucket: -bucket.num_rows)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # After a failure nobody waits for programs that have not been begun.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def result(self) -> EncoderPrograms:
        """Waits for all programs."""
        done = {bucket: future.result() for bucket, future in self._steps.items()}
        return EncoderPrograms(
            steps={bucket: program for bucket, (program, _) in done.items()},
            temp_bytes=max(_temp_bytes(program) for program, _ in done.values()),
            seconds={
                f"compile {bucket.num_texts} x {bucket.num_positions}": seconds
                for bucket, (_, seconds) in done.items()
            },
        )


class EncoderExecutor:
    """Runs plans in the order in which they are submitted.

    Args:
        programs: compiled ahead of time.
        params: weights on the device.
        device: where they are.
        depth: plans in flight at once.
        finish: what becomes of a step's vectors [texts, n] on the host; None: nothing.
    """

    def __init__(
        self,
        programs: EncoderPrograms,
        params: Params,
        device: jax.Device,
        *,
        depth: int,
        finish: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.depth = depth
        self.programs = programs
        self.params = params
        self._device = device
        self._finish = finish
        self._in_flight: deque[tuple[EncodePlan, jax.Array]] = deque()

    def can_accept(self) -> bool:
        return len(self._in_flight) < self.depth

    def submit(self, plan: EncodePlan) -> None:
        """Dispatches the plan. Raises ValueError for a bucket that was not
        compiled, texts that do not fit it, or a full executor."""
        if not self.can_accept():
            raise ValueError(f"{self.depth} plans are in flight already")
        if plan.bucket not in self.programs.steps:
            raise ValueError(f"no step of {plan.bucket} was compiled")
        inputs = pack_texts([text.token_ids for text in plan.texts], plan.bucket)
        step = self.programs.steps[plan.bucket]
        vectors = step(self.params, jax.device_put(inputs, self._device))
        vectors.copy_to_host_async()
        self._in_flight.append((plan, vectors))

    def next_completion(self) -> tuple[EncodePlan, EncodeResults]:
        """Waits for the oldest plan in flight. Raises LookupError if none is."""
        if not self._in_flight:
            raise LookupError("no plan is in flight")
        plan, vectors = self._in_flight[0]
        host = np.asarray(vectors)[: len(plan.texts)]
        self._in_flight.popleft()
        # A copy: a vector that a client still reads must not keep the whole step's.
        finished = host.copy() if self._finish is None else self._finish(host)
        return plan, EncodeResults(plan.step_id, finished)


def pack_texts(texts: Sequence[Sequence[int]], bucket: EncodeBucket) -> np.ndarray:
    """The step's inputs; places that no text takes have no tokens.

    Raises ValueError for more texts, or longer ones, than the bucket holds.
    """
    longest = max(map(len, texts), default=0)
    if len(texts) > bucket.num_texts or longest > bucket.num_positions:
        raise ValueError(f"{len(texts)} texts of up to {longest} tokens do not fit {bucket}")
    inputs = np.zeros((bucket.num_texts, 1 + bucket.num_positions), np.int32)
    for row, token_ids in zip(inputs, texts, strict=False):
        row[0] = len(token_ids)
        row[1 : 1 + len(token_ids)] = token_ids
    return inputs


def _compile_step(settings: EncoderSettings, bucket: EncodeBucket) -> tuple[Any, float]:
    start = perf_counter()
    params = settings.model.abstract_params(settings.dtype)
    inputs = jax.ShapeDtypeStruct((bucket.num_texts, 1 + bucket.num_positions), jnp.int32)
    program = jax.jit(partial(_step, settings)).lower(params, inputs).compile()
    return program, perf_counter() - start


def _step(settings: EncoderSettings, params: Params, inputs: jax.Array) -> jax.Array:
    return settings.model.compute(params, inputs[:, 1:], inputs[:, 0])


def _temp_bytes(program: Any) -> int:
    analysis = program.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0
