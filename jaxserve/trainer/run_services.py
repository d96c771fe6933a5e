"""What all generations of a run share: the supervisor's record of it, and what is asked of it."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from checkpoint.store import Fenced, ProcessIdentity
from jaxserve.trainer.balance import Speeds
from jaxserve.trainer.config import PlacementSection, TrainConfig
from jaxserve.trainer.goodput import Goodput
from jaxserve.trainer.ledger import Ledger
from jaxserve.trainer.metrics_log import MetricsLog
from jaxserve.trainer.run_checkpoints import RunCheckpoints
from jaxserve.trainer.run_folder import RunFolder

REQUEST_POLL_S = 0.25


class View(Protocol):
    """Where a run shows itself."""

    def say(self, text: str, *, warn: bool = False) -> None:
        """One line about what happens."""
        ...

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step is committed."""
        ...


@dataclass(frozen=True)
class StopRequest:
    """Why trainers are to stop after the steps under way.

    Attributes:
        reason: "preempted" (a signal), "stop" (the command), "resize", "rebalance",
            "save_failed".
        placement: of "resize": who is to go on.
        speeds: of "rebalance": of the processes, which are to share the work by them.
    """

    reason: str
    placement: PlacementSection | None = None
    speeds: Speeds | None = None

    @property
    def goes_on(self) -> bool:
        """Whether a next generation follows at once."""
        return self.reason in ("resize", "rebalance")


class Signals:
    """SIGTERM and SIGINT as a count, and as something to wait for."""

    def __init__(self) -> None:
        self.count = 0
        self.wakeup, self._write = socket.socketpair()
        self.wakeup.setblocking(False)
        self._write.setblocking(False)

    def install(self) -> Callable[[], None]:
        """Takes the signals over. Returns what gives them back."""

        def heard(_number: int, _frame: object) -> None:
            self.count += 1

        before = {number: signal.signal(number, heard) for number in
                  (signal.SIGTERM, signal.SIGINT)}  # fmt: skip
        former_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)

        def restore() -> None:
            signal.set_wakeup_fd(former_fd)
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore


@dataclass
class RunServices:
    """See the module.

    Attributes:
        request: what trainers are to stop for, if anything.
        is_hurried: stop without waiting for the steps under way.
        quarantined_ids: examples that are never read again.
        uncommitted_since_s: since when the ledger cannot be written (monotonic seconds).
    """

    config: TrainConfig
    folder: RunFolder
    ledger: Ledger
    checkpoints: RunCheckpoints
    metrics: MetricsLog
    goodput: Goodput
    view: View
    signals: Signals
    allow_numerics_change: bool = False
    request: StopRequest | None = None
    is_hurried: bool = False
    quarantined_ids: set[int] = field(default_factory=set)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _signals_seen: int = 0
    _polled_s: float = 0.0

    def look_for_requests(self) -> None:
        """Takes up signals, and files left by `jaxserve train stop` and `resize`.

        Raises:
            Fenced: another writer has the run.
        """
        if self.signals.count > self._signals_seen:
            self._signals_seen = self.signals.count
            self.preempt("a signal")
        now_s = self.clock()
        if now_s - self._polled_s < REQUEST_POLL_S:
            return
        self._polled_s = now_s
        self.checkpoints.check_lease()
        self.write_status(is_alive=True)
        for asked in self.folder.take_requests():
            self._take_up(asked)

    def write_status(self, *, is_alive: bool) -> None:
        """Tells `jaxserve train status` how it goes."""
        # A full disk stops no run because of this, and a fenced writer is silent.
        with contextlib.suppress(OSError, Fenced):
            self.checkpoints.check_lease()
            self.folder.write_status(
                {
                    "is_alive": is_alive,
                    "state": "stopping" if self.request is not None else "running",
                    "holder": ProcessIdentity.current().to_json(),
                    "written_s": time.time(),
                    "total_steps": self.config.total_steps,
                    "ckpt_failures_total": self.checkpoints.num_failed,
                    "goodput": self.goodput.summary(),
                }
            )

    def preempt(self, who: str) -> None:
        """The run must end soon. Asked for twice, it ends at once."""
        if self.request is not None and self.request.reason == "preempted":
            self.is_hurried = True
            self.view.say("again asked to end: not waiting for the steps under way", warn=True)
            return
        self.view.say(f"{who} asks for the end: stopping after the steps under way")
        self.request = StopRequest("preempted")

    def _take_up(self, asked: Mapping[str, Any]) -> None:
        if asked.get("kind") == "stop":
            self.view.say("asked to stop")
            if self.request is None or self.request.goes_on:
                self.request = StopRequest("stop")
        elif asked.get("kind") == "resize":
            placement = PlacementSection(
                processes=int(asked["processes"]),
                devices_per_process=int(asked["devices_per_process"]),
                sharding=self.config.placement.sharding,
            )
            if placement.num_devices > self.config.batch.num_logical_shards:
                self.view.say(
                    f"cannot use {placement.num_devices} devices: there are "
                    f"{self.config.batch.num_logical_shards} logical shards",
                    warn=True,
                )
            elif self.request is None or self.request.reason == "rebalance":
                self.request = StopRequest("resize", placement)
