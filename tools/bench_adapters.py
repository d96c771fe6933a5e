"""What room for adapters costs: time per output token with 0, 1 and 4 adapters of rank 16.

    python tools/bench_adapters.py --rounds 5

Three engines of one model, each with its number of places, take turns in one process; streams go
through the adapters in turn. Adapters have random numbers, in every projection.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

import jax
import jax.numpy as jnp

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import RunningEngine, open_generator, start_engine
from models.lora import Lora, LoraConfig, init_adapters
from models.lora_peft import save_peft

NUM_PLACES = (0, 1, 4)
PROMPT = tuple(range(100, 132))


def main() -> None:
    """Prints the figures as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--kernels", default="xla")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output-len", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        adapters = _make_adapters(args.model, Path(folder), args.rank)
        engines = {}
        for places in NUM_PLACES:
            lora = tuple((path.name, path) for path in adapters[:places])
            config = EngineConfig(
                model=args.model,
                kernels=args.kernels,
                lora=lora,
                prefix_caching=False,
                max_model_len=256,
            )
            engines[places] = start_engine(config)
            opened.callback(engines[places].close)
        rows = [
            {"streams": streams, "tpot_ms": _measure(engines, streams, args)}
            for streams in args.streams
        ]
    if args.json:
        print(json.dumps(rows))
        return
    print(f"TPOT in ms, median of {args.rounds} rounds, by places for adapters")
    print("streams  " + "".join(f"{places:>10}" for places in NUM_PLACES))
    for row in rows:
        print(f"{row['streams']:>7}  " + "".join(f"{ms:10.1f}" for ms in row["tpot_ms"].values()))


def _make_adapters(model: str, folder: Path, rank: int) -> list[Path]:
    source = open_generator(model)
    abstract = source.family.abstract_params(source.config, jnp.float32)
    paths = []
    for index in range(max(NUM_PLACES)):
        made = init_adapters(abstract, LoraConfig(rank, 2.0 * rank), jax.random.key(index))
        noise = jax.tree.map(
            lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(1), leaf.shape), made
        )
        paths.append(folder / f"adapter-{index}")
        save_peft(paths[-1], Lora(noise, 2.0), source.config)
    return paths


def _measure(
    engines: dict[int, RunningEngine], streams: int, args: argparse.Namespace
) -> dict[int, float]:
    """Places -> median time per output token, in ms. The first round warms up."""
    found: dict[int, list[float]] = {places: [] for places in engines}
    for number in range(args.rounds + 1):
        for places, running in engines.items():
            tpot_ms = _round(running, streams, args.output_len)
            if number:
                found[places].append(tpot_ms)
    return {places: statistics.median(values) for places, values in found.items()}


def _round(running: RunningEngine, streams: int, output_len: int) -> float:
    names: Sequence[str] = [one.name for one in running.engine.adapters.all()] or [""]
    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    requests = [
        GenerationRequest(f"r{n}", PROMPT, sampling, adapter=names[n % len(names)])
        for n in range(streams)
    ]
    started_s = perf_counter()
    outputs = list(complete_in_order(running.engine, requests, max_ahead=streams))
    first_s = max(one.usage.ttft_s for one in outputs)
    return 1e3 * (perf_counter() - started_s - first_s) / (output_len - 1)


if __name__ == "__main__":
    main()
