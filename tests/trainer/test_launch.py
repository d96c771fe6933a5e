"""Trainers of several processes: what they keep for the next generation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxserve.distributed import free_port
from jaxserve.trainer.launch import child_environment, environment_now

_TRAINER = """
import json, sys
import jax
from jaxserve.trainer.launch import Place, set_up_jax

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
set_up_jax(Place(int(sys.argv[1]), 2, 1, sys.argv[2], sys.argv[3]))
jax.jit(lambda x: x * 2 + 1)(jax.device_put(1.0, jax.local_devices()[0])).block_until_ready()
names = {"asked": "compile_requests_use_cache", "hits": "cache_hits"}
counts = {name: events.count(f"/jax/compilation_cache/{event}") for name, event in names.items()}
print(json.dumps({**counts, "process": jax.process_index(), "device": jax.local_devices()[0].id}))
"""


def start_both(cache: Path) -> list[dict[str, Any]]:
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TRAINER, str(rank), coordinator, str(cache)],
            env=child_environment(environment_now()), stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # Gloo prints beside it.
    return [json.loads(one[one.index(b"{") : one.index(b"}") + 1]) for one in said]


@pytest.mark.long
def test_every_process_finds_what_it_compiled(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cold, warm = start_both(cache), start_both(cache)
    assert [one["process"] for one in cold] == [0, 1]
    assert cold[0]["device"] != cold[1]["device"]
    assert all(one["hits"] < one["asked"] for one in cold)
    assert all(one["hits"] == one["asked"] for one in warm)
    assert (cache / "rank-1").stat().st_mode & 0o777 == 0o700
