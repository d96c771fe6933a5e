"""What can be told about a run from its files, beside its supervisor or without one."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from checkpoint.store import ProcessIdentity, StoreReader
from jaxserve.trainer.ledger import committed_steps, read_ledger
from jaxserve.trainer.metrics_log import float_of_hex
from jaxserve.trainer.run_folder import RunFolder

SILENT_S = 30.0
EVENTS = (
    "failure", "rollback", "stuck", "spike", "resize", "rebalance", "ckpt_fallback",
    "checkpoint_failed",
)  # fmt: skip


def status_of(folder: RunFolder) -> dict[str, Any]:
    """A run's state as JSON values.

    Raises:
        RunError: there is no run; LedgerError: its ledger was changed.
    """
    folder.require()
    records = read_ledger(folder.ledger).records
    steps = committed_steps(records)
    counts = Counter(record["kind"] for record in records)
    live = folder.read_status() or {}
    is_alive = is_trained_now(folder)
    state = live.get("state") if is_alive else _state(records)
    status: dict[str, Any] = {
        "run_dir": str(folder.root),
        "state": state,
        "next_step": max(steps, default=-1) + 1,
        "total_steps": live.get("total_steps"),
        "generation": max((r["generation"] for r in records if "generation" in r), default=0),
        "checkpoints": StoreReader(folder.checkpoints).steps(),
        "events": {kind: counts[kind] for kind in EVENTS},
        "goodput": _goodput(records, live, is_over=state in ("finished", "stopped")),
    }
    if steps:
        newest = steps[max(steps)]
        status |= {
            "loss": float_of_hex(newest["loss_hex"]),
            "lr": float_of_hex(newest["lr_hex"]),
            "device_count": newest["device_count"],
            "pids": newest["pids"] if is_alive else [],
        }
    return status


def is_trained_now(folder: RunFolder) -> bool:
    """Whether a supervisor of this run lives; one on another machine, whether it spoke lately."""
    live = folder.read_status()
    if live is None or not live["is_alive"]:
        return False
    holder = ProcessIdentity(**live["holder"])
    if holder.is_local():
        return not holder.is_dead()
    return bool(time.time() - live["written_s"] < SILENT_S)


def _goodput(
    records: tuple[dict[str, Any], ...], live: dict[str, Any], *, is_over: bool
) -> dict[str, float] | None:
    """Of the newest start that trained: a later one that found nothing to do tells nothing."""
    if is_over:
        for record in reversed(records):
            if "goodput" in record:
                found: dict[str, float] = record["goodput"]
                return found
    return live.get("goodput")


def _state(records: tuple[dict[str, Any], ...]) -> str:
    for record in reversed(records):
        if record["kind"] == "done":
            return "finished"
        if record["kind"] == "stop":
            return "stopped"
        if record["kind"] == "step":
            return "interrupted"
    return "begun"
