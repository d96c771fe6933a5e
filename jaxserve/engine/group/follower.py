"""Follower: a process that runs what its leader runs, and ends with it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, NoReturn, Protocol

import jax
import numpy as np

from jaxserve.distributed import join
from jaxserve.engine.group.config import GroupConfig, join_address
from jaxserve.engine.group.errors import GroupError
from jaxserve.engine.group.frames import MASK_LOAD, SLOT_LOAD, Frame, FrameError, FrameSocket, Kind
from jaxserve.engine.group.gathering import GATHER_TIMEOUT_S, versions
from jaxserve.engine.group.handshake import HANDSHAKE_TIMEOUT_S, WrongToken, prove_to_leader
from jaxserve.engine.group.liveness import (
    BEAT_S,
    JAX_HEARTBEAT_TIMEOUT_S,
    START_LIMIT_S,
    TICK_S,
    AwakeClock,
)

EXIT_LEADER_LOST = 3
_RETRY_S = 0.3


class DeviceCalls(Protocol):
    """What a follower runs: the calls of `StepDevice`."""

    def load_slot(self, vectors: np.ndarray) -> None: ...
    def load_masks(self, vectors: np.ndarray) -> None: ...
    def step(self, num_rows: int, vectors: np.ndarray) -> jax.Array: ...


class Start(Protocol):
    """Makes a follower's part of the model."""

    def __call__(self, settings: Mapping[str, Any]) -> tuple[DeviceCalls, str, Callable[[], int]]:
        """From what the leader says: what runs the programs, the fingerprint of what was compiled,
        and the number of compilations since."""
        ...


def follow(config: GroupConfig, start: Start) -> None:
    """A follower's life; returns when the leader has ended the group in good order.

    Does not return, but ends the process with `EXIT_LEADER_LOST`, when the leader is lost.

    Args:
        config: of this process.
        start: called once this process has joined the others.

    Raises:
        GroupError: there is no leader, or it refuses this process.
        Exception: what `start` or a program raises; the leader has been told.
    """
    connection = _connect(config)
    connection.set_timeout(GATHER_TIMEOUT_S + START_LIMIT_S)  # Until the others are there, too.
    welcome = connection.receive()
    connection.set_timeout(None)
    terms = {} if welcome is None else welcome.json()
    if "coordinator" not in terms:
        raise GroupError(f"the leader refuses this process: {terms.get('refused', 'it has ended')}")
    link = _LeaderLink(connection, float(terms["leader_timeout_s"]))
    link.start()
    try:
        join(
            str(terms["coordinator"]),
            config.process_id,
            config.num_processes,
            num_cpu_devices=terms["num_cpu_devices"],
            heartbeat_timeout_s=JAX_HEARTBEAT_TIMEOUT_S,
        )
        settings = link.next_frame()
        if settings is None:
            return
        calls, fingerprint, count_compiles = start(settings.json())
        link.say_ready(fingerprint, count_compiles)
        _run(calls, link)
    except Exception as error:
        link.say_failed(error)
        raise


def _run(calls: DeviceCalls, link: _LeaderLink) -> None:
    while (frame := link.next_frame()) is not None:
        vector = frame.array()
        if frame.rows == SLOT_LOAD:
            calls.load_slot(vector)
        elif frame.rows == MASK_LOAD:
            calls.load_masks(vector)
        else:
            link.note_step(frame.number, calls.step(frame.rows, vector))


def _connect(config: GroupConfig) -> FrameSocket:
    """The connection to the leader, once both have proved themselves."""
    where = join_address(config.host, config.port)
    deadline_s = time.monotonic() + GATHER_TIMEOUT_S
    while True:
        try:
            sock = socket.create_connection((config.host, config.port), timeout=_RETRY_S + 5)
            break
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise GroupError(
                    f"no leader answers at --coordinator {where} ({error.strerror}): start process "
                    "0 there"
                ) from error
            time.sleep(_RETRY_S)
    connection = FrameSocket(sock)
    try:
        patience_s = max(HANDSHAKE_TIMEOUT_S, deadline_s - time.monotonic())
        prove_to_leader(connection, config.token, config.process_id, patience_s)
    except (WrongToken, OSError) as error:
        connection.close()
        raise GroupError(
            f"{where} is not the leader of this group ({error}): give all processes the same "
            "--group-token-file"
        ) from error
    hello = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "num_processes": config.num_processes,
        "versions": versions(),
    }
    connection.send(Frame.of_json(Kind.HELLO, hello))
    return connection


class _LeaderLink:
    """A follower's end. Threads read, beat, watch the leader and wait for steps, whatever the
    main thread is at."""

    def __init__(self, connection: FrameSocket, leader_timeout_s: float) -> None:
        self._connection = connection
        self._leader_timeout_s = leader_timeout_s
        self._clock = AwakeClock(time.monotonic())
        self._heard_s = 0.0
        self._frames: SimpleQueue[Frame | None] = SimpleQueue()
        self._steps: SimpleQueue[tuple[int, jax.Array]] = SimpleQueue()
        self._begun = self._finished = 0
        self._is_ready = self._has_failed = False
        self._count_compiles: Callable[[], int] = lambda: 0

    def start(self) -> None:
        """Begins to listen."""
        for work in (self._read, self._beat, self._watch, self._wait_for_steps):
            threading.Thread(target=work, name="jaxserve-follower", daemon=True).start()

    def next_frame(self) -> Frame | None:
        """Waits for the leader's next order; None: the group has ended."""
        frame = self._frames.get()
        if frame is not None:
            self._begun = frame.number
        return frame

    def say_ready(self, fingerprint: str, count_compiles: Callable[[], int]) -> None:
        """This process can take part."""
        self._count_compiles = count_compiles
        self._connection.send(Frame.of_json(Kind.READY, {"fingerprint": fingerprint}))
        self._is_ready = True

    def say_failed(self, error: Exception) -> None:
        """This process can do no more. After the start only the error's type is told, since its
        text may hold a piece of a prompt."""
        self._has_failed = True
        kind = type(error).__name__
        why = kind if self._is_ready else f"{kind}: {error}"[:4000]
        with contextlib.suppress(OSError):
            self._connection.send(Frame.of_json(Kind.FAILED, {"why": why}))

    def note_step(self, number: int, outputs: jax.Array) -> None:
        """A step was dispatched; its end will be told."""
        self._steps.put((number, outputs))

    def _read(self) -> None:
        why = "has ended its connection"
        try:
            while (frame := self._connection.receive()) is not None:
                self._heard_s = self._clock.now_s
                if frame.kind is Kind.END:
                    self._frames.put(None)
                    return
                if frame.kind in (Kind.CONFIG, Kind.PROGRAM):
                    self._frames.put(frame)
        except (OSError, FrameError) as error:
            why = f"has lost its connection ({error})"
        _leave(f"the leader {why}")

    def _beat(self) -> None:
        while True:
            self._say_how_far()
            time.sleep(BEAT_S)

    def _say_how_far(self) -> None:
        beat = np.asarray((self._begun, self._finished, self._count_compiles()), np.int32)
        with contextlib.suppress(OSError):  # The reader sees it, too.
            self._connection.send(Frame.of_array(Kind.BEAT, beat))

    def _watch(self) -> None:
        while True:
            time.sleep(TICK_S)
            limit_s = self._leader_timeout_s
            if not self._is_ready:
                limit_s = max(limit_s, START_LIMIT_S)
            silent_s = self._clock.tick(time.monotonic()) - self._heard_s
            if silent_s > limit_s:
                _leave(f"the leader has given no sign of life for {silent_s:.0f} s")

    def _wait_for_steps(self) -> None:
        while True:
            number, outputs = self._steps.get()
            try:
                outputs.block_until_ready()
            except Exception as error:
                traceback.print_exc()
                self.say_failed(error)
                return
            self._finished = number
            if self._steps.empty():
                self._say_how_far()


def _leave(why: str) -> NoReturn:
    """Ends this process at once: its main thread may wait in a collective for ever."""
    sys.stderr.write(f"error: {why}; this process ends too\n")
    sys.stderr.flush()
    os._exit(EXIT_LEADER_LOST)
