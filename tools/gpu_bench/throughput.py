"""Output tokens per second of the whole engine: scheduler, loop, steps and detokeniser."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.engine.compilation import CompileCounter
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.settings import resolve_settings
from jaxserve.engine.sizing import make_scheduler
from jaxserve.engine.startup import build_executor
from models.tokenizer import Tokenizer
from tools.gpu_bench.case import Case, random_params
from tools.gpu_bench.requests import Prompt, make_requests


def measure(case: Case, num_shared: int, cache_dir: Path, attention: str) -> dict[str, Any]:
    """Requests all at once, with the settings that a server has by default: first the
    `num_shared` that a peer serves, too, then as many others as the case has."""
    config = EngineConfig(
        dtype="bfloat16",
        kernels="xla",
        attention=attention,
        max_model_len=case.max_model_len,
        max_num_seqs=min(256, case.max_num_seqs * 2),
        compilation_cache_dir=cache_dir,
    )
    settings = resolve_settings(config, case.config, jax.devices()[0])
    counter = CompileCounter()
    params = random_params(settings.abstract_params())
    executor = build_executor(settings, params)
    settings, scheduler = make_scheduler(settings, executor)
    engine = Engine(scheduler, executor, _tokenizer(case.config.vocab_size), case.config)
    engine.start()
    try:
        _serve(engine, make_requests(case, 8, seed=1), "warm")
        num_compiles = counter.count
        shared = _rate(engine, make_requests(case, num_shared), "shared")
        many = _rate(engine, make_requests(case, case.num_requests, seed=2), "many")
    finally:
        engine.stop()
        counter.close()
    return {
        **shared,
        "many": many,
        "compiles_while_serving": counter.count - num_compiles,
        "buckets": list(settings.scheduler.buckets),
        "kv_pool_tokens": settings.scheduler.num_pages * settings.scheduler.page_size,
    }


def _rate(engine: Engine, prompts: list[Prompt], name: str) -> dict[str, float]:
    start = perf_counter()
    num_tokens = _serve(engine, prompts, name)
    seconds = perf_counter() - start
    return {
        "num_requests": len(prompts),
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "output_tokens": num_tokens,
        "seconds": seconds,
        "output_tokens_per_s": num_tokens / seconds,
    }


def _serve(engine: Engine, prompts: list[Prompt], name: str) -> int:
    requests = (
        GenerationRequest(
            f"{name}-{index}",
            prompt.token_ids,
            SamplingParams(temperature=0.0, max_tokens=prompt.num_output_tokens, ignore_eos=True),
        )
        for index, prompt in enumerate(prompts)
    )
    done = complete_in_order(engine, requests, max_ahead=len(prompts))
    num_tokens = sum(len(completion.token_ids) for completion in done)
    wanted = sum(prompt.num_output_tokens for prompt in prompts)
    if num_tokens != wanted:
        raise RuntimeError(f"{num_tokens} tokens were generated instead of {wanted}")
    return num_tokens


def _tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level vocabulary of this size: bytes, then strings of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    for index in range(len(alphabet), vocab_size):
        digits, rest = "", index
        while rest:
            rest, digit = divmod(rest, len(alphabet))
            digits += alphabet[digit]
        # No string of two or three characters repeats: each is a number in base 256.
        vocab[digits] = index
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)
