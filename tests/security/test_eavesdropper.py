"""What somebody learns who sees the times and sizes of a stream's messages, and no content.

Two kinds of answers: short tokens one by one, or long ones in bursts, as speculation gives them; of
the same length in tokens and time. A classifier is trained on what the network shows of them.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator

import numpy as np

from jaxserve.engine.request import RequestOutput, joined
from jaxserve.server import convert
from jaxserve.server.pacing import IMMEDIATE, Pacing, paced

NUM_STREAMS = 160
"""Of each kind; half of them to train on."""
NUM_TOKENS = 18
TOKEN_S = 0.012
JITTER_S = 0.001
"""Of the network, which the eavesdropper sees as well."""
NOTHING = RequestOutput("", (), "")


class _Clock(selectors.DefaultSelector):
    """A time that passes only while an event loop waits, so that a busy machine changes nothing."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now_s += timeout or 0.0
        return super().select(0)


def _virtual_loop() -> asyncio.AbstractEventLoop:
    clock = _Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now_s
    return loop


async def _answer(kind: int, rng: np.random.Generator) -> AsyncIterator[RequestOutput]:
    burst, loop = (1, 3)[kind], asyncio.get_running_loop()
    begin_s = loop.time()
    for start in range(0, NUM_TOKENS, burst):
        # By the clock, so that many waits take no longer than few.
        due_s = begin_s + TOKEN_S * (start + burst - rng.uniform(0.0, 0.3))
        await asyncio.sleep(due_s - loop.time())
        lengths = rng.integers(1, 4, burst) if kind == 0 else rng.integers(4, 9, burst)
        yield RequestOutput(
            request_id="r",
            token_ids=tuple(range(start, start + burst)),
            text="".join("x" * length for length in lengths),
        )


async def _seen(kind: int, pacing: Pacing, rng: np.random.Generator) -> list[tuple[float, int]]:
    """When each message leaves, and its bytes."""
    loop, seen = asyncio.get_running_loop(), []
    if pacing.is_immediate:
        async for output in _answer(kind, rng):
            seen += [(loop.time(), m.ByteSize()) for m in convert.responses(output)]
        return seen
    batches = paced(
        _answer(kind, rng),
        pacing,
        num_tokens=lambda output: len(output.token_ids),
        fits=lambda batch: convert.fits(joined(batch), pacing),
    )
    async for batch in batches:
        output = joined(batch) if batch else NOTHING
        seen += [(loop.time(), m.ByteSize()) for m in convert.responses(output, pacing)]
    return seen


def _features(seen: list[tuple[float, int]], rng: np.random.Generator) -> list[float]:
    times, sizes = (np.array(column, float) for column in zip(*seen, strict=True))
    times = times + rng.normal(0.0, JITTER_S, len(times))
    gaps = np.diff(times)
    gaps = gaps if len(gaps) else np.zeros(1)
    return [
        len(seen),
        sizes.mean(),
        sizes.std(),
        sizes.max(),
        sizes.sum(),
        gaps.mean(),
        gaps.std(),
        times[-1] - times[0],
    ]


def _area_under_curve(pacing: Pacing) -> float:
    """Of a logistic classifier, on streams that it was not trained on: 0.5 is guessing."""

    async def watch() -> list[list[tuple[float, int]]]:
        generators = np.random.default_rng(1).spawn(2 * NUM_STREAMS)
        return await asyncio.gather(
            *(_seen(index % 2, pacing, rng) for index, rng in enumerate(generators))
        )

    with asyncio.Runner(loop_factory=_virtual_loop) as runner:
        streams = runner.run(watch())
    rng = np.random.default_rng(2)
    features = np.array([_features(seen, rng) for seen in streams])
    labels = np.arange(2 * NUM_STREAMS) % 2
    spread = features.std(axis=0)
    x = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    train, test = slice(None, NUM_STREAMS), slice(NUM_STREAMS, None)
    weights, bias = np.zeros(x.shape[1]), 0.0
    for _ in range(500):
        error = 1 / (1 + np.exp(-(x[train] @ weights + bias))) - labels[train]
        weights -= 0.3 * (x[train].T @ error / NUM_STREAMS + 0.01 * weights)
        bias -= 0.3 * error.mean()
    scores = x[test] @ weights
    ones, zeros = scores[labels[test] == 1], scores[labels[test] == 0]
    above = (ones[:, None] > zeros).mean() + 0.5 * (ones[:, None] == zeros).mean()
    return float(above)


def test_messages_that_leave_as_they_come_tell_everything():
    assert _area_under_curve(IMMEDIATE) > 0.95


def test_a_strict_stream_tells_nothing_but_its_length():
    # 80 streams of each kind: guessing gives 0.5, with a standard error of 0.045.
    assert 0.3 < _area_under_curve(Pacing(flush_ms=40, pad_bytes=128, strict=True)) < 0.7


def test_waiting_and_padding_alone_still_tell():
    """What docs/security.md says of them: they hide some, not all."""
    assert _area_under_curve(Pacing(flush_ms=40, pad_bytes=128)) > 0.7
