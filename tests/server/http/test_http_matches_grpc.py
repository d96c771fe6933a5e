"""A real engine: HTTP and gRPC give the same tokens for the same request."""

from __future__ import annotations

import asyncio

import openai
import pytest

from jaxserve.client import Client
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.startup import start_engine
from jaxserve.server.lifecycle import serving_of
from tests.server.scripted_service import start_server_loop
from tests.server.tiny_model import ENGINE_FLAGS, write_tiny_model

CHAT = [{"role": "user", "content": "Tell me of the sea."}]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.9, "seed": 7, "top_p": 0.8},
    {"temperature": 1.3, "seed": 2**63, "top_k": 20, "min_p": 0.01, "presence_penalty": -1.1},
    {"temperature": 0.7, "seed": 3, "logit_bias": {65: 4.5, 66: -100.0}, "stop": ["A", "zq"]},
    {"temperature": 1.0, "seed": 5, "allowed_token_ids": list(range(97, 123)), "min_tokens": 5},
    {"temperature": 1.0, "seed": 6, "constraint": {"regex": "([a-f]{2} ){3,9}\\."}},
    {"temperature": 0.0, "constraint": {"json_schema": {"enum": ["left", {"turn": ["right"]}]}}},
]
OPENAI_FIELDS = (
    "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "stop",
)  # fmt: skip


@pytest.fixture(scope="module")
def clients(tmp_path_factory, compilation_cache):
    """One of each protocol, of one server."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    running = start_engine(
        EngineConfig(str(folder), compilation_cache_dir=compilation_cache, **ENGINE_FLAGS)
    )
    server, loop = start_server_loop()

    async def become_ready() -> None:
        await server.become_ready(serving_of(running))

    def call(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=30)

    call(become_ready())
    url = f"http://127.0.0.1:{server.http_port}/v1"
    with (
        Client(f"127.0.0.1:{server.grpc_port}") as grpc,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as http,
    ):
        yield grpc, http
        assert grpc.load().num_compiles_after_ready == 0
    call(server.stop())
    loop.call_soon_threadsafe(loop.stop)
    running.close()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prompt", ["Once upon a time", CHAT])
def test_tokens_text_and_logprobs_are_the_same(clients, settings, prompt):
    grpc, http = clients
    outputs = list(grpc.generate(prompt, max_tokens=24, logprobs=2, **settings))
    ids = [token_id for output in outputs for token_id in output.token_ids]
    logprobs = [entry.logprob for output in outputs for entry in output.logprobs]
    model = http.models.list().data[0].id
    asked = {name: value for name, value in settings.items() if name in OPENAI_FIELDS}
    beyond = {name: value for name, value in settings.items() if name not in OPENAI_FIELDS}
    beyond["return_token_ids"] = True
    if isinstance(prompt, str):
        choice = http.completions.create(
            model=model, prompt=prompt, max_tokens=24, logprobs=2, extra_body=beyond, **asked
        ).choices[0]
        text, found = choice.text, choice.logprobs.token_logprobs
    else:
        choice = http.chat.completions.create(
            model=model, messages=prompt, max_tokens=24, logprobs=True, top_logprobs=2,
            extra_body=beyond, **asked,
        ).choices[0]  # fmt: skip
        text, found = choice.message.content, [e.logprob for e in choice.logprobs.content]
    assert choice.token_ids == ids
    assert text == "".join(output.text for output in outputs)
    assert found == pytest.approx(logprobs, abs=1e-6)
    assert choice.finish_reason == outputs[-1].finish_reason.value


def test_each_choice_is_what_its_seed_gives_alone(clients):
    _, http = clients
    model = http.models.list().data[0].id
    create = http.completions.create
    asked = {"model": model, "prompt": "Seeds", "max_tokens": 12, "temperature": 1.0}
    together = [choice.text for choice in create(n=3, seed=40, **asked).choices]
    alone = [create(seed=40 + index, **asked).choices[0].text for index in range(3)]
    assert together == alone
    assert len(set(together)) > 1
