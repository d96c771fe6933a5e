"""One generation of trainers: expendable processes that begin and end together."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.process_ties import Child, is_stopped
from jaxserve.trainer.control import Channel, Message
from jaxserve.trainer.errors import RunError
from jaxserve.trainer.fork_server import ForkServer
from jaxserve.trainer.launch import Place
from jaxserve.trainer.memory_file import MemoryFile, Phase, Status

STACK_DUMP_S = 2.0
END_S = 5.0
KILL_S = 30.0
STALE_HEARTBEAT_S = 3.0
_WAITING_FOR_OTHERS = (Phase.EXCHANGING, Phase.WAITING, Phase.DONE)


@dataclass(frozen=True)
class Event:
    """Something that trainer `rank` said; `{"ended": HOW}` when its process is over."""

    rank: int
    message: Message


@dataclass
class _Trainer:
    rank: int
    child: Child
    channel: Channel
    log: Path
    is_over: bool = False


class Generation:
    """The trainers of one generation, and their memory file.

    Attributes:
        number: of the generation, from 1.
        memory: their snapshots.
        ranges: the byte ranges of the state that each trainer writes, once it has said so.
    """

    def __init__(
        self,
        number: int,
        server: ForkServer,
        places: Sequence[Place],
        spec: Mapping[str, Any],
        log_dir: Path,
        wakeup: socket.socket,
        start_timeout_s: float,
    ) -> None:
        """Forks the trainers.

        Args:
            number: see there.
            server: forks them.
            places: one for each.
            spec: what all of them get, beside their place.
            log_dir: for their output.
            wakeup: readable when a signal has come, which ends a `poll`.
            start_timeout_s: for the fork server's imports.

        Raises:
            RunError: they cannot be started; none is left.
        """
        self.number = number
        self.memory = MemoryFile.create(len(places))
        self.ranges: list[list[tuple[int, int]]] = [[] for _ in places]
        self._server = server
        self._trainers: list[_Trainer] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ, None)
        self._wakeup = wakeup
        try:
            for place in places:
                log = log_dir / f"generation-{number:04d}-rank-{place.rank}.log"
                self._trainers.append(self._spawn(place, spec, log, start_timeout_s))
        except RunError:
            self.kill()
            self.close()
            self.memory.close()
            raise

    @property
    def num_trainers(self) -> int:
        """Processes of the generation."""
        return self.memory.num_trainers

    @property
    def pids(self) -> list[int]:
        """Their process ids, by rank."""
        return [trainer.child.pid for trainer in self._trainers]

    def poll(self, timeout_s: float) -> list[Event]:
        """Waits for something to happen; what the trainers said, in order for each."""
        events: list[Event] = []
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wakeup.recv(4096)
                continue
            trainer, is_end = key.data
            events += self._end(trainer) if is_end else self._hear(trainer)
        return events

    def tell(self, message: Message) -> None:
        """Sends an order to all."""
        for trainer in self._trainers:
            # A stopped trainer reads nothing; the watchdog sees to it.
            with contextlib.suppress(BlockingIOError):
                if not trainer.is_over:
                    trainer.channel.send(message)

    def statuses(self) -> list[Status]:
        """Every trainer's row in the memory file."""
        return [self.memory.status(rank) for rank in range(self.num_trainers)]

    def find_stuck(self) -> list[int]:
        """The ranks that hold the others up: stopped, silent, or not waiting for the others."""
        now_s = time.monotonic()
        statuses = self.statuses()
        silent = [
            trainer.rank
            for trainer, status in zip(self._trainers, statuses, strict=True)
            if is_stopped(trainer.child.pid) or now_s - status.alive_s > STALE_HEARTBEAT_S
        ]
        if silent:
            return silent
        least = min(status.step for status in statuses)
        behind = [rank for rank, status in enumerate(statuses) if status.step == least]
        busy = [rank for rank in behind if statuses[rank].phase not in _WAITING_FOR_OTHERS]
        return busy or behind

    def dump_stacks(self) -> None:
        """Has every trainer write its threads' stacks into its log and end."""
        for trainer in self._trainers:
            trainer.child.signal(signal.SIGABRT)
            trainer.child.signal(signal.SIGCONT)
        deadline_s = time.monotonic() + STACK_DUMP_S
        for trainer in self._trainers:
            trainer.child.wait(deadline_s - time.monotonic())

    def finish(self) -> None:
        """Lets trainers that have stopped end by themselves, then sees that all are gone."""
        self.tell({"end": True})
        deadline_s = time.monotonic() + END_S
        for trainer in self._trainers:
            trainer.child.wait(deadline_s - time.monotonic())
        self.kill()

    def kill(self) -> None:
        """Kills all trainers and returns when every one is gone. What they said before can
        still be polled.

        Raises:
            RunError: one does not end, which only the kernel can explain.
        """
        for trainer in self._trainers:
            trainer.child.kill_group()
        for trainer in self._trainers:
            if not trainer.child.wait(KILL_S):
                raise RunError(
                    f"trainer {trainer.rank} (process {trainer.child.pid}) does not end although "
                    f"it was killed {KILL_S:g} s ago; it hangs in the kernel, perhaps on a disk"
                )

    def close(self) -> None:
        """Lets go of the killed trainers. The memory file stays until it is closed itself."""
        for trainer in self._trainers:
            trainer.child.close()
            trainer.channel.close()
        self._trainers = []
        self._selector.close()

    def _spawn(
        self, place: Place, spec: Mapping[str, Any], log: Path, timeout_s: float
    ) -> _Trainer:
        mine, theirs = Channel.pair()
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fds = [log_fd, theirs.fileno(), self.memory.fd]
            child = self._server.spawn({**spec, "place": place.to_json()}, fds, timeout_s)
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
            os.close(log_fd)
        mine.sock.setblocking(False)
        trainer = _Trainer(place.rank, child, mine, log)
        self._selector.register(mine, selectors.EVENT_READ, (trainer, False))
        self._selector.register(child.pidfd, selectors.EVENT_READ, (trainer, True))
        return trainer

    def _hear(self, trainer: _Trainer) -> Iterable[Event]:
        heard: list[Event] = []
        while True:
            try:
                message = trainer.channel.receive()
            except BlockingIOError:
                return heard
            if message is None:
                self._selector.unregister(trainer.channel)
                return heard
            if "hello" in message:
                self.ranges[trainer.rank] = [(at, size) for at, size in message["ranges"]]
            heard.append(Event(trainer.rank, message))

    def _end(self, trainer: _Trainer) -> Iterable[Event]:
        self._selector.unregister(trainer.child.pidfd)
        last_words = [] if trainer.is_over else [*self._last_words(trainer)]
        trainer.is_over = True
        code = self._server.exit_code(trainer.child.pid)
        return [*last_words, Event(trainer.rank, {"ended": _describe(code), "code": code})]

    def _last_words(self, trainer: _Trainer) -> Iterable[Event]:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.get_key(trainer.channel)
            yield from self._hear(trainer)


def _describe(code: int | None) -> str:
    if code is None:
        return "ended"
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was ended by {name}{hint}"
    return f"ended with exit code {code}"
