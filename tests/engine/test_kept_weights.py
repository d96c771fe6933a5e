"""Packed weights in files between starts: the same bits, and never those of another model."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.kept_weights import MAX_FILES, load_kept_params, read_kept, write_kept
from jaxserve.engine.served_params import load_served_params
from jaxserve.engine.settings import resolve_settings
from models.loading import open_model
from tests.native_library import native_library

TIED = Path(__file__).parents[1] / "goldens" / "tiny" / "tied"


class Rig:
    """A tiny model in a folder, and a cache."""

    def __init__(self, folder: Path) -> None:
        native_library()
        self.model = folder / "model"
        self.cache = folder / "cache"
        self.cache.mkdir(mode=0o700)
        shutil.copytree(TIED, self.model)

    def load(self, kernels: str = "native", dtype: str = "float32") -> list[np.ndarray]:
        """By way of the kept file; asserts that these are the bits of the model itself."""
        source = open_model(self.model)
        config = EngineConfig(
            model=str(self.model), kernels=kernels, dtype=dtype, compilation_cache_dir=self.cache
        )
        settings = resolve_settings(config, source.config, jax.devices()[0])
        loaded = load_kept_params(source, settings)
        expected = load_served_params(source, settings)
        assert jax.tree.structure(loaded) == jax.tree.structure(expected)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(loaded)]
        for leaf, other in zip(leaves, jax.tree.leaves(expected), strict=True):
            assert leaf.dtype == other.dtype
            assert leaf.tobytes() == np.asarray(other).tobytes()
        return leaves

    def files(self) -> list[Path]:
        return sorted(self.cache.glob("weights/*"))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_second_start_reads_the_file_of_the_first(rig: Rig) -> None:
    rig.load()
    (first,) = rig.files()
    number = first.stat().st_ino
    rig.load()
    assert [file.stat().st_ino for file in rig.files()] == [number]


def test_other_weights_and_other_kinds_have_files_of_their_own(rig: Rig) -> None:
    rig.load()
    rig.load(dtype="bfloat16")
    assert len(rig.files()) == 2
    path = rig.model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # A bit of a weight, in a file of the same size and time.
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=times)
    rig.load()
    assert len(rig.files()) == 3


def test_xla_keeps_nothing(rig: Rig) -> None:
    rig.load(kernels="xla")
    assert rig.files() == []


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "no header", "other leaves"])
def test_a_damaged_file_is_written_anew(
    rig: Rig, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.load()
    (path,) = rig.files()
    whole = path.read_bytes()
    damaged = {
        "flipped bit": whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
        "cut short": whole[: len(whole) // 2],
        "no header": b"{}\n" + whole[3:],
        "other leaves": whole.replace(b"packed_head", b"packed_tail"),
    }[damage]
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        rig.load()
    assert "written anew" in caplog.text
    assert path.read_bytes() == whole


def test_a_full_disk_is_said_and_the_model_is_served(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    (rig.cache / "weights").write_text("a file stands where the folder should be")
    with caplog.at_level(logging.WARNING):
        rig.load()
    assert "not kept for the next start" in caplog.text


def test_the_files_used_last_stay(tmp_path: Path) -> None:
    params = {"leaf": np.arange(5000, dtype=np.int32)}
    abstract = {"leaf": jax.ShapeDtypeStruct((5000,), np.int32)}
    paths = [tmp_path / "weights" / f"{index}.packed" for index in range(MAX_FILES + 1)]
    for index, path in enumerate(paths[:-1]):
        write_kept(path, params)
        os.utime(path, (index, index))
    found = read_kept(paths[0], abstract)  # The oldest is used again.
    assert found is not None
    assert np.array_equal(found["leaf"], params["leaf"])
    write_kept(paths[-1], params)
    assert sorted(paths[0].parent.iterdir()) == [paths[0], *paths[2:]]
