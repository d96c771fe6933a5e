"""Adapters of a running engine: loaded, exchanged and unloaded without a compilation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.offline import Completion, complete_in_order
from jaxserve.engine.output import RequestOutput
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import RunningEngine, start_engine
from jaxserve.errors import (
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
    NoRoomForAdapter,
    NotSupported,
)
from models.loading import open_model
from models.lora import merge
from tests.models.tiny_adapters import random_lora, write_adapter
from tests.native_library import native_library
from tests.server.tiny_model import write_tiny_model

PROMPT = tuple(range(40, 60))
"""Longer than a page, so that the prefix cache keeps some of it."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
NAMES = ("one", "two", "three")
RANKS = {"one": 2, "two": 3, "three": 4}


def config_of(model: Path, compilation_cache: Path, **changes) -> EngineConfig:
    """40 pages of 4 tokens: not enough for six requests."""
    config = EngineConfig(
        model=str(model),
        dtype="float32",
        kernels="xla",
        token_budget=8,
        buckets="one",
        max_num_seqs=6,
        max_model_len=64,
        kv_cache_bytes=41 << 10,
        page_size=4,
        compilation_cache_dir=compilation_cache,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("adapters") / "model")


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    """Files of each adapter; `other` is what `one` becomes."""
    config = open_model(model).config
    made = {}
    for seed, name in enumerate((*NAMES, "other")):
        targets = ("q_proj", "down_proj") if name == "two" else ()
        lora = random_lora(config, seed, rank=RANKS.get(name, 2), targets=targets)
        made[name] = write_adapter(model.parent / name, lora, config)
    return made


@pytest.fixture(scope="module")
def running(
    model: Path, folders: dict[str, Path], compilation_cache: Path
) -> Iterator[RunningEngine]:
    """With all of `NAMES`, and no further room."""
    lora = tuple((name, folders[name]) for name in NAMES)
    engine = start_engine(config_of(model, compilation_cache, lora=lora))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(model: Path, compilation_cache: Path) -> Iterator[RunningEngine]:
    """Without adapters."""
    engine = start_engine(config_of(model, compilation_cache))
    yield engine
    engine.close()


def request(name: str, adapter: str = "", prompt: tuple[int, ...] = PROMPT) -> GenerationRequest:
    return GenerationRequest(name, prompt, GREEDY, adapter=adapter)


def answers(running: RunningEngine, requests: Sequence[GenerationRequest]) -> list[Completion]:
    return list(complete_in_order(running.engine, requests, max_ahead=len(requests)))


def num_compiles(running: RunningEngine) -> int:
    """After READY. What a test computes by itself counts, too."""
    return running.engine.snapshot().compiles_after_ready


def merged_answer(plain: RunningEngine, model: Path, name: str, prompt=PROMPT) -> Completion:
    """By the adapter's weights merged into the model's."""
    source = open_model(model)
    seed = (*NAMES, "other").index(name)
    targets = ("q_proj", "down_proj") if name == "two" else ()
    lora = random_lora(source.config, seed, rank=RANKS.get(name, 2), targets=targets)
    device, base = plain.weights._device, plain.weights._device.params

    def serve(params: dict) -> None:
        plain.weights._pages.forget()
        device.params = params

    merged = merge(source.load_params(jnp.float32), lora)
    plain.engine.run_between_requests(lambda: serve(merged)).result(30)
    try:
        (completion,) = answers(plain, [request("merged", prompt=prompt)])
    finally:
        plain.engine.run_between_requests(lambda: serve(base)).result(30)
    return completion


class HeldSink:
    """Holds the engine back at a request's first output."""

    def __init__(self) -> None:
        self.outputs: queue.Queue[RequestOutput] = queue.Queue()
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.put(output)
        self.has_begun.set()
        assert self.may_go_on.wait(60)

    def token_ids(self) -> tuple[int, ...]:
        ids: tuple[int, ...] = ()
        while True:
            output = self.outputs.get(timeout=60)
            ids += output.token_ids
            if output.finish_reason is not None:
                return ids


def test_each_request_of_a_mixed_batch_gets_its_adapter(
    running: RunningEngine, plain: RunningEngine, model: Path
) -> None:
    before = num_compiles(running)
    found = answers(running, [request(f"r{name}", name) for name in ("", *NAMES)])
    assert num_compiles(running) == before
    (base,) = answers(plain, [request("base")])
    # The bits of the engine that has no adapters at all.
    assert found[0].token_ids == base.token_ids
    assert found[0].logprobs == base.logprobs
    for name, completion in zip(NAMES, found[1:], strict=True):
        assert completion.token_ids == merged_answer(plain, model, name).token_ids
    assert len({completion.token_ids for completion in found}) == 4


def test_bits_do_not_depend_on_what_runs_beside_or_on_preemption(running: RunningEngine) -> None:
    prompts = {"": PROMPT} | {name: PROMPT[index:] for index, name in enumerate(NAMES)}
    alone = {name: answers(running, [request("alone", name, prompts[name])])[0] for name in prompts}
    num_preemptions = running.engine.snapshot().num_preemptions
    crowd = [
        request(f"{name}-{copy}", name, prompt)
        for copy in range(3)
        for name, prompt in prompts.items()
    ]
    for one, found in zip(crowd, answers(running, crowd), strict=True):
        expected = alone[one.adapter]
        assert found.token_ids == expected.token_ids
        assert found.logprobs == expected.logprobs
    assert running.engine.snapshot().num_preemptions > num_preemptions


def test_computed_prefixes_are_shared_by_requests_of_one_adapter_alone(
    running: RunningEngine,
) -> None:
    prompt = tuple(range(100, 120))
    short = replace(GREEDY, max_tokens=2)
    cached = [
        answers(running, [GenerationRequest("r", prompt, short, adapter=adapter)])[0]
        for adapter in ("one", "two", "", "one", "two", "")
    ]
    assert [one.usage.num_cached_tokens for one in cached] == [0, 0, 0, 16, 16, 16]
    digest = running.engine.adapters.get("one").digest
    forged = replace(request("forged", prompt=prompt), cache_salt=f"/{digest}/")
    assert answers(running, [forged])[0].usage.num_cached_tokens == 0


def test_a_running_request_keeps_the_weights_that_it_began_with(
    running: RunningEngine, plain: RunningEngine, model: Path, folders: dict[str, Path]
) -> None:
    adapters = running.adapters
    old = answers(running, [request("old", "one")])[0].token_ids
    other = merged_answer(plain, model, "other").token_ids
    assert other != old
    before = num_compiles(running)
    with pytest.raises(NoRoomForAdapter, match="unload one first"):
        adapters.load("other", folders["other"])
    sink = HeldSink()
    running.engine.add(request("running", "one"), sink)
    assert sink.has_begun.wait(60)
    adapters.unload("one")
    with pytest.raises(AdapterNotFound, match="there are: two, three"):
        running.engine.add(request("late", "one"), sink)
    with pytest.raises(NoRoomForAdapter, match="still run"):
        adapters.load("one", folders["other"])
    adapters.unload("two")
    # The place of `two`, on which nothing runs, is written between two steps of the request.
    loading = threading.Thread(target=adapters.load, args=("one", folders["other"]))
    loading.start()
    sink.may_go_on.set()
    loading.join(60)
    new = answers(running, [request("new", "one")])[0].token_ids
    assert sink.token_ids() == old
    assert new == other
    adapters.load("two", folders["two"])
    assert [one.name for one in running.engine.adapters.all()] == ["three", "one", "two"]
    again = answers(running, [request("again", "two")])[0].token_ids
    assert num_compiles(running) == before
    assert again == merged_answer(plain, model, "two").token_ids


def test_a_bad_adapter_leaves_the_others_as_they_are(
    running: RunningEngine, folders: dict[str, Path], tmp_path: Path
) -> None:
    before = answers(running, [request("before", "three")])[0]
    loaded = running.engine.adapters.all()
    for name, folder, message in (
        ("new", tmp_path, "holds no adapter_config.json"),
        ("../new", folders["other"], "letters, digits"),
        ("model", folders["other"], "not be the model's own"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            running.adapters.load(name, folder)
    assert running.engine.adapters.all() == loaded
    assert running.adapters.load("three", folders["three"]) in loaded, "nothing had changed"
    after = answers(running, [request("after", "three")])[0]
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)


def test_an_engine_without_room_says_how_to_get_some(
    plain: RunningEngine, folders: dict[str, Path]
) -> None:
    with pytest.raises(NotSupported, match="--max-loras"):
        plain.adapters.load("one", folders["one"])
    with pytest.raises(AdapterNotFound, match="there are: none"):
        plain.engine.add(request("r", "one"), HeldSink())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_loras": 1}, "--max-loras 1 leaves room"),
        ({"max_lora_rank": 2}, "has 4 ranks"),
        ({"max_loras": 300}, r"in \[0, 256\]"),
        ({"lora": (), "max_lora_rank": 4}, "no effect"),
        ({"lora": (("a", Path("nowhere")),)}, "holds no adapter_config.json"),
        ({"lora": (("a b", Path("nowhere")),)}, "letters, digits"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    model: Path, folders: dict[str, Path], compilation_cache: Path, changes, message
) -> None:
    lora = tuple((name, folders[name]) for name in NAMES)
    with pytest.raises(ConfigError, match=message):
        start_engine(config_of(model, compilation_cache, **({"lora": lora} | changes)))


def test_memory_of_adapters_is_in_the_plan(running: RunningEngine, plain: RunningEngine) -> None:
    widths = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)}
    widths |= {"gate": (32, 56), "up": (32, 56), "down": (56, 32)}
    one = 4 * 2 * 4 * sum(num_in + num_out for num_in, num_out in widths.values())
    # Three, and one that is on its way in.
    assert running.report.memory.adapters_bytes == 4 * one
    assert plain.report.memory.adapters_bytes == 0


@pytest.mark.long
def test_native_kernels_get_adapters_beside_them(
    running: RunningEngine, model: Path, folders: dict[str, Path], compilation_cache: Path
) -> None:
    native_library()
    lora = tuple((name, folders[name]) for name in ("two", "three"))
    requests = [request(name or "base", name) for name in ("", "two", "three")]
    expected = answers(running, requests)
    native = start_engine(config_of(model, compilation_cache, lora=lora, kernels="native"))
    try:
        found = answers(native, requests)
        assert native.report.settings.native is not None
        assert native.engine.snapshot().compiles_after_ready == 0
    finally:
        native.close()
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
