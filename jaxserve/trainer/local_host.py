"""Trainers on this machine: the fork server and the generations that it forks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jaxserve.distributed import free_port
from jaxserve.trainer.balance import Speeds
from jaxserve.trainer.config import PlacementSection
from jaxserve.trainer.fork_server import ForkServer
from jaxserve.trainer.generation import Generation
from jaxserve.trainer.launch import Place, child_environment, environment_now
from jaxserve.trainer.run_services import RunServices


class LocalHost:
    """Starts generations of trainers as processes of this machine."""

    def __init__(
        self,
        services: RunServices,
        spec: Mapping[str, Any],
        *,
        compilation_cache_dir: str,
        trainer: str,
    ) -> None:
        """Starts the fork server, which imports while the state is being read.

        Args:
            services: of the run.
            spec: what every trainer gets; see `worker.main`.
            compilation_cache_dir: for the trainers.
            trainer: the module that they run; see `fork_server.TRAINER`.
        """
        self._services = services
        self._spec = spec
        self._cache_dir = compilation_cache_dir
        self._trainer = trainer
        self._server = self._start_server()

    def start(self, number: int, placement: PlacementSection, speeds: Speeds | None) -> Generation:
        """Forks generation `number`, whose processes share the work by their speeds.

        Raises:
            RunError: trainers cannot be started; none is left.
        """
        services = self._services
        if not self._server.is_alive():
            self._server.close()
            self._server = self._start_server()
        services.folder.forget_old_logs()
        return Generation(
            number,
            self._server,
            self._places(placement),
            {
                **self._spec,
                "generation": number,
                "weights": speeds,
                "quarantined_ids": sorted(services.quarantined_ids),
            },
            services.folder.logs,
            services.signals.wakeup,
            services.config.supervision.start_timeout_s,
        )

    def close(self) -> None:
        """Ends the fork server, and with it every trainer."""
        self._server.close()

    def _places(self, placement: PlacementSection) -> list[Place]:
        # A new port: whoever wakes up late finds nobody to join.
        coordinator = f"127.0.0.1:{free_port()}"
        return [
            Place(
                rank=rank,
                num_processes=placement.processes,
                devices_per_process=placement.devices_per_process,
                coordinator=coordinator,
                compilation_cache_dir=self._cache_dir,
            )
            for rank in range(placement.processes)
        ]

    def _start_server(self) -> ForkServer:
        log = self._services.folder.logs / "fork_server.log"
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            return ForkServer(child_environment(environment_now()), fd, self._trainer)
        finally:
            os.close(fd)
