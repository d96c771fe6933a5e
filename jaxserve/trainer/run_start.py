"""Starting or resuming a run: checks, lease, ledger, the newest state, then the supervisor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.store import Fenced, LeaseHeld, NoGoodStep, RetentionPolicy
from jaxserve.model_store import default_root
from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.config_file import dump_toml, to_plain
from jaxserve.trainer.errors import RunError
from jaxserve.trainer.event_files import EventFiles
from jaxserve.trainer.fork_server import TRAINER
from jaxserve.trainer.generation_run import Base
from jaxserve.trainer.goodput import Goodput
from jaxserve.trainer.ledger import Ledger, committed_steps, iterate_kind
from jaxserve.trainer.local_host import LocalHost
from jaxserve.trainer.metrics_log import MetricsLog, read_metrics
from jaxserve.trainer.plot import draw
from jaxserve.trainer.run_checkpoints import RunCheckpoints
from jaxserve.trainer.run_folder import RunFolder, write_durably
from jaxserve.trainer.run_identity import check_numerics, check_world, make_world
from jaxserve.trainer.run_services import RunServices, Signals, View
from jaxserve.trainer.supervisor import EXIT_FINISHED, Supervisor
from jaxserve.trainer.world import LogicalWorld


@dataclass(frozen=True)
class StartOptions:
    """What the user allows.

    Attributes:
        restart_from_scratch: begin anew if no checkpoint is whole.
        numerics_change: go on although bits may change.
        take_over: fence a supervisor that still lives, such as one that is stopped.
        force: set an existing run aside and start anew.
    """

    restart_from_scratch: bool = False
    numerics_change: bool = False
    take_over: bool = False
    force: bool = False


def train(config: TrainConfig, options: StartOptions, view: View, trainer: str = TRAINER) -> int:
    """Runs a training run to its end, or until it is stopped.

    Args:
        config: what to do.
        options: what the user allows.
        view: where it shows itself.
        trainer: the module that a trainer process runs; see `fork_server.TRAINER`.

    Returns:
        The exit code: 0 finished, 75 stopped and to be resumed by the same command.

    Raises:
        RunError, TrainConfigError: nothing was started, or it cannot go on.
    """
    goodput = Goodput(time.monotonic)
    folder = RunFolder(Path(config.run_dir).absolute())
    world = make_world(config)
    if options.force:
        set_aside(folder, view)
    check_world(folder, world)
    if not folder.world.exists() and folder.root.exists() and any(folder.root.iterdir()):
        _require_begun(folder)
    folder.make()
    events = EventFiles(folder.root / "tensorboard") if config.logging.tensorboard else None
    signals = Signals()
    with contextlib.ExitStack() as stack:
        stack.callback(signals.install())
        checkpoints = _take_lease(config, folder, options)
        stack.callback(_quietly_close, checkpoints)
        ledger = Ledger(
            folder.ledger,
            epoch=checkpoints.epoch,
            check_lease=checkpoints.check_lease,
            clock=time.time,
        )
        stack.callback(ledger.close)
        metrics = MetricsLog(folder.metrics, events)
        stack.callback(metrics.close)
        services = RunServices(
            config, folder, ledger, checkpoints, metrics, goodput, view, signals,
            quarantined_ids={
                example for record in iterate_kind(ledger.records, "spike")
                for example in record["quarantined_ids"]
            },
        )  # fmt: skip
        services.folder.take_requests()  # What was asked of an earlier supervisor is over.
        try:
            return _Start(services, world, options, trainer).run()
        finally:
            services.write_status(is_alive=False)


def set_aside(folder: RunFolder, view: View) -> None:
    """Renames an existing run, so that another can take its place."""
    if not folder.root.exists():
        return
    for number in range(1, 10_000):
        target = folder.root.with_name(f"{folder.root.name}.replaced-{number}")
        if not target.exists():
            folder.root.rename(target)
            view.say(f"the old run is now {target}")
            return
    raise RunError(f"{folder.root} has been replaced 9999 times; delete some of these")


def _require_begun(folder: RunFolder) -> None:
    """A folder that a first start has just begun may be used; anybody else's may not."""
    own = {"ledger.jsonl", "metrics.jsonl", "config.toml", "checkpoints", "logs", "requests",
           "status.json", "model.json", "tokenizer", "labels.txt", "tensorboard"}  # fmt: skip
    foreign = sorted(path.name for path in folder.root.iterdir()
                     if path.name not in own and not path.name.startswith("."))  # fmt: skip
    if foreign:
        raise RunError(
            f"{folder.root} holds other files ({', '.join(foreign[:3])}) and no run; give another "
            "run_dir, or set it aside with --force"
        )


def _take_lease(config: TrainConfig, folder: RunFolder, options: StartOptions) -> RunCheckpoints:
    durability = config.durability
    retention = RetentionPolicy(keep_last=durability.keep_last, keep_every=durability.keep_every)
    try:
        return RunCheckpoints(folder.checkpoints, retention, take_over=options.take_over)
    except LeaseHeld as error:
        raise RunError(
            f"the run is being trained already: {error}. `jaxserve train stop {folder.root}` ends "
            "it well; --take-over fences it, which is for one that hangs"
        ) from None


def _quietly_close(checkpoints: RunCheckpoints) -> None:
    with contextlib.suppress(Fenced):
        checkpoints.close()


class _Start:
    """One start of a run, first or later."""

    def __init__(
        self, services: RunServices, world: LogicalWorld, options: StartOptions, trainer: str
    ) -> None:
        self._services = services
        self._trainer = trainer
        self._world = world
        self._options = options

    def run(self) -> int:
        """See `train`."""
        services = self._services
        services.ledger.append([self._start_record()])
        if self._is_finished():
            services.view.say(f"{services.folder.root} is finished; nothing to do")
            return EXIT_FINISHED
        write_durably(services.folder.config, dump_toml(services.config).encode())
        host = LocalHost(
            services,
            {
                "config": config_to_json(services.config),
                "world": self._world.to_json(),
                "log_dir": str(services.folder.logs),
            },
            compilation_cache_dir=compilation_cache_dir(services.config),
            trainer=self._trainer,
        )
        with contextlib.closing(host):
            code = self._supervise(host)
        if code == EXIT_FINISHED:
            services.ledger.note(
                kind="done",
                next_step=services.config.total_steps,
                goodput=services.goodput.summary(),
            )
        _tell_probes(services)
        if services.config.logging.plot:
            _plot(services)
        return code

    def _supervise(self, host: LocalHost) -> int:
        services = self._services
        if not services.folder.model.exists():
            # Models take a second to import; only a first start needs them.
            from jaxserve.trainer.run_model import write_run_model

            write_run_model(services.config, services.folder)
        supervisor = Supervisor(
            services,
            start_generation=host.start,
            restore=self._restore,
            check_numerics=self._check_numerics,
        )
        base = self._restore(None)
        last = max(committed_steps(services.ledger.records), default=-1) + 1
        if base.step < last:
            reason = "the newest state on the disk is older than the ledger"
            supervisor.roll_back(base.step, last, supervisor.last_generation + 1, reason)
        else:
            services.metrics.drop_from(base.step)
        return supervisor.run(base)

    def _start_record(self) -> dict[str, Any]:
        options = self._options
        return {
            "kind": "start",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "world_sha256": _sha256_of(self._world.to_json()),
            "allowed": [name for name, value in vars(options).items() if value],
        }

    def _is_finished(self) -> bool:
        services = self._services
        total = services.config.total_steps
        steps = committed_steps(services.ledger.records)
        return len(steps) == total and total in services.checkpoints.steps()

    def _check_numerics(self, numerics: dict[str, Any]) -> None:
        services = self._services
        changed = check_numerics(
            services.folder, self._world, numerics, allow_change=self._options.numerics_change
        )
        if changed:
            services.ledger.note(
                kind="numerics_change",
                changes=[list(difference) for difference in changed],
            )

    def _restore(self, limit: int | None) -> Base:
        """The newest good checkpoint that the ledger knows, or the fresh state."""
        services = self._services
        checkpoints, ledger = services.checkpoints, services.ledger
        known = max(committed_steps(ledger.records), default=-1) + 1
        most = known if limit is None else min(known, limit)
        if any(step > most for step in checkpoints.steps()):
            moved = checkpoints.set_aside_after(most, "newer than what the ledger has")
            ledger.note(kind="set_aside", steps=moved, after=most)
        try:
            restored = checkpoints.restore()
        except NoGoodStep as error:
            return self._from_scratch(error)
        if restored is None:
            return Base(0, None, None)
        for skipped in restored.skipped:
            services.view.say(str(skipped), warn=True)
            ledger.note(
                kind="ckpt_fallback",
                skipped_step=skipped.step,
                to_step=restored.step,
                problems=[str(problem) for problem in skipped.problems][:8],
            )
        services.view.say(f"resuming from the checkpoint of step {restored.step}")
        return Base(restored.step, restored.state, restored.layout)

    def _from_scratch(self, error: NoGoodStep) -> Base:
        if not self._options.restart_from_scratch:
            raise RunError(
                f"{error}. To begin this run anew from step 0, add --allow-restart-from-scratch"
            ) from error
        self._services.ledger.note(kind="restart_from_scratch", reason=str(error)[:1000])
        return Base(0, None, None)


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """A config as JSON values."""
    value = to_plain(config)
    assert isinstance(value, dict)
    return value


def compilation_cache_dir(config: TrainConfig) -> str:
    """Where trainers keep compiled programs."""
    return config.compilation_cache_dir or str(default_root() / "xla")


def _tell_probes(services: RunServices) -> None:
    """What a rate that tunes itself has cost since this start."""
    seconds = services.goodput.seconds()
    if probes_s := seconds["lr_probe"]:
        share = probes_s / (probes_s + seconds["step"])
        services.view.say(f"probes of the learning rate: {probes_s:.1f} s, {share:.1%} of training")


def _plot(services: RunServices) -> None:
    try:
        draw(read_metrics(services.folder.metrics), services.folder.plot)
    except RunError as error:  # A missing library must not spoil a run that is done.
        services.view.say(str(error), warn=True)


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
