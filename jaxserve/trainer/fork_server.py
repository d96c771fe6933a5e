"""The fork server: a process that has imported everything and forks trainers.

Importing JAX and the models takes seconds of processor time for each of N trainers; a fork
takes milliseconds. The server never touches a device and has one thread, so that forking
is safe. It dies with the supervisor, and trainers die with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial

from jaxserve.process_ties import Child, die_with_parent
from jaxserve.trainer.control import Channel, Message
from jaxserve.trainer.errors import RunError

TRAINER = "jaxserve.trainer.trainer"
"""The module whose `main(spec, channel, memory_fd)` a trainer runs; importing it imports all."""
_POLL_S = 0.1


class ForkServer:
    """The supervisor's side."""

    def __init__(self, environment: Mapping[str, str], log_fd: int, trainer: str = TRAINER) -> None:
        """Starts the server; it imports in the background.

        Args:
            environment: of the server and its trainers.
            log_fd: where its own output goes.
            trainer: see `TRAINER`.
        """
        self.channel, other = Channel.pair()
        command = [sys.executable, "-P", "-m", "jaxserve.trainer.fork_server"]
        self._process = subprocess.Popen(  # noqa: S603 -- our own module
            [*command, str(other.fileno()), str(os.getpid()), trainer],
            pass_fds=[other.fileno()],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            start_new_session=True,
        )
        other.close()
        self._ended: dict[int, int] = {}

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def spawn(self, spec: Message, fds: list[int], timeout_s: float) -> Child:
        """Forks a trainer.

        Args:
            spec: what the trainer's `main` gets.
            fds: its log, its channel, its memory file.
            timeout_s: how long to wait, which at first includes the imports.

        Raises:
            RunError: the server has ended or does not answer.
        """
        deadline_s = time.monotonic() + timeout_s
        if self.channel.send({"spawn": spec}, fds):
            while (left_s := deadline_s - time.monotonic()) > 0:
                if select.select([self.channel], [], [], left_s)[0]:
                    answer = self.channel.receive()
                    if answer is None:
                        break
                    if "pid" in answer:
                        return Child(answer["pid"])
                    if "error" in answer:
                        raise RunError(f"a trainer cannot be started: {answer['error']}")
                    self._ended[answer["ended"]] = answer["status"]
        raise RunError(
            f"the process that starts trainers has ended or hangs (waited {timeout_s:g} s); "
            "its output is in logs/fork_server.log of the run"
        )

    def exit_code(self, pid: int, timeout_s: float = 1.0) -> int | None:
        """How a trainer ended: its exit code, or minus the signal; None if the server ended too."""
        deadline_s = time.monotonic() + timeout_s
        while pid not in self._ended and (left_s := deadline_s - time.monotonic()) > 0:
            if select.select([self.channel], [], [], left_s)[0]:
                message = self.channel.receive()
                if message is None:
                    return None
                self._ended[message["ended"]] = message["status"]
        return self._ended.get(pid)

    def close(self) -> None:
        """Ends the server, and with it what it forked."""
        self.channel.close()
        self._process.kill()
        self._process.wait()


def serve(channel: Channel, parent_pid: int, trainer: str) -> None:
    """The server's loop; returns when the supervisor has ended."""
    die_with_parent(parent_pid)
    main = importlib.import_module(trainer).main
    while True:
        if not select.select([channel], [], [], _POLL_S)[0]:
            _reap(channel)
            continue
        request, fds = channel.receive_with_fds()
        if request is None:
            return
        server_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            channel.send({"error": str(error)})
            continue
        if pid == 0:
            spec, (log_fd, control_fd, memory_fd) = request["spawn"], fds
            _become_trainer(
                channel,
                partial(main, spec, Channel.from_fd(control_fd), memory_fd),
                log_fd,
                server_pid,
            )
        # The supervisor opens the child by its number, so it is reaped after that only.
        channel.send({"pid": pid})
        for fd in fds:
            os.close(fd)


def _reap(channel: Channel) -> None:
    """Tells of those that ended. Only when idle, so that the supervisor has opened them by
    their numbers before those are free again."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            channel.send({"ended": ended[0], "status": os.waitstatus_to_exitcode(ended[1])})


def _become_trainer(server: Channel, run: Callable[[], int], log_fd: int, server_pid: int) -> None:
    status = 1
    try:
        server.close()
        os.setpgid(0, 0)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        die_with_parent(server_pid)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor.
        faulthandler.enable(2)
        status = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(Channel.from_fd(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
