"""TensorBoard's event files, when a run asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.trainer.errors import RunError

SCALARS = ("loss", "evaluation_loss", "grad_norm", "lr", "seconds")


class EventFiles:
    """Writes the scalars of metrics lines."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError: what writes them is not installed."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise RunError(
                "logging.tensorboard needs tensorboardX: pip install 'jaxserve[tensorboard]', or "
                "set it to false (metrics.jsonl has the same figures)"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Adds the scalars that a line has, at its step."""
        for name in SCALARS:
            if name in metrics:
                self._writer.add_scalar(name, metrics[name], metrics["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
