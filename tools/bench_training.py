"""Tokens a second of our training step beside PyTorch's, on the same cores and weights.

    python tools/bench_training.py [smollm2-135m llama-10m] [--threads 2] [--json]

PyTorch and transformers get an environment of their own under build/, made at first use. Every
engine is a process that holds the same weights and steps on the same batch; they take turns, so
that what else the machine does hits all alike. Losses are compared: an engine that computes
something else does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from checkpoint.param_loading import export_tensors
from jaxserve.trainer.allocator import allocator_environment
from models.hf_config import config_from_hf
from models.registry import get_family
from tools.peers.environment import PeerEnvironment
from tools.training_speed.case import CASES, Case

ROOT = Path(__file__).resolve().parent.parent
PEER_ENVIRONMENT = PeerEnvironment(
    ROOT / "build" / "training_peer", ("torch==2.13.0", "transformers==5.23.0", "numpy")
)
OURS = "jaxserve"
PEERS = {"torch eager": "eager", "torch compile": "compile"}
MAX_LOSS_DIFFERENCE = 2e-3
"""Of two engines at the same step, in nats."""


class Engine:
    """An engine's process."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"an engine ended with code {self.process.wait()}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self, num_steps: int, *, counts: bool) -> None:
        """Take steps; their times are kept if they count."""
        answer = self.ask({"steps": num_steps})
        self.losses += answer["losses"]
        if counts:
            self.seconds += answer["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Run the cases and print or dump the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--threads", type=int, default=2, help="cores that every engine gets")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each engine")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that do not count")
    parser.add_argument(
        "--options", default='{"remat": "dots"}', help="JSON: fields of our StepConfig"
    )
    parser.add_argument("--engines", nargs="+", choices=[OURS, *PEERS], default=[OURS, *PEERS])
    parser.add_argument(
        "--tune-peers", action="store_true", help="give the peers our allocator settings too"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = sorted(set(args.cases) - CASES.keys())
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if set(args.engines) & set(PEERS):
        PEER_ENVIRONMENT.make()
    # Inherited by the engines.
    os.sched_setaffinity(0, cores_of(args.threads))
    results = [run_case(CASES[name], args) for name in args.cases]
    print(json.dumps(results, indent=2) if args.json else "\n".join(map(text_of, results)))


def cores_of(num_threads: int) -> list[int]:
    """As many of this process's cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_threads:
        sys.exit(f"--threads {num_threads}: this process may use {len(cores)} cores only")
    return cores[:num_threads]


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All engines in turns on one case."""
    with tempfile.TemporaryDirectory(prefix="training_speed_") as folder:
        write_inputs(case, Path(folder))
        engines = {
            name: Engine(command_of(name, folder, args), environment_of(name, args))
            for name in args.engines
        }
        for engine in engines.values():
            engine.step(args.warm_up, counts=False)
        for _ in range(args.rounds):
            for engine in engines.values():
                engine.step(args.steps, counts=True)
        peaks = {
            name: engine.ask({"peak": True})["flops_per_s"] for name, engine in engines.items()
        }
        for engine in engines.values():
            engine.close()
    return figures(case, engines, max(peaks.values()), args)


def command_of(name: str, folder: str, args: argparse.Namespace) -> list[str]:
    """What starts an engine."""
    if name == OURS:
        return [sys.executable, "-m", "tools.training_speed.jax_engine", folder, args.options]
    python = str(PEER_ENVIRONMENT.python)
    module = "tools.training_speed.torch_engine"
    return [python, "-m", module, folder, PEERS[name], str(args.threads)]


def environment_of(name: str, args: argparse.Namespace) -> dict[str, str]:
    """Ours runs as trainers do; peers as they come, or with the same allocator if asked."""
    is_peer = name in PEERS
    allocator = {} if is_peer and not args.tune_peers else allocator_environment({})
    return allocator | {"TORCHINDUCTOR_CACHE_DIR": str(PEER_ENVIRONMENT.folder / "inductor")}


def write_inputs(case: Case, folder: Path) -> None:
    """Random weights as a Hugging Face folder, and one batch of random tokens."""
    config = config_from_hf(case.hf_config())
    family = get_family(config.family)
    params = family.init_params(config, jax.random.key(0), jnp.float32)
    tensors = dict(export_tensors(params, family.name_tables["hf"](config)))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case.hf_config()))
    (folder / "case.json").write_text(json.dumps(case.to_fields()))
    generator = np.random.default_rng(0)
    shape = (case.batch_size, case.seq_len + 1)
    np.save(folder / "tokens.npy", generator.integers(0, case.vocab_size, shape, dtype=np.int32))


def figures(
    case: Case, engines: dict[str, Engine], peak_flops_per_s: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Rates, spreads and ratios."""
    per_engine: dict[str, Any] = {}
    for name, engine in engines.items():
        rates = sorted(case.num_tokens / seconds for seconds in engine.seconds)
        rate = case.num_tokens / median(engine.seconds)
        per_engine[name] = {
            "tokens_per_s": rate,
            "slowest_tokens_per_s": rates[0],
            "fastest_tokens_per_s": rates[-1],
            "flops_per_s": rate / case.num_tokens * case.step_flops,
            "losses": engine.losses,
        }
    result: dict[str, Any] = {
        "case": case.to_fields(),
        "threads": args.threads,
        "dtype": "float32",
        "our_options": json.loads(args.options),
        "peers_have_our_allocator_settings": args.tune_peers,
        "peak_flops_per_s": peak_flops_per_s,
        "engines": per_engine,
    }
    peers = [figure for name, figure in per_engine.items() if name in PEERS]
    if OURS in per_engine and peers:
        check_losses(engines)
        fastest = max(figure["tokens_per_s"] for figure in peers)
        result["ratio_to_fastest_peer"] = per_engine[OURS]["tokens_per_s"] / fastest
    return result


def check_losses(engines: dict[str, Engine]) -> None:
    """All engines must have trained the same model on the same batch."""
    for name, engine in engines.items():
        for ours, theirs in zip(engines[OURS].losses, engine.losses, strict=True):
            if not abs(ours - theirs) <= MAX_LOSS_DIFFERENCE:
                sys.exit(f"{name} has the loss {theirs} where ours is {ours}: not the same step")


def text_of(result: dict[str, Any]) -> str:
    """A small table."""
    case, peak = result["case"], result["peak_flops_per_s"]
    head = (
        f"{case['name']}: batch {case['batch_size']} x {case['seq_len']} tokens, "
        f"{result['dtype']}, {result['threads']} threads; "
        f"a matrix product reaches {peak / 1e9:.0f} GFLOP/s here"
    )
    lines = [head]
    for name, figure in result["engines"].items():
        lines.append(
            f"  {name:14s} {figure['tokens_per_s']:8.1f} tokens/s "
            f"({figure['slowest_tokens_per_s']:.1f} to {figure['fastest_tokens_per_s']:.1f}), "
            f"{figure['flops_per_s'] / peak:.0%} of that rate, "
            f"loss {figure['losses'][0]:.4f} to {figure['losses'][-1]:.4f}"
        )
    if "ratio_to_fastest_peer" in result:
        lines.append(f"  ours / fastest peer: {result['ratio_to_fastest_peer']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
