"""Reads a run's records without any code of ours: what the tests hold the product against."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts


def ledger_records(path: Path) -> list[dict[str, Any]]:
    """All lines; fails on any that does not continue the chain."""
    records, prev = [], "0" * 64
    data = path.read_bytes()
    assert data.endswith(b"\n"), "the ledger ends within a line"
    for line in data.splitlines():
        record = json.loads(line)
        assert record["prev_sha256"] == prev, f"broken chain at {line!r}"
        prev = hashlib.sha256(line).hexdigest()
        records.append(record)
    return records


def committed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a step, in order, after all rollbacks; fails on a gap or a double."""
    steps: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "rollback":
            assert record["to_step"] <= len(steps)
            del steps[record["to_step"] :]
        elif record["kind"] == "step":
            assert record["step"] == len(steps), f"step {record['step']} after {len(steps)} steps"
            steps.append(record)
    return steps


def kinds(records: list[dict[str, Any]]) -> Counter[str]:
    """How often each kind of record stands in the ledger."""
    return Counter(record["kind"] for record in records)


def results(steps: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be the same for any number of devices, of every step."""
    names = ("step", "loss_hex", "grad_norm_hex", "lr_hex", "first_index", "last_index")
    names = (*names, "ids_sha256", "params_digest")
    return [tuple(step.get(name) for name in names) for step in steps]


def checkpoint_arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name, read with TensorStore alone."""
    folder = run / "checkpoints" / "steps" / f"{step:012d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    arrays = {}
    for name in manifest["arrays"]:
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{folder}/arrays/",
                "path": name.replace("/", ".") + "/",
            },
        }
        arrays[name] = np.asarray(ts.open(spec, open=True, read=True).result().read().result())
    return arrays


def last_checkpoint(run: Path) -> int:
    """The newest step with a commit record."""
    steps = run / "checkpoints" / "steps"
    return max(int(path.parent.name) for path in steps.glob("*/commit.json"))


def reads(run: Path) -> list[dict[str, Any]]:
    """Every read that a trainer really made, in no order."""
    return [
        json.loads(line)
        for path in (run / "logs").glob("reads-*.jsonl")
        for line in path.read_text().splitlines()
    ]
