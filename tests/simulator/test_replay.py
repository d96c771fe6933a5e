"""A live engine's recorded steps, run again in virtual time, give the same plans."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.detokenizer import DetokenizerFactory
from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.output import OutputProcessor
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.engine.settings import resolve_settings
from jaxserve.engine.startup import build_executor
from jaxserve.engine.step_log import ObservedExecutor, read_step_log, step_log_writer
from jaxserve.simulator.fitting import fit_held_out
from jaxserve.simulator.replay import (
    RecordedArrivals,
    Recording,
    ReplayDiverged,
    plan_bytes,
    replay,
)
from models.loading import open_model
from models.tokenizer import Tokenizer
from tests.engine.engine_rig import CollectingSink, request
from tests.engine.tiny_model import make_tiny_model

PAGE_BYTES = 1024
"""L 2, page of 4 tokens, K and V, K 2, D 8, float32."""
MIN_STEPS = 500


class Recorded:
    """One run of an engine with a pool too small for its load."""

    def __init__(self, folder: Path, cache: Path, policy: str) -> None:
        source = open_model(make_tiny_model(folder / "tiny"))
        config = EngineConfig(
            model=str(folder / "tiny"),
            dtype="float32",
            kernels="xla",
            token_budget=8,
            buckets=(8, 72) if policy == "vllm_v0" else (4, 8),
            max_num_seqs=6,
            page_size=4,
            kv_cache_bytes=20 * PAGE_BYTES,
            policy=policy,
            compilation_cache_dir=cache,
        )
        self.settings = resolve_settings(config, source.config, jax.devices()[0])
        self.tokenizer: Tokenizer = source.load_tokenizer()
        self.recording = Recording()
        self.log = io.StringIO()
        write = step_log_writer(self.log)

        def observe(step: Any) -> None:
            self.recording.steps.append(step)
            write(step)

        executor = build_executor(self.settings, source.load_params(self.settings.dtype))
        self.scheduler = Scheduler(self.settings.scheduler)
        self.engine = Engine(
            self.scheduler,
            ObservedExecutor(executor, time.monotonic, observe),
            self.tokenizer,
            source.config,
        )
        loop = self.engine._loop
        loop._arrivals = RecordedArrivals(loop._arrivals, self.recording)

    def run(self, seed: int) -> None:
        """Random requests, a fifth of them cancelled at a random moment."""
        rng = random.Random(seed)
        sink = CollectingSink()
        self.engine.start()
        index = 0
        cancelled = 0
        while len(self.recording.steps) < MIN_STEPS or cancelled < 5:
            burst = []
            for _ in range(rng.randint(1, 12)):
                name = f"r{index}"
                index += 1
                prompt = bytes(rng.randrange(256) for _ in range(rng.choice((1, 5, 13, 30))))
                self.engine.add(
                    request(
                        name,
                        prompt,
                        temperature=rng.choice((0.0, 1.0)),
                        seed=index,
                        max_tokens=rng.randint(1, 30),
                        stop=rng.choice(((), ("a", "e", "~"))),
                        logprobs=rng.choice((None, 2)),
                    ),
                    sink,
                )
                burst.append(name)
            for name in burst:
                if rng.random() < 0.2:
                    time.sleep(rng.random() * 0.01)
                    cancelled += self.engine.abort(name)
            if rng.random() < 0.5:
                sink.wait_finished(*burst)
        sink.wait_finished(*(f"r{i}" for i in range(index)))
        self.engine.stop()

    def replay(self) -> list[Any]:
        outputs = OutputProcessor(DetokenizerFactory(self.tokenizer), EngineMetrics())
        return replay(self.recording, Scheduler(self.settings.scheduler), outputs)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> Recorded:
    run = Recorded(tmp_path_factory.mktemp("replay"), compilation_cache, "sarathi")
    run.run(seed=1)
    return run


def test_the_load_was_hard(recorded: Recorded) -> None:
    assert len(recorded.recording.steps) >= MIN_STEPS
    assert recorded.scheduler.num_preemptions > 10
    assert sum(len(mail.ends) for mail in recorded.recording.mails) >= 5


def test_replay_gives_the_same_plans_byte_for_byte(recorded: Recorded) -> None:
    live = [plan_bytes(step.plan) for step in recorded.recording.steps]
    assert [plan_bytes(plan) for plan in recorded.replay()] == live


def test_replay_without_the_aborts_diverges(recorded: Recorded) -> None:
    """So the comparison can fail."""
    mails = recorded.recording.mails
    without = Recording(
        [type(mail)(mail.num_completed, mail.requests, ()) for mail in mails],
        recorded.recording.steps,
    )
    outputs = OutputProcessor(DetokenizerFactory(recorded.tokenizer), EngineMetrics())
    live = [plan_bytes(step.plan) for step in recorded.recording.steps]
    try:
        plans = replay(without, Scheduler(recorded.settings.scheduler), outputs)
    except (ReplayDiverged, ValueError):
        return
    assert [plan_bytes(plan) for plan in plans] != live


def test_recorded_steps_fit_a_cost_model(recorded: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(recorded.log.getvalue())
    steps = read_step_log(path)
    assert len(steps) == len(recorded.recording.steps)
    assert steps[0][0].num_tokens == recorded.recording.steps[0].plan.num_tokens
    fit = fit_held_out(steps)
    assert fit.num_fitted + len(fit.held_out_error) == len(steps)
    assert fit.model.predict_s(steps[0][0]) > 0
