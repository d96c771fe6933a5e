"""A trainer process: JAX and the models. The fork server imports this module once for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.trainer import worker
from jaxserve.trainer.control import Channel
from jaxserve.trainer.runner_factory import make_runner


def main(spec: Mapping[str, Any], channel: Channel, memory_fd: int) -> int:
    """See `worker.main`."""
    return worker.main(spec, channel, memory_fd, make_runner)
