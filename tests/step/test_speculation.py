"""Drafts in the compiled step: the same bits as without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxserve.engine.compilation import CompileCounter
from jaxserve.engine.request import FinishReason
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.config import SpeculationConfig
from tests.step.harness import Driver, make_request, tiny_settings

ASKED = {
    "greedy": SamplingParams(temperature=0.0, logprobs=2),
    "cool": SamplingParams(temperature=0.2, seed=4, logprobs=0),
    "filtered": SamplingParams(temperature=0.4, top_k=4, top_p=0.9, seed=5),
    "few": SamplingParams(temperature=0.0, allowed_token_ids=tuple(range(7, 20)), logprobs=0),
    "late": SamplingParams(temperature=0.0, min_tokens=30, stop_token_ids=(7, 8, 9), seed=6),
    "scored": SamplingParams(temperature=0.0, prompt_logprobs=1, logprobs=0),
    "penalised": SamplingParams(temperature=0.0, repetition_penalty=1.1, logprobs=0),
}


def requests_of(max_tokens: int):
    rng = np.random.default_rng(0)
    for index, (name, sampling) in enumerate(ASKED.items()):
        words = rng.integers(0, 90, 6).tolist()
        prompt = tuple(words * 3)[: 8 + index]
        yield make_request(name, prompt, replace(sampling, max_tokens=max_tokens, ignore_eos=True))


@pytest.fixture(scope="module")
def settings():
    """One bucket, so that bits do not depend on how many rows a step has."""
    settings = tiny_settings(buckets=(24,), max_num_seqs=6, prefix_caching=True)
    drafting = replace(settings.scheduler, speculation=SpeculationConfig())
    return replace(settings, scheduler=drafting)


def run(settings, max_tokens: int = 36, *, num_pages: int = 200, drafts: bool, abort: bool = False):
    driver = Driver(settings)  # Compiled for the settings with drafts, which have room for both.
    changes = {"num_pages": num_pages} | ({} if drafts else {"speculation": None})
    driver = Driver(
        replace(settings, scheduler=replace(settings.scheduler, **changes)),
        executor=driver.executor,
        poison=num_pages == settings.scheduler.num_pages,
    )
    for request in requests_of(max_tokens):
        driver.add(request)
    if abort:
        for _ in range(9):
            driver.turn()
        driver.abort("cool")
    driver.run()
    return driver


def test_bits_are_those_without_drafts(settings) -> None:
    plain = run(settings, drafts=False)
    counter = CompileCounter()
    drafted = run(settings, drafts=True)
    tight = run(settings, num_pages=34, drafts=True, abort=True)
    assert counter.count == 0
    counter.close()
    scheduler = drafted.scheduler
    assert 0 < scheduler.num_accepted_tokens < scheduler.num_draft_tokens
    assert len(drafted.plans) < len(plain.plans)
    assert tight.scheduler.num_preemptions > 0
    for name, stream in plain.streams.items():
        for other in (drafted.streams[name], tight.streams[name]):
            if other.finish_reason is not FinishReason.CANCELLED:
                assert other.bits() == stream.bits(), name
                assert other.prompt_logprobs == stream.prompt_logprobs, name
                assert other.finish_reason is stream.finish_reason
