"""The lease: one writer at a time, numbered by epochs.

A writer claims epoch N+1 by creating `lease/epoch-(N+1).json`, which only one can do. It
may do so when the holder of epoch N has released the store, is a dead process of this
machine, or is a process of another machine that shows no heartbeat. A holder that was
wrongly taken for dead does no harm: its gate is shut (see gate.py).

A heartbeat counts by its *change*, watched with the watcher's own monotonic clock, so
clocks of two machines may differ. Wall-clock times only shorten the wait for a lease
that was left long ago.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.store.durable import canonical_json, fsync_path, write_new_file
from checkpoint.store.errors import Fenced, LeaseHeld
from checkpoint.store.gate import Gate, clear_staging, fence_older_epochs
from checkpoint.store.identity import ProcessIdentity
from checkpoint.store.layout import StoreLayout

logger = logging.getLogger(__name__)

POLL_S = 0.05
HEARTBEATS_PER_TTL = 4
NUM_CLAIMS_KEPT = 16
OLD_TEMPORARY_S = 3600.0


@dataclass(frozen=True)
class Claim:
    """What `lease/epoch-N.json` says.

    Attributes:
        epoch: N.
        holder: who claimed it.
        ttl_s: seconds without a heartbeat after which a remote holder counts as gone.
    """

    epoch: int
    holder: ProcessIdentity
    ttl_s: float

    def encode(self) -> bytes:
        """The file's bytes."""
        return canonical_json(
            {"epoch": self.epoch, "holder": self.holder.to_json(), "ttl_s": self.ttl_s}
        )


class Lease:
    """The right to write to a store, from `acquire` until `release` or until fenced.

    Attributes:
        epoch: number of this writer; a newer writer has a higher one.
        gate: the gate of this epoch.
    """

    def __init__(self, layout: StoreLayout, claim: Claim, gate: Gate) -> None:
        self.epoch = claim.epoch
        self.gate = gate
        self._layout = layout
        self._claim = claim
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, name=f"checkpoint-lease-{self.epoch}", daemon=True
        )
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        layout: StoreLayout,
        holder: ProcessIdentity,
        *,
        ttl_s: float,
        wait_s: float,
        take_over: bool = False,
    ) -> Lease:
        """Become the writer.

        Args:
            layout: the store; its folders exist.
            holder: this process.
            ttl_s: for how long other machines let this writer be silent, in seconds.
            wait_s: how long to wait for a living holder to release the store, in seconds.
            take_over: fence a living holder, too.

        Raises:
            LeaseHeld: there is a living holder; the message names it.
        """
        watch = _HeartbeatWatch(layout, wait_s)
        while True:
            current = newest_claim(layout)
            if current is None or take_over or watch.is_free(current):
                lease = cls._claim_next(layout, current, holder, ttl_s)
                if lease is not None:
                    return lease
                take_over = False  # Somebody else was faster: that one is to be asked anew.
            elif watch.is_time_up():
                raise LeaseHeld(_held_text(layout, current))
            else:
                time.sleep(POLL_S)

    @classmethod
    def _claim_next(
        cls, layout: StoreLayout, current: Claim | None, holder: ProcessIdentity, ttl_s: float
    ) -> Lease | None:
        # Gates count too: a damaged claim may have been deleted by hand.
        epoch = 1 + max([0 if current is None else current.epoch, *layout.list_gates()])
        claim = Claim(epoch, holder, ttl_s)
        _beat_path(layout, epoch).write_bytes(_heartbeat(0))
        if not _create_atomically(_claim_path(layout, epoch), claim.encode()):
            return None
        gate = Gate(layout, epoch)
        gate.make()
        # A newer claim is made either before this look at the claims, which then sees it,
        # or after; in that case the gate is there already and the newer writer shuts it.
        newest = newest_claim(layout)
        if newest is None or newest.epoch != epoch:
            gate.remove()
            return None
        if current is not None:
            logger.info("%s: epoch %d follows %s", layout.root, epoch, current.holder)
        fence_older_epochs(layout, epoch)
        clear_staging(layout, epoch)
        _forget_old_claims(layout, epoch)
        return cls(layout, claim, gate)

    def check(self) -> None:
        """Raises Fenced when this is not the newest writer, or a forked copy of it."""
        if os.getpid() != self._pid:
            raise Fenced("a forked process does not inherit the lease: open the store in it anew")
        if self._stop.is_set():
            raise Fenced(f"{self._layout.root}: the store is closed")
        self.gate.check()
        newest = newest_claim(self._layout)
        if newest is not None and newest.epoch > self.epoch:
            raise Fenced(
                f"{self._layout.root}: {newest.holder} took the store over with epoch "
                f"{newest.epoch}; this writer has epoch {self.epoch} and is fenced. "
                "End this process: the newer writer has the store"
            )

    def release(self) -> None:
        """Give the store back; the next writer need not wait. May be called again."""
        if self._stop.is_set() or os.getpid() != self._pid:
            return
        self._stop.set()
        self._thread.join(timeout=5)
        self.gate.remove()
        with contextlib.suppress(OSError):  # Then the next writer finds that we are dead.
            _released_path(self._layout, self.epoch).touch()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._claim.ttl_s / HEARTBEATS_PER_TTL):
            count += 1
            try:
                # Never creates the file: a fenced writer leaves nothing behind.
                with _beat_path(self._layout, self.epoch).open("r+b") as file:
                    file.write(_heartbeat(count))
            except OSError as error:
                logger.warning("%s: no heartbeat: %s", self._layout.root, error)


class _HeartbeatWatch:
    """Judges whether the holder of a claim is gone."""

    def __init__(self, layout: StoreLayout, wait_s: float) -> None:
        self._layout = layout
        self._end_s = time.monotonic() + wait_s
        self._is_extended = False
        self._seen: tuple[int, bytes] | None = None
        self._seen_since_s = 0.0

    def is_time_up(self) -> bool:
        return time.monotonic() >= self._end_s

    def is_free(self, claim: Claim) -> bool:
        if _released_path(self._layout, claim.epoch).exists():
            return True
        if claim.holder.is_local():
            return claim.holder.is_dead()
        now_s = time.monotonic()
        seen = (claim.epoch, _read_or_empty(_beat_path(self._layout, claim.epoch)))
        if seen != self._seen:
            self._seen, self._seen_since_s = seen, now_s
        silent_s = now_s - self._seen_since_s
        if _recorded_age_s(seen[1]) <= claim.ttl_s:
            return silent_s >= claim.ttl_s
        # Old by the clocks: two heartbeats' time is enough, and is worth waiting for.
        needed_s = 2 * claim.ttl_s / HEARTBEATS_PER_TTL
        if not self._is_extended:
            self._is_extended = True
            self._end_s = max(self._end_s, now_s + needed_s + POLL_S)
        return silent_s >= needed_s


def newest_claim(layout: StoreLayout) -> Claim | None:
    """The claim with the highest epoch; None in a new store."""
    epochs = layout.list_claims()
    if not epochs:
        return None
    path = _claim_path(layout, epochs[-1])
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        holder = ProcessIdentity(**fields["holder"])
        return Claim(int(fields["epoch"]), holder, float(fields["ttl_s"]))
    except (ValueError, KeyError, TypeError) as error:
        raise LeaseHeld(
            f"{path} is damaged ({error}). Make sure that no writer is alive, then delete it"
        ) from error


def _held_text(layout: StoreLayout, claim: Claim) -> str:
    held = f"{layout.root}: {claim.holder} is writing to this store (epoch {claim.epoch})"
    if claim.holder.is_local():
        return f"{held} and is alive. Stop it first, or open the store with take_over"
    return (
        f"{held} on another machine, and its heartbeat is fresh. Stop it, wait "
        f"{claim.ttl_s:g} s after its end, or open the store with take_over"
    )


def _claim_path(layout: StoreLayout, epoch: int) -> Path:
    return layout.lease / f"epoch-{epoch:08d}.json"


def _beat_path(layout: StoreLayout, epoch: int) -> Path:
    return layout.lease / f"epoch-{epoch:08d}.heartbeat"


def _released_path(layout: StoreLayout, epoch: int) -> Path:
    return layout.lease / f"epoch-{epoch:08d}.released"


def _heartbeat(count: int) -> bytes:
    return f"{count:012d} {time.time():020.3f}\n".encode()


def _recorded_age_s(heartbeat: bytes) -> float:
    try:
        return abs(time.time() - float(heartbeat.split()[1]))
    except (ValueError, IndexError):
        return 0.0


def _read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _create_atomically(path: Path, data: bytes) -> bool:
    """Whether this call created `path`, whole; False if it was there."""
    temporary = path.with_name(f"tmp-{secrets.token_hex(8)}")
    write_new_file(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    fsync_path(path.parent)
    return True


def _forget_old_claims(layout: StoreLayout, epoch: int) -> None:
    for path in layout.lease.glob("epoch-*"):
        number = path.name.removeprefix("epoch-").split(".")[0]
        if number.isdigit() and int(number) <= epoch - NUM_CLAIMS_KEPT:
            path.unlink(missing_ok=True)
    for path in layout.lease.glob("tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > OLD_TEMPORARY_S:
                path.unlink()
