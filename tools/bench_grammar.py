"""What constrained requests cost the others: streams with and without them, side by side.

    python tools/bench_grammar.py                         # the default model, 32 streams
    python tools/bench_grammar.py --model ./model --num-streams 8 --num-constrained 2

Runs the same load twice on one engine: all streams free, then some of them held to a JSON schema.
Prints the step's time, TPOT of the free streams in both runs, TPOT of the constrained ones, and
what a mask takes. Exit code 1 if the median step got more than 10 % longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.engine.offline import QueueSink
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import start_engine

SCHEMA = {
    "type": "object",
    "properties": {
        "words": {
            "type": "array",
            "minItems": 200,
            "items": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "maxLength": 12},
                    "kind": {"enum": ["noun", "verb", "other"]},
                    "count": {"type": "integer", "minimum": 0, "maximum": 999},
                },
                "required": ["word", "kind", "count"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["words"],
    "additionalProperties": False,
}
MOST_STRETCH = 0.1


@dataclass(frozen=True, slots=True)
class Run:
    steps_ms: Sequence[float]
    """Of steps in which all streams were running."""
    free_tpot_ms: float
    constrained_tpot_ms: float | None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=EngineConfig().model)
    parser.add_argument("--num-streams", type=int, default=32)
    parser.add_argument("--num-constrained", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    arguments = parser.parse_args()
    running = start_engine(EngineConfig(arguments.model, max_num_seqs=arguments.num_streams))
    try:
        mask_us = _time_masks(running.engine)
        runs = {}
        # The first one warms up.
        for name, count in (("", 0), ("free", 0), ("mixed", arguments.num_constrained)):
            runs[name] = _run(running.engine, arguments, count)
        compiles = running.engine.snapshot().compiles_after_ready
    finally:
        running.close()
    free, mixed = runs["free"], runs["mixed"]
    stretch = statistics.median(mixed.steps_ms) / statistics.median(free.steps_ms) - 1
    report = {
        "num_streams": arguments.num_streams,
        "num_constrained": arguments.num_constrained,
        "step_ms_p50_free": statistics.median(free.steps_ms),
        "step_ms_p50_mixed": statistics.median(mixed.steps_ms),
        "step_ms_p90_free": statistics.quantiles(free.steps_ms, n=10)[-1],
        "step_ms_p90_mixed": statistics.quantiles(mixed.steps_ms, n=10)[-1],
        "stretch": stretch,
        "tpot_ms_of_free_streams": free.free_tpot_ms,
        "tpot_ms_of_free_streams_beside": mixed.free_tpot_ms,
        "tpot_ms_of_constrained_streams": mixed.constrained_tpot_ms,
        "mask_us_p50": statistics.median(mask_us),
        "mask_us_max": max(mask_us),
        "compiles_after_ready": compiles,
    }
    print(json.dumps(report, indent=2))
    return int(stretch > MOST_STRETCH or compiles > 0)


def _run(engine: Engine, arguments: argparse.Namespace, num_constrained: int) -> Run:
    """Streams that start together and have as many tokens to make."""
    engine.metrics.keep_recent_steps(100_000)
    sink = QueueSink()
    constraint = Constraint.json_schema(SCHEMA)
    times: dict[str, list[float]] = {}
    constrained = set()
    for index in range(arguments.num_streams):
        is_constrained = index < num_constrained
        request_id = f"{num_constrained}-{index}"
        if is_constrained:
            constrained.add(request_id)
        prompt = tuple((7 * index + 3 * i) % 200 + 10 for i in range(arguments.input_len))
        sampling = SamplingParams(
            temperature=0.8,
            seed=index,
            max_tokens=arguments.output_len,
            # A constrained stream could end by itself, which its schema keeps it from.
            ignore_eos=not is_constrained,
            constraint=constraint if is_constrained else None,
        )
        times[request_id] = []
        engine.add(GenerationRequest(request_id, prompt, sampling), sink)
    num_open = arguments.num_streams
    while num_open:
        outputs = sink.take()
        now_s = time.perf_counter()
        for output in outputs:
            times[output.request_id] += [now_s] * len(output.token_ids)
            num_open -= output.finish_reason is not None
    recorded = list(engine.metrics.recent_steps)
    # Once the free ones are done, steps are smaller; while prompts come in, larger.
    fullest = max(step.num_tokens for step in recorded[len(recorded) // 4 :])
    free = [t for name, t in times.items() if name not in constrained]
    last_free_s = min(t[-1] for t in free)
    first_s = max(t[0] for t in free)
    shift_s = time.perf_counter() - time.monotonic()
    steps = [
        1e3 * step.step_s
        for step in recorded
        if first_s < step.completed_s + shift_s <= last_free_s and step.num_tokens <= fullest
    ]
    return Run(
        steps_ms=steps,
        free_tpot_ms=_tpot_ms(free),
        constrained_tpot_ms=_tpot_ms([times[name] for name in constrained])
        if constrained
        else None,
    )


def _tpot_ms(streams: Sequence[Sequence[float]]) -> float:
    """Median over streams of the mean time between tokens."""
    return 1e3 * statistics.median((t[-1] - t[0]) / (len(t) - 1) for t in streams)


def _time_masks(engine: Engine) -> list[float]:
    """Microseconds of one mask each, along a text that the schema allows."""
    import numpy as np

    grammars = engine.grammars
    grammar = grammars.compile(Constraint.json_schema(SCHEMA))
    matcher, words = grammar.matcher.deep_copy(), grammar.first_words
    rng = np.random.default_rng(0)
    times = []
    for _ in range(200):
        bits = np.unpackbits(np.frombuffer(words, np.uint8), bitorder="little")
        token_id = int(rng.choice(np.flatnonzero(bits)))
        start = time.perf_counter()
        matcher.consume_token(token_id)
        words = grammars.reader.words(matcher)
        times.append(1e6 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    sys.exit(main())
