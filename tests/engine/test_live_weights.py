"""Weights are exchanged under a running engine: each request runs on one version."""

from __future__ import annotations

import asyncio
import gc
import json
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from checkpoint.param_loading import flatten, unflatten
from checkpoint.store import Store
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.live_weights import WeightsRefused
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.output import RequestOutput
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.run_watcher import RunWatcher
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import RunningEngine, start_engine
from jaxserve.engine.weight_swaps import WeightSwaps
from jaxserve.server.engine_collector import EngineCollector
from jaxserve.server.lifecycle import serving_of
from jaxserve.server.state import ServerState
from models.checkpoint_model import CHECKPOINTS, write_model_folder
from models.loading import open_model
from tests.engine.tiny_model import make_tiny_model

PROMPT = tuple(range(40, 60))
"""Longer than a page, so that the prefix cache keeps some of it."""


class Sink:
    """Collects outputs; can hold the engine back at the first one."""

    def __init__(self, *, is_held: bool = False) -> None:
        self.outputs: queue.Queue[RequestOutput] = queue.Queue()
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        if not is_held:
            self.may_go_on.set()

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.put(output)
        self.has_begun.set()
        assert self.may_go_on.wait(30)

    def token_ids(self) -> list[int]:
        """Of the whole answer."""
        ids: list[int] = []
        while True:
            output = self.outputs.get(timeout=30)
            ids += output.token_ids
            if output.finish_reason is not None:
                return ids


def request(name: str, num_tokens: int = 30) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return GenerationRequest(name, PROMPT, sampling)


def save(run: Path, step: int, scale: float) -> None:
    """A checkpoint whose answers depend on `scale`."""
    params = open_model(run.parent / "start").load_params(jnp.float32)
    changed = {
        name: leaf * scale if "mlp" in name else leaf for name, leaf in flatten(params).items()
    }
    with Store(run / CHECKPOINTS) as store:
        store.save(step, {"params": unflatten(changed)}).wait()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run with one checkpoint."""
    folder = tmp_path_factory.mktemp("live")
    source = open_model(make_tiny_model(folder / "start"))
    write_model_folder(folder / "run", source.config, source.load_tokenizer())
    save(folder / "run", 1, 1.0)
    return folder / "run"


def started(model: Path | str, compilation_cache: Path) -> RunningEngine:
    return start_engine(
        EngineConfig(
            model=str(model),
            dtype="float32",
            token_budget=8,
            buckets="one",
            max_num_seqs=6,
            page_size=4,
            compilation_cache_dir=compilation_cache,
        )
    )


@pytest.fixture(scope="module")
def running(run: Path, compilation_cache: Path) -> Iterator[RunningEngine]:
    engine = started(run, compilation_cache)
    yield engine
    engine.close()


def answer(running: RunningEngine, name: str) -> list[int]:
    (completion,) = complete_in_order(running.engine, [request(name)], max_ahead=1)
    return list(completion.token_ids)


def test_a_request_runs_on_one_version_and_later_ones_on_the_next(
    run: Path, running: RunningEngine, compilation_cache: Path
) -> None:
    save(run, 2, -3.0)
    old = answer(running, "old")
    assert running.weights.name == "run@1"
    leaf = weakref.ref(jax.tree.leaves(running.weights._device.params)[0])
    first, second = Sink(is_held=True), Sink()
    running.engine.add(request("first"), first)
    assert first.has_begun.wait(30)
    swap = threading.Thread(target=running.weights.swap, args=(Path(f"{run}@2"),))
    swap.start()
    while not running.engine._inbox._errands:  # The engine is held back in its delivery.
        time.sleep(0.001)
    running.engine.add(request("second"), second)
    first.may_go_on.set()
    assert first.token_ids() == old
    new = second.token_ids()
    swap.join(30)
    # The prompt's pages of the old version would have been found in the prefix cache.
    assert answer(running, "third") == new
    assert (running.weights.name, running.weights.step) == ("run@2", 2)
    assert running.weights.swaps == WeightSwaps(num_done=1)
    assert running.engine.snapshot().compiles_after_ready == 0
    gc.collect()
    assert leaf() is None, "the old weights are still in memory"
    fresh = started(f"{run}@2", compilation_cache)
    try:
        assert answer(fresh, "fresh") == new != old
    finally:
        fresh.close()


def test_what_cannot_be_served_is_refused_and_the_old_weights_go_on(
    run: Path, running: RunningEngine, tmp_path: Path
) -> None:
    old, name = answer(running, "before"), running.weights.name
    save(run, 10, float("nan"))
    with pytest.raises(WeightsRefused, match="NaN"):
        running.weights.swap(Path(f"{run}@10"))
    save(run, 11, 2.0)
    damage(run, 11)
    with pytest.raises(WeightsRefused, match="step 11"):
        running.weights.swap(Path(f"{run}@11"))
    other = make_tiny_model(tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "rms_norm_eps": 0.5}))
    with pytest.raises(WeightsRefused, match=r"rms_norm_eps is 0\.5"):
        running.weights.swap(other)
    with pytest.raises(WeightsRefused, match="no model at"):
        running.weights.swap(tmp_path / "nothing")
    assert answer(running, "after") == old
    assert running.weights.name == name
    assert running.weights.swaps.num_refused == 4


def damage(run: Path, step: int) -> None:
    """One bit of the largest file of the arrays."""
    arrays = run / CHECKPOINTS / "steps" / f"{step:012d}" / "arrays"
    files = [path for path in arrays.rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_who_waits_too_long_gives_up_and_requests_go_on(run: Path, running: RunningEngine) -> None:
    save(run, 20, 5.0)
    name = running.weights.name
    first, second = Sink(is_held=True), Sink()
    running.engine.add(request("first"), first)
    assert first.has_begun.wait(30)
    with pytest.raises(WeightsRefused, match="still ran after"):
        running.weights.swap(Path(f"{run}@20"), timeout_s=0.05)
    running.engine.add(request("second"), second)
    first.may_go_on.set()
    assert second.token_ids() == first.token_ids()
    assert running.weights.name == name


def test_a_watcher_takes_the_newest_whole_checkpoint(run: Path, running: RunningEngine) -> None:
    served: list[str] = []
    watcher = RunWatcher(running.weights, run, 1.0, served.append)
    save(run, 30, 2.0)
    save(run, 31, 3.0)
    damage(run, 31)
    assert watcher.look()
    assert not watcher.look()
    save(run, 32, 4.0)
    assert watcher.look()
    assert served == ["run@30", "run@32"]


def test_metrics_tell_the_version_and_count_swaps(run: Path, running: RunningEngine) -> None:
    before = metrics(running)
    watcher = RunWatcher(running.weights, run, 1.0)
    save(run, 40, 2.0)
    save(run, 41, float("nan"))
    assert watcher.look()
    after = metrics(running)
    assert after['jaxserve_weights_info{version="run@40"}'] == 1
    for name in ("jaxserve_weight_swaps_total", "jaxserve_weight_swaps_refused_total"):
        assert after[name] == before[name] + 1


def metrics(running: RunningEngine) -> dict[str, float]:
    """What Prometheus is told of weights, by name and labels."""

    async def collected() -> str:
        state = ServerState(degraded_after_s=60.0, serving=serving_of(running))
        registry = CollectorRegistry(auto_describe=False)
        registry.register(EngineCollector(state))
        return generate_latest(registry).decode()

    lines = asyncio.run(collected()).splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("jaxserve_weight")]
    return {name: float(value) for name, value in pairs}


def test_a_stopped_engine_says_so(running: RunningEngine) -> None:
    """The last one: it stops the engine of the others."""
    first = Sink(is_held=True)
    running.engine.add(request("first", 40), first)
    assert first.has_begun.wait(30)
    done = running.engine.run_between_requests(lambda: None)
    stop = threading.Thread(target=running.engine.stop)
    stop.start()
    while not running.engine._inbox.stopping:
        time.sleep(0.001)
    first.may_go_on.set()
    stop.join(30)
    assert "stopped" in str(done.exception(30))
