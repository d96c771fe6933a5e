"""RunWatcher: a training run's newer checkpoints take the place of the one being served."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from checkpoint.store import StoreError
from checkpoint.store.reader import StoreReader
from jaxserve.engine.live_weights import LiveWeights, WeightsRefused
from jaxserve.errors import NotAccepting
from models.checkpoint_model import CHECKPOINTS

logger = logging.getLogger(__name__)


class RunWatcher:
    """Looks at a run from time to time, in a thread of its own.

    Of the checkpoints that are newer than the one being served the newest one that is whole is
    taken. One that is refused is logged and not tried again.

    Args:
        weights: of the running engine.
        run: folder of the run.
        interval_s: from one look to the next.
        on_served: called with the name of each version that is taken.
    """

    def __init__(
        self,
        weights: LiveWeights,
        run: Path,
        interval_s: float,
        on_served: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._on_served = on_served
        self._weights = weights
        self._run = run
        self._interval_s = interval_s
        self._refused: set[int] = set()
        self._stopping = threading.Event()
        # Daemon: it may wait for requests of the old version when the process is to end.
        self._thread = threading.Thread(target=self._watch, name="jaxserve-watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Does not look again. What is under way ends with the engine."""
        self._stopping.set()

    def look(self) -> bool:
        """Look once; True if a newer checkpoint is now served. Raises NotAccepting."""
        served = self._weights.step
        try:
            steps = StoreReader(self._run / CHECKPOINTS).steps()
        except (StoreError, OSError) as error:
            logger.warning("%s cannot be looked at: %s", self._run, error)
            return False
        for step in reversed(steps):
            if served is not None and step <= served:
                break
            if step in self._refused:
                continue
            try:
                self._weights.swap(Path(f"{self._run}@{step}"))
            except WeightsRefused as error:
                logger.warning("%s", error)
                self._refused.add(step)
                continue
            self._on_served(self._weights.name)
            return True
        return False

    def _watch(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self.look()
            except NotAccepting:
                return
