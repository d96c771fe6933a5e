"""Adapters over gRPC, HTTP and the command line: who may load which, and what requests get."""

from __future__ import annotations

import asyncio
import io
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jaxserve.cli.adapters import app
from jaxserve.cli.chat import Conversation, EmbeddedAnswerer, RemoteAnswerer
from jaxserve.cli.chat import app as chat_app
from jaxserve.cli.top import take_sample
from jaxserve.cli.top_view import as_values, screen
from jaxserve.client import Client
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.startup import RunningEngine, start_engine
from jaxserve.errors import (
    ConfigError,
    Forbidden,
    InvalidRequest,
    NoRoomForAdapter,
    NotFound,
    NotSupported,
)
from jaxserve.load_window import LoadWindow
from jaxserve.server.adapters import load_adapter
from jaxserve.server.lifecycle import serving_of
from models.loading import open_model
from tests.models.tiny_adapters import random_lora, write_adapter
from tests.security.keys import KEYS, write_keys
from tests.server.scripted_service import start_server_loop
from tests.server.tiny_model import write_tiny_model

GREEDY = {"temperature": 0.0, "max_tokens": 12}
ADMIN, USER = KEYS["watcher"], KEYS["alpha"]


@dataclass(frozen=True)
class Deployment:
    running: RunningEngine
    address: str
    http_url: str
    admin: Client
    user: Client
    folder: Path
    """With the adapters `sql` and `poem` in `loras`, and `secret` beside that."""

    def http(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.http_url}/v1", api_key=key, max_retries=0)

    def post(self, key: str, path: str, **body: str) -> dict:
        with self.http(key) as client:
            return dict(client.post(path, body=body, cast_to=object))

    def text(self, adapter: str | None = None, **settings) -> str:
        deltas = self.user.generate("tell me", adapter=adapter, **(GREEDY | settings))
        return "".join(delta.text for delta in deltas)


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("adapter-api")
    model = write_tiny_model(folder / "model")
    config = open_model(model).config
    for seed, path in enumerate(("loras/sql", "loras/poem", "secret")):
        write_adapter(folder / path, random_lora(config, seed), config)
    running = start_engine(
        EngineConfig(
            str(model),
            max_loras=1,
            max_lora_rank=2,
            token_budget=8,
            buckets="one",
            max_num_seqs=4,
            max_model_len=64,
            kernels="xla",
            compilation_cache_dir=compilation_cache,
        )
    )
    keys = write_keys(folder / "keys.toml", watcher={"roles": ["admin", "metrics"]})
    server, loop = start_server_loop(lora_dir=folder / "loras", api_keys_file=keys)

    async def become_ready() -> None:
        await server.become_ready(serving_of(running))

    asyncio.run_coroutine_threadsafe(become_ready(), loop).result(timeout=30)
    address = f"127.0.0.1:{server.grpc_port}"
    http_url = f"http://127.0.0.1:{server.http_port}"
    with Client(address, api_key=ADMIN) as admin, Client(address, api_key=USER) as user:
        yield Deployment(running, address, http_url, admin, user, folder)
        assert admin.load().num_compiles_after_ready == 0
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(timeout=30)
    loop.call_soon_threadsafe(loop.stop)
    running.close()


@pytest.fixture(autouse=True)
def no_adapters(deployment: Deployment) -> Iterator[None]:
    """Each test begins and ends without any."""
    yield
    for one in deployment.admin.adapters().adapters:
        deployment.admin.unload_adapter(one.name)


def test_metrics_tell_requests_of_each_adapter_that_is_loaded(deployment: Deployment) -> None:
    def figures() -> dict[str, float]:
        request = urllib.request.Request(
            f"{deployment.http_url}/metrics", headers={"Authorization": f"Bearer {ADMIN}"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            text = reply.read().decode()
        found = re.findall(r"^jaxserve_(adapter\S+) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    room = {"adapters_loaded": 0.0, "adapters_room": 1.0}
    assert figures() == room
    deployment.admin.load_adapter("sql", "sql")
    deployment.text("sql")
    deployment.text("sql")
    deployment.text()
    with pytest.raises(NotFound):
        deployment.text("poem")
    of_sql = {'adapter_requests_total{adapter="sql"}': 2.0}
    running = 'adapter_requests_open{adapter="sql"}'
    assert figures() == {"adapters_loaded": 1.0, "adapters_room": 1.0, running: 0.0} | of_sql
    deployment.admin.load_adapter("sql", "sql")  # Taken anew, the name keeps its count.
    assert figures().items() >= of_sql.items()
    with deployment.user.generate("go", adapter="sql", max_tokens=40, ignore_eos=True) as deltas:
        next(iter(deltas))
        assert figures()[running] == 1.0
    deployment.admin.unload_adapter("sql")
    assert figures() == room


@pytest.mark.parametrize("adapter", ["", "sql"])
def test_chat_talks_with_an_adapter(deployment: Deployment, adapter: str) -> None:
    deployment.admin.load_adapter("sql", "sql")
    deltas = deployment.user.generate(
        [{"role": "user", "content": "hi"}], adapter=adapter or None, **GREEDY
    )
    answer = "".join(delta.text for delta in deltas)
    for answerer in (
        RemoteAnswerer(deployment.user, adapter),
        EmbeddedAnswerer(deployment.running, adapter),
    ):
        conversation = Conversation(answerer, GREEDY, system=None, stats=False)
        conversation.ask("hi")
        assert conversation.messages[-1] == {"role": "assistant", "content": answer}


def test_chat_names_what_adapter_it_does_not_know() -> None:
    result = CliRunner().invoke(chat_app, ["--adapter", "sql"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "--adapter sql: no --lora has this name"


def test_an_adapter_is_a_model_of_its_own_over_http(deployment: Deployment) -> None:
    base = deployment.text()
    reply = deployment.post(ADMIN, "/load_lora_adapter", lora_name="sql", lora_path="sql")
    assert (reply["id"], reply["rank"], len(reply["digest"])) == ("sql", 2, 64)
    with deployment.http(USER) as client:
        listed = client.models.list().data
        assert [(one.id, one.parent) for one in listed] == [("model", None), ("sql", "model")]
        assert client.models.retrieve("sql") == listed[1]
        whole = client.completions.create(model="sql", prompt="tell me", **GREEDY)
        chunks = list(
            client.completions.create(model="sql", prompt="tell me", stream=True, **GREEDY)
        )
        assert (whole.model, {chunk.model for chunk in chunks}) == ("sql", {"sql"})
        text = whole.choices[0].text
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert deployment.text("sql") == text != base
        plain = client.completions.create(model="model", prompt="tell me", **GREEDY)
        assert plain.choices[0].text == base
        chat = [{"role": "user", "content": "hi"}]
        assert client.chat.completions.create(model="sql", messages=chat, **GREEDY).model == "sql"
        deployment.post(ADMIN, "/unload_lora_adapter", lora_name="sql")
        with pytest.raises(openai.NotFoundError, match="is not served here; model is"):
            client.completions.create(model="sql", prompt="x")
    with pytest.raises(openai.NotFoundError, match="there are: none"):
        deployment.post(ADMIN, "/unload_lora_adapter", lora_name="sql")


def test_the_load_tells_of_each_adapter_and_top_shows_it(deployment: Deployment) -> None:
    assert not deployment.admin.load().adapters
    deployment.admin.load_adapter("sql", "sql")
    deployment.text("sql")
    deployment.text("sql")
    with deployment.user.generate("go", adapter="sql", max_tokens=40, ignore_eos=True) as deltas:
        next(iter(deltas))
        sample = take_sample(deployment.admin)
    [told] = sample.load.adapters
    assert (told.name, told.num_requests) == ("sql", 3)
    window = LoadWindow.between(sample.load, sample.load, 1.0)
    assert as_values(sample, window)["load"]["adapters"] == [
        {"name": "sql", "num_open": told.num_open, "num_requests": 3}
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(screen(sample, window, []))
    shown = console.export_text()
    assert re.search(rf"adapter sql +{told.num_open} open +3 taken", shown), shown


def test_adapters_over_grpc(deployment: Deployment) -> None:
    loaded = deployment.admin.load_adapter("sql", "sql")
    assert (loaded.name, loaded.rank, loaded.path) == ("sql", 2, "sql")
    listed = deployment.admin.adapters()
    assert (list(listed.adapters), listed.max_adapters, listed.max_rank) == ([loaded], 1, 2)
    with pytest.raises(NoRoomForAdapter, match="unload one first"):
        deployment.admin.load_adapter("poem", "poem")
    constrained = deployment.text("sql", constraint={"regex": "[a-f]{4}"})
    assert set(constrained) <= set("abcdef")
    assert len(constrained) == 4
    deployment.admin.unload_adapter("sql")
    deployment.admin.load_adapter("poem", "poem")
    assert deployment.text("poem") != deployment.text()
    with pytest.raises(NotFound, match="there are: poem"):
        deployment.text("sql")


def test_only_administrators_decide(deployment: Deployment) -> None:
    with pytest.raises(Forbidden, match="admin"):
        deployment.user.load_adapter("sql", "sql")
    with pytest.raises(Forbidden):
        deployment.user.unload_adapter("sql")
    with pytest.raises(Forbidden):
        deployment.user.adapters()
    for path in ("/load_lora_adapter", "/unload_lora_adapter"):
        with pytest.raises(openai.PermissionDeniedError):
            deployment.post(USER, path, lora_name="sql", lora_path="sql")
    assert list(deployment.admin.adapters().adapters) == []


def test_no_path_leads_out_of_the_folder(deployment: Deployment) -> None:
    loras, secret = deployment.folder / "loras", deployment.folder / "secret"
    (loras / "link").symlink_to(secret)
    (loras / "inner").mkdir()
    for file in secret.iterdir():
        (loras / "inner" / file.name).symlink_to(file)
    (loras / "loop").symlink_to(loras / "loop")
    tried = ["../secret", str(secret), "link", "inner", "loop", "nowhere", "", ".", "/", "a\0b"]
    for path in [*tried, "sql/../../secret", "x" * 2000]:
        with pytest.raises(InvalidRequest) as error:
            deployment.admin.load_adapter("new", path)
        assert error.value.field == "path", path
        with pytest.raises(openai.BadRequestError, match="lora_path"):
            deployment.post(ADMIN, "/load_lora_adapter", lora_name="new", lora_path=path)
    with pytest.raises(InvalidRequest, match="name: must have"):
        deployment.admin.load_adapter("a/b", "sql")
    assert list(deployment.admin.adapters().adapters) == []


def test_without_a_folder_nothing_is_loaded_over_the_network(deployment: Deployment) -> None:
    async def load() -> None:
        serving = serving_of(deployment.running)
        await load_adapter(serving, None, "sql", "sql")

    with pytest.raises(NotSupported, match="--lora-dir"):
        asyncio.run(load())


def test_the_command_line_does_the_same(deployment: Deployment) -> None:
    key = deployment.folder / "admin.key"
    key.write_text(f"{ADMIN}\n")
    options = ["--address", deployment.address, "--api-key-file", str(key)]

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    assert "sql: rank 2" in run("load", "sql", "sql")
    assert "1 of 1 places taken" in (listed := run("list"))
    assert "sql  rank 2" in listed
    run("unload", "sql")
    assert "0 of 1 places taken" in run("list")
