"""SmolLM2-135M on this machine's cores: our server beside vLLM's and llama.cpp's.

    python tools/compare_peers.py --out build/peers [--engines NAME ...] [--rows NAME ...]

Every engine is its own HTTP server, asked by one client for the same tokens: greedy, to the full
length. Peers get environments of their own under --environments, made at first use by pip. Engines
take turns; what is measured is written to OUT/records.jsonl at once, and the same command goes on
with what is missing. `--table` prints what is there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jaxserve.model_store import resolve
from models.loading import open_model
from tools.peers import quality
from tools.peers.catalogue import (
    BFLOAT16,
    NAMES,
    OURS,
    PAIRS,
    Q4_1,
    XLA,
    Catalogue,
    model_size,
)
from tools.peers.ceilings import Ceilings, ModelSize, measure_ceilings
from tools.peers.engine import Engine
from tools.peers.held import held_servers, hold
from tools.peers.load import ROWS
from tools.peers.measure import Plan, measure_cold_start, measure_loads, start
from tools.peers.records import Record, Records
from tools.peers.table import engine_table, figures_table, ratio_table

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "train" / "data" / "speeches.jsonl"
DEFAULT_ENGINES = ("llama.cpp", Q4_1, XLA, "vLLM", BFLOAT16)
PARTS = ("loads", "cold", "quality")


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=list(DEFAULT_ENGINES))
    rows = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--time-limit-s", type=float, default=3600.0, help="begin no load later")
    parser.add_argument(
        "--trace", type=Path, help="CSV of the mixed load's lengths; built-in quantiles without"
    )
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--torch-index", help="index of PyTorch's CPU builds")
    parser.add_argument(
        "--hold",
        action="store_true",
        help="start the engines and keep them ready, for the same command without it",
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    # Also then the servers that it has started are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    records = Records(args.out)
    if not args.table:
        is_complete = measure(records, args)
        if not is_complete:
            sys.exit("time is up: the same command goes on")
    print("\n".join(report(list(records))))


def measure(records: Records, args: argparse.Namespace) -> bool:
    """All parts that are asked for. True if nothing is missing."""
    gguf = resolve("smollm2-135m-instruct")
    catalogue = Catalogue(
        gguf=gguf,
        folder=args.environments.resolve(),
        torch_index=args.torch_index,
        num_threads=len(os.sched_getaffinity(0)),
    )
    engines = [catalogue.make(name) for name in args.engines]
    describe(records, engines, gguf)
    cache_root = catalogue.folder / "compiled"
    if args.hold:
        hold(engines, records, args.out, cache_root, open_model(gguf).config.vocab_size)
    is_complete = True
    if "loads" in args.parts:
        plan = Plan(
            rows=[row for row in ROWS if row.name in args.rows],
            num_rounds=args.rounds,
            vocab_size=open_model(gguf).config.vocab_size,
            trace=args.trace,
            time_limit_s=args.time_limit_s,
            cache_root=cache_root,
        )
        is_complete = measure_loads(engines, plan, records, held_servers(engines, args.out))
    if "cold" in args.parts:
        for engine in engines:
            if not records.has(kind="start-cold", engine=engine.name):
                measure_cold_start(engine, records)
    if "quality" in args.parts:
        measure_quality(catalogue, engines, records, cache_root)
    return is_complete


def describe(records: Records, engines: Sequence[Engine], gguf: Path) -> None:
    """What the table needs beside times."""
    if not records.has(kind="machine"):
        machine = asdict(measure_ceilings())
        records.add({"kind": "machine", "cpu": cpu_name(), **machine})
    if not records.has(kind="model"):
        records.add({"kind": "model", **asdict(model_size(gguf))})
    for engine in engines:
        if not records.has(kind="engine", engine=engine.name):
            fields = ("weights", "compute", "weights_bytes", "kv_value_bytes", "notes")
            described = {name: getattr(engine, name) for name in fields}
            records.add({"kind": "engine", "engine": engine.name, **described})


def measure_quality(
    catalogue: Catalogue, engines: Sequence[Engine], records: Records, cache_root: Path
) -> None:
    """Perplexity where an engine tells logprobs of prompts, and greedy answers of all."""
    token_ids = open_model(catalogue.gguf).load_tokenizer().encode(quality.read_text(TEXT))
    reference = reference_answers(catalogue, records, token_ids, cache_root)
    for engine in engines:
        if not records.has(kind="agreement", engine=engine.name):
            with start(engine, records, cache_root) as server:
                texts = quality.answers(server, token_ids)
                records.add(quality.agreement_record(engine.name, texts, reference))
                if engine.name == "vLLM":
                    value = quality.perplexity_by_prompt_logprobs(server, token_ids)
                    records.add(perplexity_record(engine.name, value))
        if engine.name in OURS and not records.has(kind="perplexity", engine=engine.name):
            variant, model = OURS[engine.name], catalogue.model_of(engine.name)
            value = quality.perplexity_of_ours(model, variant.options, TEXT)
            records.add(perplexity_record(engine.name, value))


def reference_answers(
    catalogue: Catalogue, records: Records, token_ids: Sequence[int], cache_root: Path
) -> list[str]:
    """Those of the GGUF's weights in float32."""
    for record in records:
        if record["kind"] == "agreement" and record["engine"] == XLA:
            return list(record["texts"])
    with start(catalogue.make(XLA), records, cache_root) as server:
        texts = quality.answers(server, token_ids)
    records.add(quality.agreement_record(XLA, texts, texts))
    return texts


def perplexity_record(engine: str, value: float) -> Record:
    return {"kind": "perplexity", "engine": engine, "perplexity": value}


def report(records: Sequence[Record]) -> list[str]:
    """Markdown."""
    by_kind = {record["kind"]: record for record in records}
    if "machine" not in by_kind:
        sys.exit("there are no records yet")
    machine = Ceilings(**{name: by_kind["machine"][name] for name in Ceilings.__slots__})
    model = ModelSize(**{name: by_kind["model"][name] for name in ModelSize.__slots__})
    engines = [record for record in records if record["kind"] == "engine"]
    ceilings = (
        f"{by_kind['machine']['cpu']}, {machine.num_cores} cores: a copy moves "
        f"{machine.bytes_per_s / 1e9:.1f} GB/s (read and written), a float32 product makes "
        f"{machine.flops_per_s / 1e9:.0f} GFLOP/s."
    )
    return [
        ceilings,
        "",
        *figures_table(records, machine, model, engines),
        "",
        *ratio_table(records, PAIRS),
        "",
        *engine_table(records, engines),
    ]


def cpu_name() -> str:
    """As Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


if __name__ == "__main__":
    main()
