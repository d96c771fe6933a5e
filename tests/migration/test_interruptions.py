"""Killed, starved of disk, raced: the target is whole or not there, and work goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rig import ROOT, TINY, Forker, convert, model_files
from safetensors.numpy import load_file, save_file

from checkpoint.migrate.errors import WriteFailed
from checkpoint.migrate.manifest import load_manifest
from checkpoint.migrate.run import Limits, OnProgress, peak_memory_bytes
from checkpoint.migrate.workspace import workspace_path
from jaxserve.migration.convert import plan_conversion
from jaxserve.migration.diff import diff_models
from jaxserve.migration.request import ConversionRequest
from jaxserve.migration.verify import Verdict, verify_model
from models.loading import open_model

SOURCE = TINY / "llama2_mha"
FORMATS = [("own", "orbax"), ("back", "safetensors"), ("a.gguf", "gguf")]


def journal_lines(target: Path) -> list[list]:
    path = workspace_path(target) / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_model(made: Path, expected: Path) -> None:
    assert verify_model(made).verdict is Verdict.VERIFIED
    if made.is_file():
        assert made.read_bytes() == expected.read_bytes()
    elif (made / "model.json").exists():
        assert diff_models(made, expected).is_equal
        first, second = load_manifest(made), load_manifest(expected)
        assert first is not None
        assert second is not None
        assert first.arrays == second.arrays
    else:
        assert model_files(made) == model_files(expected)


@pytest.mark.parametrize(("name", "to"), FORMATS)
def test_a_killed_conversion_goes_on_where_it_was(
    name: str, to: str, tmp_path: Path, forker: Forker
) -> None:
    expected = tmp_path / "expected" / name
    expected.parent.mkdir()
    convert(SOURCE, expected, to)
    target = tmp_path / name
    written = 0
    for _ in range(4):
        code, text = forker.run("convert", SOURCE, target, "--to", to, kill_after_windows=3)
        assert code == -9, text
        assert not target.exists()
        lines = journal_lines(target)
        # Each run adds its three windows; none is written again.
        assert len(lines) == written + 3
        assert len({tuple(line[:3]) for line in lines}) == len(lines)
        written = len(lines)
    code, text = forker.run("convert", SOURCE, target, "--to", to)
    assert code == 0, text
    assert not workspace_path(target).exists()
    assert_same_model(target, expected)


def kill_at_random(tmp_path: Path, forker: Forker, num_kills: int, seed: int) -> None:
    """Kills at moments spread over the whole run, publishing included."""
    random_ = random.Random(seed)
    durations = {}
    for name, to in FORMATS:
        start = time.monotonic()
        code, text = forker.run("convert", SOURCE, tmp_path / f"expected-{name}", "--to", to)
        assert code == 0, text
        durations[name] = time.monotonic() - start
    killed = 0
    while killed < num_kills:
        name, to = random_.choice(FORMATS)
        target = tmp_path / name
        force = ["--force"] if target.exists() else []
        before = target.exists()
        run = forker.start("convert", SOURCE, target, "--to", to, *force)
        time.sleep(random_.uniform(0, 1.1) * durations[name])
        run.kill()
        code = run.wait()
        assert code in (-9, 0), run.text()
        killed += code == -9
        if before or code == 0:
            assert target.exists()
        if target.exists():
            assert_same_model(target, tmp_path / f"expected-{name}")
    for name, to in FORMATS:
        target = tmp_path / name
        force = ["--force"] if target.exists() else []
        code, text = forker.run("convert", SOURCE, target, "--to", to, *force)
        assert code == 0, f"seed {seed}: {text}"
        assert_same_model(target, tmp_path / f"expected-{name}")
        assert not workspace_path(target).exists()


def test_kills_at_random_moments(tmp_path: Path, forker: Forker) -> None:
    kill_at_random(tmp_path, forker, 6, seed=6)


@pytest.mark.long
def test_20_kills_at_random_moments(tmp_path: Path, forker: Forker) -> None:
    kill_at_random(tmp_path, forker, 20, seed=random.randrange(10**6))


def test_a_source_that_has_changed_is_refused(tmp_path: Path, forker: Forker) -> None:
    source = shutil.copytree(TINY / "mqa", tmp_path / "hf")
    file = source / "model.safetensors"
    target = tmp_path / "own"
    code, _ = forker.run("convert", source, target, "--to", "orbax", kill_after_windows=4)
    assert code == -9
    stat = file.stat()
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    code, text = forker.run("convert", source, target, "--to", "orbax")
    assert (code, "source has changed" in text.replace("\n", " ")) == (2, True), text
    # The same size, time and inode, as a bad disk or a clumsy copy gives: the digest sees it.
    data = file.read_bytes()
    shutil.copyfile(TINY / "mqa" / "model.safetensors", tmp_path / "first")
    assert stat.st_size == len(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    record = workspace_path(target) / "plan.json"
    fields = json.loads(record.read_text())
    fields["source"][str(file)] = [stat.st_size, file.stat().st_mtime_ns, file.stat().st_ino]
    record.write_text(json.dumps(fields))
    code, text = forker.run("convert", source, target, "--to", "orbax")
    assert (code, "no longer gives" in text.replace("\n", " ")) == (2, True), text
    assert not target.exists()
    code, text = forker.run("convert", source, target, "--to", "orbax", "--restart")
    assert code == 0, text


def test_other_settings_do_not_mix_with_an_unfinished_one(tmp_path: Path, forker: Forker) -> None:
    target = tmp_path / "own"
    forker.run("convert", SOURCE, target, "--to", "orbax", kill_after_windows=2)
    code, text = forker.run("convert", SOURCE, target, "--to", "orbax", "--dtype", "bfloat16")
    assert (code, "other settings" in text) == (2, True), text


def test_a_budget_of_which_less_is_free_goes_on_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the program takes differs a little from start to start, and windows follow from it."""
    expected, target = tmp_path / "expected", tmp_path / "own"
    convert(SOURCE, expected, "orbax")

    def interrupt(num_bytes: int, is_new: bool) -> None:
        raise InterruptedError

    budget = peak_memory_bytes() + 500_000_000
    limits = Limits(2, budget)
    for taken, interrupts in ((budget - 60_000_000, True), (budget - 57_000_000, False)):
        monkeypatch.setattr("jaxserve.migration.convert.peak_memory_bytes", lambda n=taken: n)
        request = ConversionRequest(target, "orbax")
        with (
            plan_conversion(SOURCE, request, num_workers=2, memory_bytes=budget) as conversion,
            pytest.raises(WriteFailed) if interrupts else contextlib.nullcontext(),
        ):
            conversion.run(limits, OnProgress(window=interrupt) if interrupts else OnProgress())
    assert_same_model(target, expected)


def test_lost_writes_are_found_and_made_good(tmp_path: Path, forker: Forker) -> None:
    convert(SOURCE, tmp_path / "expected", "safetensors")
    target = tmp_path / "back"
    forker.run("convert", SOURCE, target, "--to", "safetensors", kill_after_windows=12)
    out = workspace_path(target) / "out"
    first = min(out.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1000:] = bytes(1000)  # As after a power failure: journalled, and not on the disk.
    first.write_bytes(data)
    code, text = forker.run("convert", SOURCE, target, "--to", "safetensors")
    assert code == 0, text
    assert_same_model(target, tmp_path / "expected")


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    convert(TINY / "mqa", tmp_path / "own", "orbax")
    before = load_manifest(tmp_path / "own")
    with pytest.raises(ValueError, match="pass --force"):
        convert(TINY / "tied", tmp_path / "own", "orbax")
    assert load_manifest(tmp_path / "own") == before
    convert(TINY / "tied", tmp_path / "own", "orbax", force=True)
    assert open_model(tmp_path / "own").config.tie_word_embeddings
    for name in ("a.gguf", "b.gguf"):
        convert(TINY / "mqa", tmp_path / name, "gguf")
    with pytest.raises(ValueError, match="pass --force"):
        convert(TINY / "tied", tmp_path / "a.gguf", "gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    convert(TINY / "tied", tmp_path / "a.gguf", "gguf", force=True)
    assert verify_model(tmp_path / "a.gguf").verdict is Verdict.VERIFIED
    manifest = load_manifest(tmp_path / "a.gguf")
    assert manifest is not None
    assert manifest.replaces is None


@pytest.mark.parametrize(("name", "to"), FORMATS)
def test_a_disk_that_refuses_leaves_no_target_and_can_be_resumed(
    name: str, to: str, tmp_path: Path, forker: Forker
) -> None:
    target = tmp_path / name
    code, text = forker.run("convert", SOURCE, target, "--to", to, file_limit_bytes=9000)
    assert code == 4, text
    assert "run the same command again" in text.replace("\n", " ")
    assert not target.exists()
    assert workspace_path(target).is_dir()
    code, text = forker.run("convert", SOURCE, target, "--to", to)
    assert code == 0, text
    assert verify_model(target).verdict is Verdict.VERIFIED


def test_two_at_once_one_wins(tmp_path: Path, forker: Forker) -> None:
    second = Forker(tmp_path)
    try:
        target = tmp_path / "own"
        runs = [one.start("convert", SOURCE, target, "--to", "orbax") for one in (forker, second)]
        codes = sorted(run.wait() for run in runs)
        texts = " ".join(run.text() for run in runs).replace("\n", " ")
    finally:
        second.close()
    assert codes == [0, 2], texts
    assert "another process is making the same target" in texts or "pass --force" in texts
    assert verify_model(target).verdict is Verdict.VERIFIED


def test_a_reader_sees_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "back"
    models = {variant: model_files(TINY / variant) for variant in ("mqa", "tied")}
    convert(TINY / "mqa", target, "safetensors")
    seen, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            descriptor = os.open(target, os.O_RDONLY)
            try:
                with os.fdopen(os.open("config.json", os.O_RDONLY, dir_fd=descriptor), "rb") as f:
                    config = f.read()
                file = os.open("model.safetensors", os.O_RDONLY, dir_fd=descriptor)
                with os.fdopen(file, "rb") as f:
                    weights = f.read()
            except FileNotFoundError:
                continue  # The old folder was deleted under this descriptor: it is retried.
            finally:
                os.close(descriptor)
            seen.append((config, weights))

    thread = threading.Thread(target=read)
    thread.start()
    for variant in ["tied", "mqa"] * 5:
        convert(TINY / variant, target, "safetensors", force=True)
    stop.set()
    thread.join()
    allowed = {(files["config.json"], files["model.safetensors"]) for files in models.values()}
    assert set(seen) == allowed


ON_A_SMALL_DISK = r"""
set -e
mount -t tmpfs -o size=200k tmpfs "$1"
"$2" -m jaxserve.cli.main checkpoint convert "$3" "$1/own" --to orbax && exit 90
test $? = 4 || exit 91
test ! -e "$1/own" || exit 92
mount -o remount,size=20m "$1"
"$2" -m jaxserve.cli.main checkpoint convert "$3" "$1/own" --to orbax || exit 93
"$2" -m jaxserve.cli.main checkpoint verify "$1/own" || exit 94
"""


@pytest.mark.long
def test_a_full_disk_leaves_no_target_and_can_be_resumed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", ON_A_SMALL_DISK]
    done = subprocess.run(
        [*command, "bash", str(disk), sys.executable, str(SOURCE)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No space left" in done.stderr


def test_a_read_that_fails_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from checkpoint.migrate.parts import FileParts

    read = FileParts.read_into

    def failing(self: FileParts, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        if name == "model.layers.1.mlp.up_proj.weight":
            raise OSError(5, "Input/output error")
        read(self, name, index, out)

    monkeypatch.setattr(FileParts, "read_into", failing)
    with pytest.raises(ValueError, match=r"params/layers/mlp/up_proj/kernel cannot be read"):
        convert(TINY / "mqa", tmp_path / "own", "orbax")
    assert not (tmp_path / "own").exists()
