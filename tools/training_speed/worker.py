"""The conversation between the benchmark and an engine's process: JSON lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from time import perf_counter


def serve(step: Callable[[], float], matmul_peak: Callable[[], float]) -> None:
    """Answer requests from standard input until it ends.

    `{"steps": n}` is answered with the seconds and the loss of each step, `{"peak": true}`
    with the largest rate of a plain matrix product, in operations a second.

    Args:
        step: one whole training step; returns the loss when all of it is done.
        matmul_peak: measures that rate.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # What libraries print must not end up among the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("peak"):
            answer: dict[str, object] = {"flops_per_s": matmul_peak()}
        else:
            seconds, losses = [], []
            for _ in range(request["steps"]):
                start_s = perf_counter()
                losses.append(step())
                seconds.append(perf_counter() - start_s)
            answer = {"seconds": seconds, "losses": losses}
        print(json.dumps(answer), file=answers, flush=True)


def best_rate(product: Callable[[], object], flops: float, repeats: int = 5) -> float:
    """Operations a second of the fastest of some calls, after one that does not count."""
    product()
    seconds = []
    for _ in range(repeats):
        start_s = perf_counter()
        product()
        seconds.append(perf_counter() - start_s)
    return flops / min(seconds)
