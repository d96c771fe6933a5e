"""Speed and memory of `jaxserve checkpoint convert` on a synthetic model of any size.

Makes a Llama folder of random float32 weights, converts it in a process of its own, and prints
time and peak memory beside three bounds: `cp -r` of the folder, the same with a sync of what it
wrote, and the sum of a plain read and a plain write of as many bytes (read to nowhere; written
from memory and synced, as a conversion syncs its target). Rounds measure all by turns; the medians
are printed, with the least and the most. Sources are in the page cache.

    .venv/bin/python tools/bench_migration.py --gigabytes 1 --rounds 5
    .venv/bin/python tools/bench_migration.py --gigabytes 4 --largest-gigabytes 1.5 --tied \\
        --memory-budget 700MB --memory-cgroup /sys/fs/cgroup/memory/convert

A conversion is called FROM-TO, or FROM-gguf-TYPE for the type of the matrices.

With `--memory-cgroup`, the kernel holds the process to the budget: the folder is made in a cgroup
hierarchy (version 1 or 2) that you may write to. `--source` is where the model is kept for the
next call; beside it lies what is made of it as a source of others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from checkpoint.formats.safetensors_writer import ShardTensor, make_header
from jaxserve.cli.engine_options import parse_byte_size
from jaxserve.migration.request import FORMATS

HEAD_DIM = 64
BLOCK_BYTES = 16 << 20
CONVERSIONS = (
    "safetensors-safetensors",
    "safetensors-orbax",
    "orbax-safetensors",
    "safetensors-gguf-F16",
    "safetensors-gguf-Q8_0",
)
LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
CHILD = """
import json, sys, time
from checkpoint.migrate.run import peak_memory_bytes
from jaxserve.cli.main import main
import jaxserve.migration.convert, jaxserve.migration.logits
before = peak_memory_bytes()
start = time.perf_counter()
code = 0
try:
    main()
except SystemExit as error:
    code = error.code or 0
seconds = time.perf_counter() - start
peak = peak_memory_bytes()
print("MEASURED", json.dumps({"code": code, "seconds": seconds, "peak": peak, "imports": before}))
"""


@dataclass(frozen=True)
class Case:
    """One conversion that is measured: see the module."""

    source: str
    to: str
    quantization: str | None

    @classmethod
    def parse(cls, name: str) -> Case:
        """Raises argparse.ArgumentTypeError."""
        source, _, rest = name.partition("-")
        to, _, quantization = rest.partition("-")
        if source not in ("safetensors", "orbax") or to not in FORMATS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no conversion: give safetensors or orbax, -, and one of "
                f"{', '.join(FORMATS)}"
            )
        return cls(source, to, quantization or None)

    @property
    def name(self) -> str:
        """The inverse of `parse`."""
        return "-".join(filter(None, (self.source, self.to, self.quantization)))


@dataclass(frozen=True)
class Measured:
    """One conversion.

    Attributes:
        seconds: from the command's start to its end, without starting Python.
        process_s: of the whole process, with Python's start and imports.
        peak_bytes: most memory that the process held.
        imports_bytes: what it held after its imports.
        num_bytes: of the model.
    """

    seconds: float
    process_s: float
    peak_bytes: int
    imports_bytes: int
    num_bytes: int


def write_synthetic(
    folder: Path, num_bytes: int, largest_bytes: int, *, is_tied: bool = False
) -> int:
    """A Llama folder whose embedding has `largest_bytes`, and its head, too, unless it is tied.

    Returns:
        Bytes of the tensors.
    """
    folder.mkdir()
    hidden = 2048 if num_bytes >= 1 << 30 else 512
    vocab = largest_bytes // (4 * hidden) | 1  # Odd: nothing divides evenly.
    ffn = 2 * hidden
    layer_bytes = 4 * (4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden)
    num_tables = 1 if is_tied else 2
    num_layers = max(1, (num_bytes - num_tables * vocab * hidden * 4) // layer_bytes)
    tensors = list(_tensors(vocab, hidden, ffn, num_layers))[: None if not is_tied else -1]
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": is_tied,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    total = sum(tensor.num_bytes for tensor in tensors)
    block = np.random.default_rng(0).normal(0, 0.02, BLOCK_BYTES // 4).astype(np.float32).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(make_header(tensors, {"format": "pt"}))
        for start in range(0, total, len(block)):
            file.write(block[: min(len(block), total - start)])
        file.flush()
        os.fsync(file.fileno())
    return total


def _tensors(vocab: int, hidden: int, ffn: int, num_layers: int) -> Iterator[ShardTensor]:
    def tensor(name: str, *shape: int) -> ShardTensor:
        return ShardTensor(f"{name}.weight", "float32", shape, 4 * int(np.prod(shape)))

    yield tensor("model.embed_tokens", vocab, hidden)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        yield tensor(f"{prefix}input_layernorm", hidden)
        for part in "qkvo":
            yield tensor(f"{prefix}self_attn.{part}_proj", hidden, hidden)
        yield tensor(f"{prefix}post_attention_layernorm", hidden)
        yield tensor(f"{prefix}mlp.gate_proj", ffn, hidden)
        yield tensor(f"{prefix}mlp.up_proj", ffn, hidden)
        yield tensor(f"{prefix}mlp.down_proj", hidden, ffn)
    yield tensor("model.norm", hidden)
    yield tensor("lm_head", vocab, hidden)


def measure_conversion(
    source: Path,
    target: Path,
    to: str,
    num_bytes: int,
    *,
    quantization: str | None = None,
    memory_budget: str | None = None,
    read_back: str | None = None,
    cgroup: Path | None = None,
) -> Measured:
    """Convert in a process of its own.

    Raises:
        RuntimeError: the conversion failed; holds what it printed.
    """
    arguments = ["convert", str(source), str(target), "--to", to, "--json"]
    if quantization is not None:
        arguments += ["--quantization", quantization]
    if read_back is not None:
        arguments += ["--read-back", read_back]
    if memory_budget is not None:
        arguments += ["--memory-budget", memory_budget]
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", CHILD, "checkpoint", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=None if cgroup is None else lambda: _enter(cgroup),
    )
    process_s = time.perf_counter() - start
    found = [line for line in process.stdout.splitlines() if line.startswith("MEASURED ")]
    result = (
        json.loads(found[0].removeprefix("MEASURED ")) if found else {"code": process.returncode}
    )
    if result["code"] != 0:
        raise RuntimeError(f"exit code {result['code']}:\n{process.stdout}{process.stderr}")
    peak, imports = result["peak"], result["imports"]
    return Measured(result["seconds"], process_s, peak, imports, num_bytes)


def make_cgroup(path: Path, limit_bytes: int) -> None:
    """A cgroup with a limit on memory. Raises OSError if this user may not make it."""
    path.mkdir(exist_ok=True)
    limit = next(path / name for name in LIMIT_FILES if (path / name).exists())
    limit.write_text(str(limit_bytes))


def _enter(cgroup: Path) -> None:
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def seconds_of_copy(source: Path, target: Path, *, is_synced: bool) -> float:
    """`cp -r`, and a sync of what was written. Deletes the copy afterwards."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    if is_synced:
        for path in target.iterdir():
            _sync(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def seconds_of_plain_io(file: Path, target: Path) -> tuple[float, float]:
    """Reading a file to nowhere, and writing as many bytes from memory, synced."""
    size = file.stat().st_size
    start = time.perf_counter()
    buffer = read_file(file)
    read_s = time.perf_counter() - start
    start = time.perf_counter()
    with target.open("wb", buffering=0) as sink:
        for done in range(0, size, BLOCK_BYTES):
            sink.write(buffer[: min(BLOCK_BYTES, size - done)])
        os.fsync(sink.fileno())
    return read_s, time.perf_counter() - start


def read_file(file: Path) -> bytearray:
    """Read it to nowhere; returns the last block."""
    buffer = bytearray(BLOCK_BYTES)
    with file.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass
    return buffer


def read_all(folder: Path) -> None:
    """So that it is in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            read_file(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the model")
    parser.add_argument("--largest-gigabytes", type=float, default=0.1, help="of one tensor")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--source", type=Path, help="the model: made if missing, and kept")
    cases = [Case.parse(name) for name in CONVERSIONS]
    parser.add_argument("--conversions", nargs="+", type=Case.parse, default=cases)
    parser.add_argument("--memory-budget", help="as of the command")
    parser.add_argument("--read-back", help="as of the command")
    parser.add_argument("--memory-cgroup", type=Path, help="made with the budget as its limit")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where files are made; else the temporary one")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.memory_cgroup is not None:
        if args.memory_budget is None:
            parser.error("--memory-cgroup needs --memory-budget")
        make_cgroup(args.memory_cgroup, parse_byte_size(args.memory_budget))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-migration-") as folder:
        report = run(Path(folder), args)
    if args.memory_cgroup is not None:
        args.memory_cgroup.rmdir()
    print(json.dumps(report, indent=2) if args.json else text_of(report))


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, bounds and conversions by turns."""
    kept = args.source or folder / "source"
    if not kept.exists():
        largest = int(args.largest_gigabytes * 1e9)
        write_synthetic(kept, int(args.gigabytes * 1e9), largest, is_tied=args.tied)
    num_bytes = (kept / "model.safetensors").stat().st_size
    sources = {"safetensors": kept, "orbax": kept.with_name(f"{kept.name}-orbax")}
    if any(case.source == "orbax" for case in args.conversions) and not sources["orbax"].exists():
        measure_conversion(kept, sources["orbax"], "orbax", num_bytes)
    rounds = []
    for _ in range(args.rounds):
        entry = measure_bounds(kept, folder)
        print(entry, file=sys.stderr, flush=True)
        for case in args.conversions:
            target = folder / ("made.gguf" if case.to == "gguf" else "made")
            read_all(sources[case.source])
            measured = measure_conversion(
                *(sources[case.source], target, case.to, num_bytes),
                quantization=case.quantization,
                memory_budget=args.memory_budget,
                read_back=args.read_back,
                cgroup=args.memory_cgroup,
            )
            entry[case.name] = asdict(measured)
            print(case.name, measured, file=sys.stderr, flush=True)
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        rounds.append(entry)
        print(text_of({"num_bytes": num_bytes, "rounds": [entry]}), file=sys.stderr, flush=True)
    return {"num_bytes": num_bytes, "rounds": rounds}


def measure_bounds(source: Path, folder: Path) -> dict[str, Any]:
    """Seconds of `cp`, `cp` and a sync, and of plain input and output."""
    read_all(source)
    copy_s = seconds_of_copy(source, folder / "copy", is_synced=False)
    synced_s = seconds_of_copy(source, folder / "copy", is_synced=True)
    read_s, write_s = seconds_of_plain_io(source / "model.safetensors", folder / "plain")
    (folder / "plain").unlink()
    return {"copy_s": copy_s, "synced_copy_s": synced_s, "plain_s": read_s + write_s}


def text_of(report: dict[str, Any]) -> str:
    """A line a measurement."""
    size, rounds = report["num_bytes"], report["rounds"]
    bounds = {
        name: [entry[name] for entry in rounds] for name in ("copy_s", "synced_copy_s", "plain_s")
    }
    lines = [
        f"model of {size / 1e9:.2f} GB, {len(rounds)} rounds",
        f"cp {_spread(bounds['copy_s'])}; cp and sync {_spread(bounds['synced_copy_s'])}",
        f"plain read + plain write {_spread(bounds['plain_s'])}",
    ]
    for name in (name for name, found in rounds[0].items() if isinstance(found, dict)):
        found = [entry[name] for entry in rounds]
        seconds = [one["seconds"] for one in found]
        middle = median(seconds)
        lines.append(
            f"  {name:<24} {_spread(seconds)}, {size / 1e6 / middle:.0f} MB/s, "
            f"{100 * median(bounds['plain_s']) / middle:.0f} % of read + write, "
            f"{_ratios(seconds, bounds['copy_s'])} x cp, "
            f"{_ratios(seconds, bounds['synced_copy_s'])} x cp and sync; whole process "
            f"{_spread([one['process_s'] for one in found])}; peak "
            f"{max(one['peak_bytes'] for one in found) / 1e6:.0f} MB, imports "
            f"{max(one['imports_bytes'] for one in found) / 1e6:.0f} MB"
        )
    return "\n".join(lines)


def _ratios(seconds: list[float], bound: list[float]) -> str:
    """Of each round: what disturbs the disk disturbs both."""
    ratios = [one / other for one, other in zip(seconds, bound, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _spread(seconds: list[float]) -> str:
    return f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
