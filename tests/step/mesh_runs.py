"""Runs tiny models on meshes of virtual devices, in a process of its own.

    python -m tests.step.mesh_runs CACHE_DIR CASES

CASES is JSON: name -> keyword arguments of `run_case`. Prints JSON: name -> what came of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxserve.engine.launch import start_devices

NUM_DEVICES = 8
GOLDENS = Path(__file__).parent.parent / "goldens" / "tiny"
MASKED = (3, 6)
"""Requests whose tokens must be even and odd by turns."""
WIDE = "wide"
"""A Llama that eight devices and four stages can share, with fewer KV heads than devices."""


def main(cache_dir: str, cases: str) -> None:
    start_devices(NUM_DEVICES)

    from jaxserve.engine.compilation import use_compilation_cache

    use_compilation_cache(Path(cache_dir))
    print(json.dumps({name: run_case(**case) for name, case in json.loads(cases).items()}))


def run_case(
    mesh: str = "data=1",
    model: str = WIDE,
    buckets: tuple[int, ...] = (24,),
    policy: str = "sarathi",
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
    token_budget: int | None = None,
    num_requests: int = 7,
    max_num_seqs: int = 6,
    num_pages: int = 60,
    scored: bool = False,
) -> dict[str, Any]:
    """Tokens and logprobs of each request; compilations and, with stages, idle rows.

    `scored`: the golden's prompt is scored instead.
    """
    import jax

    from jaxserve.engine.compilation import CompileCounter, ProgramBuild
    from jaxserve.engine.config import EngineConfig
    from jaxserve.engine.settings import resolve_settings
    from jaxserve.engine.sizing import make_scheduler
    from jaxserve.engine.startup import make_executor, program_spec
    from jaxserve.engine.step_arrays import allocate
    from jaxserve.engine.step_device import StepDevice
    from models.mesh_shape import parse_mesh

    model_config, load = _model(model)
    engine_config = EngineConfig(
        model="tiny",
        dtype="float32",
        kernels="xla",
        mesh=parse_mesh(mesh),
        buckets=tuple(buckets),
        token_budget=token_budget,
        max_num_seqs=max_num_seqs,
        max_model_len=64,
        page_size=4,
        policy=policy,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        compilation_cache_dir=Path("unused"),
    )
    settings = resolve_settings(engine_config, model_config, jax.devices()[0])
    settings = replace(settings, scheduler=replace(settings.scheduler, num_pages=num_pages))
    with ProgramBuild(program_spec(settings)) as build:
        programs = build.result()
    device = StepDevice(programs, load(settings), allocate(settings))
    executor = make_executor(device)
    settings, scheduler = make_scheduler(settings, executor)
    requests = _scored(model) if scored else _requests(num_requests, model_config.vocab_size)
    counter = CompileCounter()
    streams = _run(executor, scheduler, requests)
    counter.close()
    return {
        "tokens": {name: stream.token_ids for name, stream in streams.items()},
        "logprobs": {
            name: [entry.logprob for entry in stream.logprobs] for name, stream in streams.items()
        },
        "prompt_logprobs": [
            entry.logprob for entry in next(iter(streams.values())).prompt_logprobs
        ],
        "compiles": counter.count,
        "preemptions": scheduler.num_preemptions,
        "largest_part": _largest_part(device.params),
        **_idle(executor),
    }


def _model(name: str) -> tuple[Any, Any]:
    """Its config, and a function of the settings that puts its weights on their mesh."""
    import numpy as np

    from checkpoint.param_loading import flatten, unflatten
    from jaxserve.engine.served_params import load_served_params, make_place
    from models.loading import open_model
    from tests.step.harness import TINY, tiny_params

    if name != WIDE:
        source = open_model(GOLDENS / name)
        return source.config, lambda settings: load_served_params(source, settings)
    config = replace(TINY, num_heads=8, num_kv_heads=4, num_layers=4, tie_word_embeddings=False)

    def place(settings: Any) -> Any:
        put = make_place(settings)
        leaves = flatten(tiny_params(config))
        return unflatten({path: put(path, np.asarray(leaf)) for path, leaf in leaves.items()})

    return config, place


def _requests(count: int, vocab_size: int) -> list[Any]:
    import numpy as np

    from jaxserve.engine.grammar.constraint import Constraint, ConstraintKind
    from jaxserve.engine.sampling_params import SamplingParams
    from tests.step.harness import make_request

    draws = np.random.default_rng(0)
    requests = []
    for number in range(count):
        prompt = tuple(draws.integers(0, vocab_size - 7, (1, 30, 9, 44, 17)[number % 5]).tolist())
        sampling = SamplingParams(
            temperature=0.9 * (number % 2),
            constraint=Constraint(ConstraintKind.JSON_OBJECT) if number in MASKED else None,
            top_p=(1.0, 0.9)[number % 3 == 1],
            repetition_penalty=(1.0, 1.2)[number % 4 == 2],
            seed=number + 1,
            max_tokens=10,
            ignore_eos=True,
            logprobs=1,
        )
        request = make_request(f"r{number}", prompt, sampling, max_model_len=64)
        if number in MASKED:
            request.masks = AlternatingMasks(vocab_size)
        requests.append(request)
    return requests


class AlternatingMasks:
    """Even tokens and odd ones by turns: masks of a constrained request that are there at once."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self.index = 0
        self.words = self._words_at(0)
        self.loaded: bytes | None = None

    def push(self, token_id: int) -> None:
        assert token_id % 2 == self.index % 2, f"token {token_id} at {self.index}"
        self.index += 1
        self.words = self._words_at(self.index)

    def _words_at(self, index: int) -> bytes:
        return (b"\x55" if index % 2 == 0 else b"\xaa") * (4 * self._num_words)


def _scored(model: str) -> list[Any]:
    import numpy as np

    from jaxserve.engine.sampling_params import SamplingParams
    from tests.step.harness import make_request

    golden = np.load(GOLDENS / model / "logits.npz", allow_pickle=False)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    prompt = tuple(golden["token_ids"].tolist())
    return [make_request("golden", prompt, sampling, max_model_len=64)]


def _run(executor: Any, scheduler: Any, requests: list[Any]) -> dict[str, Any]:
    from tests.step.harness import Stream

    streams = {}
    for request in requests:
        streams[request.request_id] = Stream()
        scheduler.add(request)
    while scheduler.has_work:
        while executor.can_accept() and (plan := scheduler.plan(0.0)) is not None:
            executor.submit(plan)
        plan, results = executor.next_completion()
        for update in scheduler.commit(plan, results, 0.0):
            stream = streams[update.request.request_id]
            stream.token_ids += update.token_ids
            stream.logprobs += update.logprobs
            stream.prompt_logprobs += update.prompt_logprobs
    scheduler.check_integrity()
    return streams


def _largest_part(params: Any) -> float:
    """The largest share of any matrix that one device holds; all have an expert's router."""
    from checkpoint.param_loading import flatten

    return max(
        leaf.addressable_shards[0].data.size / leaf.size
        for path, leaf in flatten(params["layers"]).items()
        if leaf.ndim > 2 and "router" not in path
    )


def _idle(executor: Any) -> dict[str, Any]:
    from jaxserve.engine.pipeline_executor import PipelineExecutor

    if not isinstance(executor, PipelineExecutor):
        return {}
    stats = executor.stats
    return {
        "idle_rows_per_micro_batch": stats.idle_rows_per_micro_batch,
        "idle_share": stats.num_idle_rows / stats.num_stage_rows,
        "num_ticks": stats.num_ticks,
        "num_micro_batches": stats.num_micro_batches,
        "num_empty_stages": stats.num_empty_stages,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
