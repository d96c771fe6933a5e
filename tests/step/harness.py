"""A tiny random Llama behind the real scheduler and the real executor.

The driver is synchronous and deterministic, so that a test can say exactly
which requests run beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.plan import StepPlan
from jaxserve.engine.request import FinishReason, GenerationRequest, Request, TokenLogprobs
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.settings import EngineSettings, resolve_settings
from jaxserve.engine.startup import build_executor
from models.config import ModelConfig
from models.llama import embed, init_params, logits, run_layers
from models.ops.attention.dense import dense_attend

TINY = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    eos_token_ids=(96,),
)


@cache
def tiny_params(config: ModelConfig = TINY):
    # Larger matrices than at initialisation, so that the logits differ clearly.
    params = init_params(config, jax.random.key(1), jnp.float32)
    return jax.tree.map(lambda leaf: leaf if (leaf == 1).all() else leaf * 6, params)


def tiny_settings(
    *,
    buckets: tuple[int, ...] = (4, 8, 24),
    max_num_seqs: int = 6,
    token_budget: int | None = None,
    max_model_len: int = 96,
    page_size: int = 4,
    num_pages: int = 200,
    prefix_caching: bool = False,
    config: ModelConfig = TINY,
    kv_cache_dtype: str = "auto",
) -> EngineSettings:
    engine_config = EngineConfig(
        model="tiny",
        kernels="xla",
        buckets=buckets,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        max_model_len=max_model_len,
        page_size=page_size,
        prefix_caching=prefix_caching,
        kv_cache_dtype=kv_cache_dtype,
        compilation_cache_dir=Path("unused"),
    )
    settings = resolve_settings(engine_config, config, jax.devices()[0])
    return replace(settings, scheduler=replace(settings.scheduler, num_pages=num_pages))


@cache
def tiny_executor(settings: EngineSettings, depth: int = 2) -> JaxExecutor:
    """Compiled once per shape; tests share it, since every run drains it."""
    return build_executor(settings, tiny_params(settings.model_config), depth=depth)


@dataclass
class Stream:
    """What one request got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0

    def bits(self) -> tuple[list[int], list[float]]:
        return self.token_ids, [entry.logprob for entry in self.logprobs]


def make_request(
    request_id: str, prompt: tuple[int, ...], sampling: SamplingParams, *, max_model_len: int = 96
) -> Request:
    asked = sampling.max_tokens or max_model_len
    stop_ids = set(sampling.stop_token_ids) | (
        set() if sampling.ignore_eos else set(TINY.eos_token_ids)
    )
    return Request(
        generation=GenerationRequest(request_id, prompt, sampling),
        max_tokens=min(asked, max_model_len - len(prompt)),
        seed=sampling.seed or 0,
        stop_token_ids=frozenset(stop_ids),
        arrival_s=0.0,
    )


@partial(jax.jit, donate_argnums=0)
def _poison(kv_pool: jax.Array, page_ids: jax.Array) -> jax.Array:
    # Of any dtype: all ones are NaN as a bfloat16, and as the scale of 8-bit values.
    is_float = jnp.issubdtype(kv_pool.dtype, jnp.floating)
    poison = jnp.nan if is_float else ~jnp.zeros((), kv_pool.dtype)
    return kv_pool.at[:, page_ids].set(poison)


class Driver:
    """Runs requests to their end, with freed pages poisoned.

    Args:
        settings: shapes of the steps and size of the pool.
        depth: steps in flight.
        poison: fill every page with NaN at first and again when it is freed.
        executor: another model's than that of `tiny_params`.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        depth: int = 2,
        poison: bool = True,
        executor: JaxExecutor | None = None,
    ) -> None:
        self.executor = executor or tiny_executor(settings, depth)
        config = replace(settings.scheduler, max_in_flight=depth)
        self.scheduler = Scheduler(config)
        self.plans: list[StepPlan] = []
        self.streams: dict[str, Stream] = {}
        self._poison = poison
        if poison:
            self.scheduler.pages.track_freed = True
            self._poison_pages(list(range(config.num_pages + 1)))
        self._requests: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        self.streams[request.request_id] = Stream()
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        if self.scheduler.finish(request_id, FinishReason.CANCELLED) is not None:
            self.streams[request_id].finish_reason = FinishReason.CANCELLED

    def turn(self) -> bool:
        """Submits what fits, then commits one step. False when idle."""
        while self.executor.can_accept():
            plan = self.scheduler.plan(0.0)
            if plan is None:
                break
            if self._poison:
                self._poison_pages(self.scheduler.pages.drain_freed())
            self.executor.submit(plan)
            self.plans.append(plan)
        if self.executor.num_in_flight == 0:
            return False
        plan, results = self.executor.next_completion()
        for update in self.scheduler.commit(plan, results, 0.0):
            stream = self.streams[update.request.request_id]
            stream.token_ids += update.token_ids
            stream.logprobs += update.logprobs
            stream.prompt_logprobs += update.prompt_logprobs
            stream.num_preemptions = update.request.num_preemptions
            if update.finish_reason is not None:
                stream.finish_reason = update.finish_reason
        return True

    def run(self) -> dict[str, Stream]:
        while self.scheduler.has_work:
            assert self.turn(), "the scheduler has work but plans nothing"
        self.scheduler.pages.check_integrity([])
        return self.streams

    def _poison_pages(self, page_ids: list[int]) -> None:
        if page_ids:
            # One shape for every call, so that only the first one compiles.
            size = self.scheduler.config.num_pages + 1
            padded = np.full(size, page_ids[0], np.int32)
            padded[: len(page_ids)] = page_ids
            # And one placement: the first pool is bound to its device, what a step returns is not.
            pool = self.executor.device.kv_pool
            self.executor.device.kv_pool = _poison(jax.device_put(pool, pool.sharding), padded)


def run_alone(settings: EngineSettings, request: Request, **kwargs: object) -> Stream:
    driver = Driver(settings, **kwargs)  # type: ignore[arg-type]
    driver.add(request)
    return driver.run()[request.request_id]


@partial(jax.jit, static_argnames="config")
def _dense_logits(params, tokens, config: ModelConfig):
    x = embed(params, config, tokens)
    attend = dense_attend(config)
    x, _ = run_layers(params, config, x, jnp.arange(tokens.shape[0]), (), attend)
    return logits(params, config, x)


def dense_logits(token_ids: list[int], config: ModelConfig = TINY) -> np.ndarray:
    """Logits `[len, V]` of one dense forward, the oracle of the paged step."""
    padded = np.zeros(config.max_position_embeddings, np.int32)
    padded[: len(token_ids)] = token_ids
    return np.asarray(_dense_logits(tiny_params(config), padded, config))[: len(token_ids)]


def dense_greedy(prompt: tuple[int, ...], num_tokens: int, config: ModelConfig = TINY) -> list[int]:
    """Greedy continuation by dense forwards."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(dense_logits(token_ids, config)[-1].argmax()))
    return token_ids[len(prompt) :]
