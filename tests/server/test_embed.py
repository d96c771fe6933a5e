"""Embed over real sockets: an encoder's own steps, batches, refusals."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import pytest
from google.protobuf import unknown_fields

from jaxserve.client import Client
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.encoder.startup import RunningEncoder, start_encoder
from jaxserve.errors import InvalidRequest, NotSupported
from jaxserve.proto.v1 import inference_pb2, inference_pb2_grpc
from jaxserve.server.lifecycle import Server, serving_of
from tests.server.scripted_service import start_server_loop
from tests.server.tiny_encoder import GOLDEN, MAX_TOKENS, SIZE, text_of, write_tiny_encoder

MINILM = GOLDEN.parent / "minilm.json"
TOLERANCE = 1e-5
MINILM_TOLERANCE = 1e-4


@dataclass
class EmbedService:
    server: Server
    client: Client
    running: RunningEncoder


def serve(config: EngineConfig) -> Iterator[EmbedService]:
    """A server of an encoder, on a free port of this process."""
    running = start_encoder(config)
    server, loop = start_server_loop()

    async def become_ready() -> None:
        await server.become_ready(serving_of(running))

    try:
        asyncio.run_coroutine_threadsafe(become_ready(), loop).result(timeout=30)
        with Client(f"127.0.0.1:{server.grpc_port}") as client:
            yield EmbedService(server, client, running)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(timeout=30)
        loop.call_soon_threadsafe(loop.stop)
        running.close()


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path
) -> Iterator[EmbedService]:
    folder = write_tiny_encoder(tmp_path_factory.mktemp("encoder"))
    yield from serve(
        EngineConfig(str(folder), token_budget=80, compilation_cache_dir=compilation_cache)
    )


@pytest.fixture(scope="module")
def golden() -> tuple[list[list[int]], np.ndarray]:
    """Token ids, and the vectors that transformers' rows make of them."""
    arrays = np.load(GOLDEN / "rows.npz", allow_pickle=False)
    counts = arrays["num_tokens"]
    means = arrays["rows"].sum(axis=1) / counts[:, None]
    ids = [row[:count].tolist() for row, count in zip(arrays["token_ids"], counts, strict=True)]
    return ids, means / np.linalg.norm(means, axis=-1, keepdims=True)


def test_vectors_equal_the_golden_in_any_order_and_company(service, golden):
    ids, expected = golden
    texts = [text_of(row) for row in ids]
    result = service.client.embed(texts)
    np.testing.assert_allclose(result.vectors, expected, rtol=0, atol=TOLERANCE)
    assert result.num_tokens == tuple(map(len, ids))
    assert not any(result.truncated)
    backwards = service.client.embed(texts[::-1])
    np.testing.assert_allclose(backwards.vectors[::-1], expected, rtol=0, atol=TOLERANCE)

    def ask(index: int) -> float:
        vectors = service.client.embed([texts[index % len(texts)]]).vectors
        return float(np.abs(vectors[0] - expected[index % len(texts)]).max())

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(ask, range(48))) < TOLERANCE
    load = service.client.load()
    assert (load.num_running, load.num_waiting, load.num_compiles_after_ready) == (0, 0, 0)
    assert service.running.engine._loop.num_in_flight == 0


def test_many_texts_share_steps(service):
    before = service.client.load().num_steps
    texts = [text_of([number]) for number in range(200)]
    vectors = service.client.embed(texts).vectors
    assert vectors.shape == (200, SIZE)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=TOLERANCE)
    alone = service.client.embed([texts[123]]).vectors[0]
    np.testing.assert_allclose(vectors[123], alone, rtol=0, atol=TOLERANCE)
    # 4 places a step; the first steps may go before all texts are in.
    assert service.client.load().num_steps - before < 100
    assert service.client.load().num_compiles_after_ready == 0


def test_a_longer_text_is_refused_or_cut_as_asked(service):
    longest = list(range(2, 2 + MAX_TOKENS))
    longer = [*longest[:-1], 90, 91, 92, longest[-1]]
    with pytest.raises(InvalidRequest, match="has 23 tokens; the model takes 20 at most") as error:
        service.client.embed(["w5", text_of(longer)])
    assert error.value.field == "texts[1]"
    cut = service.client.embed([text_of(longer), text_of(longest)], truncate=True)
    assert cut.truncated == (True, False)
    assert cut.num_tokens == (MAX_TOKENS, MAX_TOKENS)
    np.testing.assert_array_equal(cut.vectors[0], cut.vectors[1])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "must not be empty"),
        (["w1"] * 513, "has 513 texts; at most 512 are allowed"),
        (["x" * (1 << 16) + "x"], "65537 bytes in one text; at most 65536"),
        (["w1", ""], "a text must have at least one token"),
    ],
)
def test_bounds_are_named(service, texts, message):
    with pytest.raises(InvalidRequest, match=message) as error:
        service.client.embed(texts)
    assert error.value.field == "texts"


def test_an_unknown_field_is_refused(service):
    request = inference_pb2.EmbedRequest(texts=["w1"])
    request.MergeFromString(b"\xf8\x06\x01")  # field 111
    assert len(unknown_fields.UnknownFieldSet(request)) == 1
    stub = inference_pb2_grpc.InferenceStub(service.client._channel)
    with pytest.raises(Exception, match="field number 111"):
        stub.Embed(request)


def test_what_the_model_cannot_do_is_said(service, make_service):
    with pytest.raises(NotSupported, match="is an encoder, which generates no text: call Embed"):
        list(service.client.generate("w1"))
    decoder = make_service()
    with pytest.raises(NotSupported, match="generates text and makes no embeddings"):
        decoder.client.embed(["hello"])
    assert service.server.state.num_refused["not_supported"] == 1


def test_what_clients_are_told(service):
    assert service.client.is_serving()
    info = service.client.model_info()
    assert (info.family, info.embedding_size) == ("bert", SIZE)
    assert (info.max_model_len, info.max_num_seqs, info.num_pages) == (MAX_TOKENS, 4, 0)
    assert list(info.buckets) == [MAX_TOKENS, 4 * MAX_TOKENS]
    assert service.client.tokenize("w3 w4") == [3, 4]
    with urllib.request.urlopen(
        f"http://127.0.0.1:{service.server.http_port}/metrics", timeout=5
    ) as reply:
        metrics = reply.read().decode()
    assert "jaxserve_unexpected_compiles_total 0.0" in metrics
    assert 'jaxserve_request_success_total{finished_reason="stop"}' in metrics
    assert "kv_cache" not in metrics


@pytest.mark.long
@pytest.mark.real_model
def test_minilm_served_by_the_command_equals_transformers(compilation_cache):
    golden = json.loads(MINILM.read_text(encoding="utf-8"))
    texts = [case["text"] for case in golden["cases"]]
    expected = np.array([case["embedding"] for case in golden["cases"]])
    command = [sys.executable, "-m", "jaxserve.cli.main", "serve", "--model", "all-minilm-l6-v2"]
    command += ["--grpc-port", "0", "--http-port", "0"]
    command += ["--compilation-cache-dir", str(compilation_cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            ready = re.match(rb"READY grpc=(\S+) http=\S+\n", process.stdout.readline())
            assert ready, process.communicate()[1]
            with Client(ready[1].decode()) as client:
                _check_minilm(client, texts, expected)
            process.send_signal(signal.SIGTERM)
            stderr = process.communicate(timeout=30)[1].decode()
            assert process.returncode == 0, stderr
            assert "steps (texts x tokens)" in stderr
        finally:
            process.kill()


def _check_minilm(client: Client, texts: list[str], expected: np.ndarray) -> None:
    # One of the texts is too long: transformers cuts it, and so do we if asked.
    together = client.embed(texts, truncate=True)
    assert together.truncated == (*[False] * (len(texts) - 1), True)
    together = together.vectors
    alone = np.concatenate([client.embed([text], truncate=True).vectors for text in texts])
    np.testing.assert_allclose(together, expected, rtol=0, atol=MINILM_TOLERANCE)
    np.testing.assert_allclose(alone, expected, rtol=0, atol=MINILM_TOLERANCE)
    with pytest.raises(InvalidRequest, match="the model takes 256 at most"):
        client.embed(["word " * 300])
    assert client.embed(["word " * 300], truncate=True).num_tokens == (256,)
    # Every length from one token to the longest, and then nothing has compiled.
    client.embed(["word " * (number + 1) for number in range(254)])
    assert client.load().num_compiles_after_ready == 0
    with pytest.raises(NotSupported, match="is an encoder"):
        list(client.generate("hello"))


def test_http_gives_the_same_vectors(service, golden):
    ids, expected = golden
    url = f"http://127.0.0.1:{service.server.http_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        [model] = client.models.list().data
        for texts in ([text_of(row) for row in ids], ids):
            for encoding in ({}, {"encoding_format": "float"}):  # The client's default is base64.
                reply = client.embeddings.create(model=model.id, input=texts, **encoding)
                vectors = np.array([entry.embedding for entry in reply.data])
                np.testing.assert_allclose(vectors, expected, rtol=0, atol=TOLERANCE)
                assert [entry.index for entry in reply.data] == list(range(len(ids)))
                assert reply.usage.prompt_tokens == sum(map(len, ids))
        one = client.embeddings.create(model=model.id, input=text_of(ids[0]))
        np.testing.assert_allclose(one.data[0].embedding, expected[0], rtol=0, atol=TOLERANCE)
        long = list(range(1, MAX_TOKENS + 6))
        for texts in ([text_of(long)], [long]):
            with pytest.raises(openai.BadRequestError) as refusal:
                client.embeddings.create(model=model.id, input=texts)
            assert refusal.value.param == "input[0]"
            cut = client.embeddings.create(
                model=model.id, input=texts, extra_body={"truncate": True}
            )
            assert cut.usage.total_tokens == MAX_TOKENS
        for texts in ([], [[]], [[-1]], ["w1"] * 513):
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model=model.id, input=texts)
        with pytest.raises(openai.BadRequestError, match="generates no text"):
            client.completions.create(model=model.id, prompt="x")
