"""kill -9 and full disks: an acknowledged step is always there, a half-written one never."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from store_writer import Writer, WriterTemplate, equals_tree, tree_of

from checkpoint.store import Store, StoreReader


def check_after_a_crash(path: Path, writer: Writer, acked_before: int) -> int:
    """The newest step, after all that a reader and the next writer see was checked."""
    writer.wait_for_state("")
    acked = max(writer.acked(), default=acked_before)
    if not (path / "steps").is_dir():
        assert acked == 0
        return 0
    reader = StoreReader(path)
    steps = reader.steps()
    for step in steps[-2:]:
        assert reader.verify(step).ok, (step, reader.verify(step).problems)
    if steps:
        assert equals_tree(steps[-1], reader.restore(steps[-1], tree_of(steps[-1])))
    newest = max(steps, default=0)
    assert newest >= acked, f"acknowledged step {acked} is gone, there are {steps}"
    assert not any((path / "quarantine").iterdir())
    return newest


def kill_at(path: Path, template: WriterTemplate, strikes: list[dict[str, Any]]) -> int:
    """Kills one writer after another before a file-system call; how many were hit."""
    newest = hits = 0
    for strike in strikes:
        writer = template.start(
            path, num_saves=1, keep_last=2, strike={"signal_name": "SIGKILL", **strike}
        )
        newest = check_after_a_crash(path, writer, newest)
        hits += "end" not in writer.log()
    with Store(path) as store:
        assert not any((path / "staging").iterdir())
        assert not any((path / "fenced").iterdir())
        store.save(newest + 1, tree_of(newest + 1)).wait()
    return hits


def test_killed_while_committing(tmp_path: Path, template: WriterTemplate) -> None:
    strikes = [
        {"contains": "manifest.json"},
        {"contains": "commit.json"},
        {"contains": "publish-", "count": 1},
        {"contains": "publish-", "count": 2},
    ]
    assert kill_at(tmp_path, template, strikes) == 4
    assert StoreReader(tmp_path).steps() == [1]


@pytest.mark.long
def test_killed_at_every_call_of_a_save(tmp_path: Path, template: WriterTemplate) -> None:
    strikes = [{"count": count} for count in range(1, 50)]
    hits = kill_at(tmp_path, template, strikes)
    print(f"{hits} of {len(strikes)} calls were reached")
    assert 20 <= hits < len(strikes), "not every call of a save was reached"


@pytest.mark.long
def test_killed_at_every_call_of_opening(tmp_path: Path, template: WriterTemplate) -> None:
    strikes = [{"count": count, "from_open": True} for count in range(1, 36)]
    assert kill_at(tmp_path, template, strikes) >= 30


def kill_at_random(path: Path, template: WriterTemplate, count: int, seed: int) -> None:
    generator = random.Random(seed)
    newest = 0
    for _ in range(count):
        writer = template.start(path, num_saves=10_000, num_floats=20_000)
        writer.wait_for("ack")
        time.sleep(generator.random() * 0.3)
        writer.signal(signal.SIGKILL)
        after = check_after_a_crash(path, writer, newest)
        assert "end" not in writer.log()
        assert after > newest, f"seed {seed}"
        newest = after


def test_killed_at_random_moments(tmp_path: Path, template: WriterTemplate) -> None:
    kill_at_random(tmp_path, template, 3, seed=random.randrange(10**6))


@pytest.mark.long
def test_killed_at_30_random_moments(tmp_path: Path, template: WriterTemplate) -> None:
    kill_at_random(tmp_path, template, 30, seed=random.randrange(10**6))


def test_a_full_disk_is_reported_by_the_same_save(tmp_path: Path, template: WriterTemplate) -> None:
    writer = template.start(tmp_path, num_saves=3, file_limit_bytes=30_000)
    writer.wait_for("end")
    log = writer.log()
    assert log[:2] == ["open 1", "ack 1"]
    assert log[2].startswith("failed 2 SaveFailed step 2 was not saved"), log
    assert "File too large" in log[2]
    assert log[3:] == ["staged 0", "ack 3", "end"]
    reader = StoreReader(tmp_path)
    assert reader.steps() == [1, 3]
    for step in reader.steps():
        assert equals_tree(step, reader.restore(step, tree_of(step)))


ON_A_SMALL_DISK = r"""
set -e
mount -t tmpfs -o size=5m tmpfs "$1"
exec "$2" - "$1" "$3" <<'PYTHON'
import sys
from pathlib import Path
import numpy as np
from checkpoint.store import RetentionPolicy, SaveFailed, Store, StoreOptions
disk = Path(sys.argv[1])
def tree(step): return {"w": np.full(400_000, step, np.float32)}
keep = StoreOptions(retention=RetentionPolicy(keep_last=9))
with Store(disk / "run", keep) as store:
    failed = []
    for step in range(1, 7):
        try:
            store.save(step, tree(step)).wait()
        except SaveFailed as error:
            failed.append(step)
            assert "No space left" in str(error), error
            assert not any((disk / "run" / "staging").iterdir())
    good = store.steps()
    assert failed and good and good + failed == list(range(1, 7)), (good, failed)
    for step in good:
        assert store.verify(step).ok
    import shutil
    shutil.rmtree(disk / "run" / "steps" / f"{good[0]:012d}")
    store.save(7, tree(7)).wait()
    assert store.latest_good() == 7
    assert (store.restore(7, tree(0))["w"] == 7).all()
    assert store.num_failed_saves == len(failed)
print("good", good, "failed", failed)
PYTHON
"""


@pytest.mark.long
def test_a_full_disk_stays_usable(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    root = Path(__file__).resolve().parents[2]
    # A mount of its own, in a namespace of its own: it needs no root and leaves no trace.
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", ON_A_SMALL_DISK]
    done = subprocess.run(
        [*command, "bash", str(disk), sys.executable, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "failed [" in done.stdout, done.stderr


TWO_PROCESSES = """
import sys, jax, numpy as np
rank, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=60)
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from checkpoint.store import SaveFailed, Store, StoreReader
mesh = Mesh(np.array(jax.devices()), ("x",))
split, same = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
host = np.arange(8, dtype=np.float32)
everywhere = jax.make_array_from_callback((8,), same, lambda index: host[index])
done = Path(path, "done")
if rank == 0:
    with Store(Path(path, "run")) as store:
        store.save(1, {"w": everywhere}).wait(60)
    done.touch()
else:
    import time
    end = time.monotonic() + 60
    while not done.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    with Store(Path(path, "other")) as store:
        try:
            store.save(1, {"w": host}).wait(60)
        except SaveFailed as error:
            assert "process 0 can" in str(error)
        else:
            raise AssertionError("process 1 cannot write")
abstract = {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=split)}
tree = StoreReader(Path(path, "run")).restore(1, abstract)
(shard,) = tree["w"].addressable_shards
assert np.asarray(shard.data).tolist() == host[4 * rank : 4 * rank + 4].tolist()
print("restored")
"""


@pytest.mark.long
def test_one_of_two_jax_processes_saves_and_both_restore(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(port), str(tmp_path)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=110)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("restored" in output for output in outputs), "\n".join(outputs)
