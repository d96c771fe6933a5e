"""A server of one's own: `jaxserve serve` as a child process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import IO

from jaxserve.engine.config import EngineConfig
from jaxserve.errors import JaxserveError

STOP_TIMEOUT_S = 20.0


class ServerFailed(JaxserveError):
    """The child ended before it was ready."""


def changed_options(config: EngineConfig) -> list[str]:
    """The command line that gives `config`, for all that differs from the default."""
    options: list[str] = []
    for field in fields(EngineConfig):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            options += [f"--{flag}", ",".join(str(part) for part in value)]
        else:
            options += [f"--{flag}", str(value)]
    return options


@contextmanager
def own_server(config: EngineConfig) -> Iterator[str]:
    """Starts a server on free ports, yields its address, and ends it.

    Raises ServerFailed with what the server said.
    """
    command = [sys.executable, "-m", "jaxserve", "serve", "--grpc-port", "0", "--http-port", "0"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(  # noqa: S603  our own program, no shell
            [*command, *changed_options(config)], stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            yield _address_of(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _address_of(process: subprocess.Popen[str], log: IO[str]) -> str:
    assert process.stdout is not None
    match = re.match(r"READY grpc=(\S+)", process.stdout.readline())
    if match is None:
        process.wait()
        log.seek(0)
        raise ServerFailed(f"the server did not become ready:\n{log.read().strip()}")
    return match[1]
