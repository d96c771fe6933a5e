"""The compiled step with the native kernels: dense logits, and the same bits in every bucket."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.served_params import make_place, place_natively
from jaxserve.engine.settings import EngineSettings, resolve_settings
from jaxserve.engine.startup import build_executor
from jaxserve.errors import ConfigError
from models.native_layout import lay_out_natively
from tests.native_library import native_library
from tests.step.harness import (
    TINY,
    Driver,
    Stream,
    dense_greedy,
    make_request,
    tiny_params,
)

BUCKETS = (4, 8, 24)
SAMPLED = SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True, logprobs=0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=0)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 90, length).tolist())


@cache
def settings_of(buckets: tuple[int, ...] = BUCKETS, num_pages: int = 200) -> EngineSettings:
    native_library()
    config = EngineConfig(
        model="tiny",
        kernels="native",
        dtype="float32",
        buckets=buckets,
        max_num_seqs=4,
        max_model_len=96,
        page_size=4,
        prefix_caching=False,
        compilation_cache_dir=Path("unused"),
    )
    settings = resolve_settings(config, TINY, jax.devices()[0])
    return replace(settings, scheduler=replace(settings.scheduler, num_pages=num_pages))


@cache
def executor_of(settings: EngineSettings) -> JaxExecutor:
    assert settings.native is not None
    host = jax.tree.map(np.asarray, tiny_params())
    laid_out = lay_out_natively(host, host["embed"].T[None], settings.native.kind_of)
    params = place_natively(laid_out, make_place(settings))
    shapes = settings.abstract_params()
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), params
    )
    return build_executor(settings, params)


def run(settings: EngineSettings, *requests: tuple[str, tuple[int, ...], SamplingParams]) -> dict:
    driver = Driver(settings, executor=executor_of(settings))
    for name, prompt, sampling in requests:
        driver.add(make_request(name, prompt, sampling))
    return driver.run()


def test_greedy_equals_dense_forwards() -> None:
    prompts = {f"r{n}": prompt_of(n, seed=n) for n in (1, 3, 16, 40, 60)}
    streams = run(settings_of(), *((name, prompt, GREEDY) for name, prompt in prompts.items()))
    for name, stream in streams.items():
        assert stream.token_ids == dense_greedy(prompts[name], 20), name


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_bits_are_equal_in_every_bucket_and_beside_others(sampling: SamplingParams) -> None:
    """Alone in small buckets, in a full batch of large ones, and after a preemption."""
    request = ("r", prompt_of(19), sampling)
    alone: Stream = run(settings_of(), request)["r"]
    assert len(alone.token_ids) == 20
    crowd = [(f"c{i}", prompt_of(5 + 7 * i, seed=i), replace(GREEDY, seed=i)) for i in range(5)]
    together = run(settings_of(), *crowd, request)
    assert together["r"].bits() == alone.bits()
    # Few pages: requests are preempted and computed again in other chunks.
    tight = run(settings_of(num_pages=26), request, *crowd)
    assert sum(stream.num_preemptions for stream in tight.values()) > 0
    assert tight["r"].bits() == alone.bits()
    for name, _, _ in crowd:
        assert tight[name].bits() == together[name].bits(), name


def test_what_the_kernels_do_not_run_is_refused() -> None:
    native_library()
    device = jax.devices()[0]
    for changes, message in (
        ({"quantization": "int4"}, "do not hold --quantization int4"),
        ({"weights_format": "native", "quantization": "int8"}, "leave --quantization out"),
        ({"weights_format": "native", "kernels": "xla"}, "needs --kernels native"),
        ({"attention": "native", "kernels": "xla"}, "choose --kernels native"),
        ({"kv_cache_dtype": "int8", "attention": "native"}, "not available with --attention"),
    ):
        config = EngineConfig(**{"model": "tiny", "kernels": "native", **changes})
        with pytest.raises(ConfigError, match=message):
            resolve_settings(config, TINY, device)


def test_a_pool_in_8_bits_is_attended_by_the_reference() -> None:
    native_library()
    config = EngineConfig(model="tiny", kernels="native", kv_cache_dtype="int8", max_model_len=96)
    settings = resolve_settings(config, TINY, jax.devices()[0])
    assert (settings.attention.name, settings.native is None) == ("reference", False)
