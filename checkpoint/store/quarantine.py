"""Steps moved aside: kept for a person to look at, never deleted by the store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from checkpoint.store.durable import canonical_json, write_new_file
from checkpoint.store.gate import Gate
from checkpoint.store.layout import StoreLayout

logger = logging.getLogger(__name__)


def move_aside(layout: StoreLayout, gate: Gate, step: int, reasons: Sequence[str]) -> Path:
    """Moves a step to quarantine, with a `.reason.json` beside it.

    Returns:
        Where it is now.

    Raises:
        Fenced: a newer writer has taken over; nothing was moved.
    """
    number = 1
    while (target := layout.quarantine / f"{step:012d}-e{gate.epoch:08d}-{number}").exists():
        number += 1
    gate.quarantine(layout.step(step), target)
    try:
        data = canonical_json({"step": step, "epoch": gate.epoch, "reasons": list(reasons)})
        write_new_file(target.with_name(f"{target.name}.reason.json"), data)
    except OSError as error:
        logger.warning("%s: no reason could be written beside it: %s", target, error)
    return target


def is_empty(layout: StoreLayout) -> bool:
    """Whether no step was ever moved aside."""
    return not layout.quarantine.is_dir() or not any(layout.quarantine.iterdir())
