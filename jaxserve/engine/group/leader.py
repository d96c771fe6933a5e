"""Leader: process 0's view of its group. It tells the others what to run, and notices when one
of them is lost, whatever its own thread waits for."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.distributed import free_port, join
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.group.config import LEADER_ID, GroupConfig, join_address
from jaxserve.engine.group.errors import GroupError
from jaxserve.engine.group.follower_link import FollowerLink
from jaxserve.engine.group.frames import MASK_LOAD, SLOT_LOAD, Frame, Kind
from jaxserve.engine.group.gathering import Gathering
from jaxserve.engine.group.liveness import (
    BEAT_S,
    JAX_HEARTBEAT_TIMEOUT_S,
    TICK_S,
    AwakeClock,
    Liveness,
    Loss,
)
from jaxserve.errors import ConfigError
from models.mesh_shape import MeshShape

END_TIMEOUT_S = 5.0
"""For followers to end after the leader has said so."""


class Leader:
    """The group, from the moment when its port is taken.

    Args:
        config: of process 0.
        gathering: listens.
        children: followers that this process has started, by process id.
        on_loss: called once, from a thread of the leader's, with what was lost. Until the group
            is ready nothing is running; afterwards no step will come to its end.
    """

    def __init__(
        self,
        config: GroupConfig,
        gathering: Gathering,
        children: Mapping[int, subprocess.Popen[bytes]],
        on_loss: Callable[[Loss], None],
    ) -> None:
        self.config = config
        self.loss: Loss | None = None
        self._gathering = gathering
        self._children = children
        self._on_loss = on_loss
        self._clock = AwakeClock(time.monotonic())
        self._liveness = Liveness(config.follower_timeout_s, 0.0)
        self._links: Sequence[FollowerLink] = ()
        self._number = 0
        self._last_step = 0
        self._lost = threading.Event()
        self._is_over = threading.Event()

    def gather(self, engine_config: EngineConfig) -> None:
        """Waits for the followers and joins them in `jax.distributed`, before any device is
        touched.

        Raises:
            ConfigError: the mesh cannot be shared out over the processes.
            GroupError: one did not come, or has ended.
        """
        num_devices = self._devices_per_process(engine_config)
        self._links = self._gathering.gather(self._children, lambda: self._clock.now_s)
        coordinator = join_address(self.config.host, free_port(self.config.host))
        for link in self._links:
            link.start()
        self._send(
            Frame.of_json(
                Kind.WELCOME,
                {
                    "coordinator": coordinator,
                    "num_cpu_devices": num_devices,
                    "leader_timeout_s": self.config.follower_timeout_s,
                },
            )
        )
        for work in (self._watch, self._beat):
            threading.Thread(target=work, name="jaxserve-leader", daemon=True).start()
        join(
            coordinator,
            LEADER_ID,
            self.config.num_processes,
            num_cpu_devices=num_devices,
            heartbeat_timeout_s=JAX_HEARTBEAT_TIMEOUT_S,
        )
        _check_devices(engine_config.mesh, is_local=bool(self._children))

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Tells the followers what to compile for: JSON values."""
        self._send(Frame.of_json(Kind.CONFIG, dict(settings)))

    def wait_until_ready(self, fingerprint: str) -> None:
        """Waits until every follower can take part.

        Raises:
            GroupError: one is lost, or has compiled other programs than this process.
        """
        for link in self._links:
            while not link.is_ready.wait(TICK_S):
                self.raise_if_lost()
            theirs = (link.ready or {}).get("fingerprint")
            if theirs != fingerprint:
                raise GroupError(
                    f"process {link.process_id} ({link.where}) has compiled for other settings or "
                    "another model than the leader: give all the same --model"
                )
        self._liveness.is_starting = False

    def tell_slot_load(self, vectors: npt.NDArray[np.int32]) -> None:
        """Has all followers load a slot, after all that they were told before."""
        self._tell(SLOT_LOAD, vectors)

    def tell_mask_load(self, vectors: npt.NDArray[np.int32]) -> None:
        """Has all followers load masks, after all that they were told before."""
        self._tell(MASK_LOAD, vectors)

    def tell_step(self, num_rows: int, vectors: npt.NDArray[np.int32]) -> None:
        """Has all followers run the step of a bucket, after all that they were told before."""
        self._last_step = self._tell(num_rows, vectors)

    @property
    def num_compiles(self) -> int:
        """Programs that followers have compiled since they were ready."""
        return sum(link.num_compiles for link in self._links)

    def wait_for_loss(self) -> Loss | None:
        """What was lost, if that is noticed within the limit: a collective can fail before it is
        known whose end was the reason."""
        self._lost.wait(self.config.follower_timeout_s + 2 * BEAT_S)
        return self.loss

    def raise_if_lost(self) -> None:
        """Raises GroupError naming the process that was lost, if one was."""
        if self.loss is not None:
            raise GroupError(self.loss.message)

    def end(self) -> None:
        """Has the followers end in good order, and waits for those that this process started.
        Who does not, is killed."""
        self._is_over.set()
        self._gathering.close()
        self._send(Frame(Kind.END))
        deadline_s = time.monotonic() + END_TIMEOUT_S
        for link in self._links:
            link.join(max(0.0, deadline_s - time.monotonic()))
        for child in self._children.values():
            try:
                child.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for link in self._links:
            link.close()

    def _tell(self, rows: int, vectors: npt.NDArray[np.int32]) -> int:
        self._number += 1
        self._send(Frame.of_array(Kind.PROGRAM, vectors, self._number, rows))
        return self._number

    def _devices_per_process(self, engine_config: EngineConfig) -> int | None:
        """Devices that each process divides its CPU into; None leaves that to JAX."""
        if not self._children:
            return engine_config.virtual_devices
        if engine_config.virtual_devices is not None:
            raise ConfigError(
                "--virtual-devices has no effect with --processes, which gives each process its "
                "part of the --mesh: leave it out"
            )
        num_devices, num_processes = engine_config.mesh.num_devices, self.config.num_processes
        if num_devices % num_processes:
            raise ConfigError(
                f"--mesh {engine_config.mesh} has {num_devices} devices, which {num_processes} "
                "--processes cannot share evenly: choose another number"
            )
        return num_devices // num_processes

    def _send(self, frame: Frame) -> None:
        for link in self._links:
            link.send(frame)

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            self._send(Frame(Kind.LEADER_BEAT))

    def _watch(self) -> None:
        while not self._is_over.wait(TICK_S):
            now_s = self._clock.tick(time.monotonic())
            signs = [link.signs() for link in self._links]
            loss = self._liveness.find_loss(signs, self._last_step, now_s)
            if loss is not None and not self._is_over.is_set():
                self.loss = loss
                # In this order: who waits for the loss finds that everybody was told.
                self._on_loss(loss)
                self._lost.set()
                return


def _check_devices(mesh: MeshShape, *, is_local: bool) -> None:
    """Raises ConfigError unless the processes have just the devices of the mesh."""
    platform = jax.default_backend()
    if is_local and platform != "cpu":
        raise ConfigError(
            f"--processes divides a CPU, and JAX runs on {platform}: leave it out, since one "
            "process drives all devices of a host"
        )
    if len(jax.devices()) != mesh.num_devices:
        raise ConfigError(
            f"the processes have {len(jax.devices())} devices and --mesh {mesh} has "
            f"{mesh.num_devices}: it must take them all, since every process runs every step"
        )
