"""Output tokens a second with and without speculative decoding, on texts that repeat and others.

    python tools/bench_speculation.py                         # the default model, 1 and 8 streams
    python tools/bench_speculation.py --model ./model --num-streams 4 --rounds 5

*quote*: answers that copy a passage out of their prompt, greedily. *open*: answers to short
questions, sampled. Two engines take turns, round by round, with the same requests, so that a slow
minute of the machine meets both. Prints a line of JSON for each: medians over rounds, the gain of
every round, CPU time (of all cores) for each token, how many drafted tokens came out, and how many
answers are the same tokens. Exit code 1 if any differs where the kernels promise equal bits, or if
an engine compiled after it was ready.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.offline import QueueSink
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import RunningEngine, start_engine

PASSAGES = Path(__file__).parents[1] / "examples" / "train" / "data" / "speeches.jsonl"
QUESTIONS = (
    "What makes a good friend?",
    "How do plants get their food?",
    "Tell me a story about a lost key.",
    "Why do people travel?",
    "Describe a storm at sea.",
    "What would you cook for ten guests?",
    "How does a bicycle stay upright?",
    "What should a small town do with an empty school?",
)
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, ignore_eos=True)

Answers = Mapping[str, tuple[int, ...]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=EngineConfig().model)
    parser.add_argument("--weights-format", default="float")
    parser.add_argument("--num-streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--kinds", nargs="+", default=["quote", "open"])
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--num-speculative-tokens", type=int)
    parser.add_argument("--prompt-lookup-min", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    plain = EngineConfig(arguments.model, weights_format=arguments.weights_format)
    drafting = replace(
        plain,
        speculative_method="ngram",
        num_speculative_tokens=arguments.num_speculative_tokens,
        prompt_lookup_min=arguments.prompt_lookup_min,
    )
    engines = {"plain": start_engine(plain), "drafting": start_engine(drafting)}
    try:
        # Each engine counts the compilations of the whole process since it was ready.
        drafting_engine, differs = engines["drafting"].engine, False
        for kind in arguments.kinds:
            for num_streams in arguments.num_streams:
                report = _compare(engines, kind, num_streams, arguments)
                differs |= report["num_same"] != report["num_answers"]
                print(json.dumps(report), flush=True)
        compiles = drafting_engine.snapshot().compiles_after_ready
        is_exact = engines["plain"].report.settings.native is not None
    finally:
        for one in engines.values():
            one.close()
    print(json.dumps({"compiles_after_ready": compiles}))
    return int(compiles > 0 or (is_exact and differs))


def _compare(
    engines: Mapping[str, RunningEngine],
    kind: str,
    num_streams: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in engines}
    cpu_ms: dict[str, list[float]] = {name: [] for name in engines}
    before = engines["drafting"].engine.snapshot()
    num_same = num_answers = 0
    for round_index in range(-1, arguments.rounds):  # The first one warms up.
        answers: dict[str, Answers] = {}
        for name, running in engines.items():
            requests = _requests(running, kind, num_streams, arguments.output_len, round_index)
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            answers[name] = _answer(running, requests)
            seconds = time.perf_counter() - start_s
            cpu_s = time.process_time() - start_cpu_s
            if round_index >= 0:
                num_tokens = sum(map(len, answers[name].values()))
                rates[name].append(num_tokens / seconds)
                cpu_ms[name].append(1e3 * cpu_s / num_tokens)
        num_same += sum(answers["plain"][key] == answers["drafting"][key] for key in requests)
        num_answers += len(requests)
    after = engines["drafting"].engine.snapshot()
    num_drafted = after.num_draft_tokens - before.num_draft_tokens
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    pairs = zip(rates["drafting"], rates["plain"], strict=True)
    return {
        "kind": kind,
        "num_streams": num_streams,
        "plain_tokens_per_s": statistics.median(rates["plain"]),
        "drafting_tokens_per_s": statistics.median(rates["drafting"]),
        "gains": [drafting / plain for drafting, plain in pairs],
        "plain_cpu_ms_per_token": statistics.median(cpu_ms["plain"]),
        "drafting_cpu_ms_per_token": statistics.median(cpu_ms["drafting"]),
        "num_drafted": num_drafted,
        "acceptance": num_accepted / max(1, num_drafted),
        "num_same": num_same,
        "num_answers": num_answers,
    }


def _requests(
    running: RunningEngine, kind: str, num_streams: int, output_len: int, round_index: int
) -> dict[str, GenerationRequest]:
    """By name; each round asks something else."""
    requests = {}
    for index in range(num_streams):
        number = (round_index + 1) * num_streams + index
        if kind == "quote":
            sampling = replace(GREEDY, max_tokens=output_len)
            text = f"Repeat this text word for word:\n\n{_passage(number)}"
        else:
            sampling = replace(SAMPLED, seed=number, max_tokens=output_len)
            text = QUESTIONS[number % len(QUESTIONS)]
        prompt = running.tokenizer.encode_chat([{"role": "user", "content": text}])
        name = f"{kind}-{num_streams}-{number}"
        requests[name] = GenerationRequest(name, tuple(prompt), sampling)
    return requests


def _passage(number: int) -> str:
    """About a hundred words."""
    lines = PASSAGES.read_text(encoding="utf-8").splitlines()
    words: Sequence[str] = json.loads(lines[number % len(lines)])["text"].split()
    return " ".join(words[:100])


def _answer(running: RunningEngine, requests: Mapping[str, GenerationRequest]) -> Answers:
    """Side by side, to their end."""
    sink = QueueSink()
    answers: dict[str, tuple[int, ...]] = dict.fromkeys(requests, ())
    for request in requests.values():
        running.engine.add(request, sink)
    num_open = len(requests)
    while num_open:
        for output in sink.take():
            answers[output.request_id] += output.token_ids
            num_open -= output.finish_reason is not None
    return answers


if __name__ == "__main__":
    sys.exit(main())
