"""Classify and Embed of a run of extreme classification, over gRPC and HTTP."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxserve.cli.main import app
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.encoder.startup import RunningEncoder, start_encoder
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.proto.v1 import inference_pb2_grpc
from jaxserve.server.lifecycle import Server, serving_of
from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.errors import XcDataError
from jaxserve.xc.model_folder import FUSION_FILE, write_json
from jaxserve.xc.retrieval import retrieve
from tests.server.scripted_service import start_server_loop
from tests.xc.tiny_xc import tiny_dataset
from tests.xc.xc_rig import stored_run, tiny_config, tiny_runner

ONE_LEAF = ("batch.num_logical_shards=1", "batch.micro_batch_size=16")
WEIGHT = 0.5


@dataclass
class Service:
    run: Path
    server: Server
    running: RunningEncoder
    texts: list[str]
    points: np.ndarray
    """The trainer's embeddings of `texts`."""
    scores: np.ndarray
    ids: np.ndarray
    """What the trainer's parameters rank, fused."""

    def post(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return post(self.server, body)


def post(server: Server, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.http_port}/v1/classify",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@contextmanager
def served(run: Path, compilation_cache: Path) -> Iterator[tuple[Server, RunningEncoder]]:
    running = start_encoder(EngineConfig(str(run), compilation_cache_dir=compilation_cache))
    server, loop = start_server_loop()

    async def become_ready() -> None:
        await server.become_ready(serving_of(running))

    try:
        asyncio.run_coroutine_threadsafe(become_ready(), loop).result(timeout=60)
        yield server, running
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(timeout=60)
        loop.call_soon_threadsafe(loop.stop)
        running.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    tiny_dataset(folder)
    config = tiny_config(folder, *ONE_LEAF)
    encoder = tiny_runner(config)
    encoder.load_state(None)
    for step in range(3):
        encoder.run_step(step)
    run = stored_run(folder / "encoder", config, encoder)
    stage = ("xc.stage='classifiers'", f"xc.encoder_run='{run}'")
    config = tiny_config(folder, *ONE_LEAF, *stage)
    classifiers = tiny_runner(config)
    classifiers.load_state(None)
    for step in range(3):
        classifiers.run_step(step)
    run = stored_run(folder / "classifiers", config, classifiers)
    write_json(run / FUSION_FILE, {"weight": WEIGHT})
    points, trained = classifiers.task.embeddings(classifiers.params(), "test")
    labels = np.asarray(trained) + WEIGHT * np.asarray(
        encoder.task.embeddings(encoder.params(), "test")[1]
    )
    scores, ids = retrieve(np.asarray(points), labels, 10)
    texts = XcDataset(folder / "xc").texts("test")
    with served(run, compilation_cache) as (server, running):
        yield Service(run, server, running, texts, np.asarray(points), scores, ids)


def test_grpc_gives_what_the_trainer_ranks(service: Service) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.server.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        reply = stub.Classify(pb.ClassifyRequest(texts=service.texts, top_k=4), timeout=60)
        embedded = stub.Embed(pb.EmbedRequest(texts=service.texts[:3]), timeout=60)
    assert len(reply.classifications) == len(service.texts) > 10
    for row, one in enumerate(reply.classifications):
        found = [label.score for label in one.labels]
        np.testing.assert_allclose(found, service.scores[row, :4], rtol=1e-5, atol=1e-6)
        if len(set(np.round(service.scores[row, :5], 4))) == 5:  # No near ties.
            assert [label.label_id for label in one.labels] == service.ids[row, :4].tolist()
        texts = service.running.label_texts
        assert all(label.text == texts[label.label_id] for label in one.labels)
    vectors = [one.values for one in embedded.embeddings]
    np.testing.assert_allclose(vectors, service.points[:3], rtol=1e-5, atol=1e-6)


def test_http_gives_the_same_and_names_bad_fields(service: Service) -> None:
    status, reply = service.post({"input": service.texts[:2], "top_k": 3})
    assert status == 200
    for row, one in enumerate(reply["data"]):
        assert one["labels"][0]["id"] == service.ids[row, 0]
        assert len(one["labels"]) == 3
        assert one["labels"][0]["text"] == service.running.label_texts[service.ids[row, 0]]
    assert len(service.post({"input": "w0x0"})[1]["data"][0]["labels"]) == 5
    for body, field in (
        ({"input": "w0x0", "top_k": 0}, "top_k"),
        ({"input": "w0x0", "top_k": 1000}, "top_k"),
        ({"input": "w0x0 " * 40}, "input"),
    ):
        status, reply = service.post(body)
        assert status == 400
        assert field in json.dumps(reply["error"])


def test_no_step_compiles_after_ready(service: Service) -> None:
    before = service.running.compiles.count
    service.post({"input": service.texts[:7]})
    service.post({"input": "w1x1 w2x2", "top_k": 36})
    assert service.running.compiles.count == before


def test_an_index_gives_the_same_labels_and_an_old_one_is_refused(
    service: Service, tmp_path: Path, compilation_cache: Path
) -> None:
    run = tmp_path / "indexed"
    shutil.copytree(service.run, run)
    data = service.run.parent / "xc"
    result = CliRunner().invoke(app, ["classify", "index", str(run), "--data", str(data)])
    assert result.exit_code == 0, result.output
    assert "it finds 100.00 %" in result.output
    body = {"input": service.texts[:5], "top_k": 4}
    with served(run, compilation_cache) as (server, running):
        assert "load label index" in running.report.phases
        indexed, exact = (post(one, body)[1]["data"] for one in (server, service.server))
    for mine, theirs in zip(indexed, exact, strict=True):
        found, wanted = ([one["score"] for one in row["labels"]] for row in (mine, theirs))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert mine["labels"][0]["text"] == theirs["labels"][0]["text"]
    printed = CliRunner().invoke(app, ["classify", "texts", str(run), service.texts[0]])
    assert json.loads(printed.output)["labels"][0]["id"] == exact[0]["labels"][0]["id"]
    write_json(run / FUSION_FILE, {"weight": 2 * WEIGHT})
    with pytest.raises(XcDataError, match="fused anew"):
        start_encoder(EngineConfig(str(run), compilation_cache_dir=compilation_cache))
    removed = CliRunner().invoke(app, ["classify", "index", str(run), "--remove"])
    assert "has no index any more" in removed.output
