"""The whole way once: a real server process, a real gRPC client, a real answer.

    python tools/demo.py
    python tools/demo.py --question "Why is the sky blue?" -- --buckets one

Arguments after `--` go to `jaxserve serve`. Exits 1 when any part fails.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxserve.client import Client

QUESTION = "What is the capital of France, and what is it known for?"
START_TIMEOUT_S = 900.0
"""The first start downloads the model and compiles."""
STOP_TIMEOUT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("serve_arguments", nargs="*", metavar="-- ARGUMENTS OF SERVE")
    arguments = parser.parse_args()

    start_s = time.perf_counter()
    with _server(arguments.serve_arguments) as (process, address):
        ready_s = time.perf_counter() - start_s
        with Client(address) as client:
            client.wait_until_serving(timeout_s=10)
            figures = _ask(client, arguments.question, arguments.max_tokens)
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(STOP_TIMEOUT_S)
    print(f"server exit code {exit_code}")
    if exit_code != 0:
        sys.exit(f"demo FAILED: the server ended with {exit_code}, not 0")
    print(f"demo OK: ready in {ready_s:.1f} s, {figures}")


@contextmanager
def _server(serve_arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs `jaxserve serve` on free ports; gives its process and gRPC address."""
    ports = ["--grpc-port", "0", "--http-port", "0"]
    command = [sys.executable, "-m", "jaxserve.cli.main", "serve", *ports, *serve_arguments]
    print("$ jaxserve serve", *ports, *serve_arguments, flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        yield process, _wait_for_ready(process)
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait_for_ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        match = re.match(r"READY grpc=(\S+)", line)
        if match:
            return match[1]
    sys.exit(f"demo FAILED: the server ended with {process.wait()} before it was ready")


def _ask(client: Client, question: str, max_tokens: int) -> str:
    """Prints the answer as it comes; returns the figures of it in one line."""
    print(f"\n> {question}\n", flush=True)
    messages = [{"role": "user", "content": question}]
    start_s = time.perf_counter()
    times_s: list[float] = []
    usage = reason = None
    for delta in client.generate(messages, temperature=0.0, max_tokens=max_tokens):
        times_s.extend([time.perf_counter()] * len(delta.token_ids))
        print(delta.text, end="", flush=True)
        usage, reason = delta.usage or usage, delta.finish_reason or reason
    print("\n")
    if usage is None or len(times_s) < 2:
        sys.exit("demo FAILED: the stream ended without an answer")
    ttft_s = times_s[0] - start_s
    tpot_s = (times_s[-1] - times_s[0]) / (len(times_s) - 1)
    return (
        f"{usage.num_prompt_tokens} prompt tokens, {len(times_s)} tokens ({reason}), "
        f"TTFT {ttft_s * 1000:.0f} ms, TPOT {tpot_s * 1000:.1f} ms"
    )


if __name__ == "__main__":
    main()
