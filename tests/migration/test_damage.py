"""Damage is found where a manifest vouches, and hostile files are refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from rig import TINY, convert, write_tensors
from safetensors.numpy import load_file

from checkpoint.errors import FormatError
from checkpoint.formats.location import TensorLocation
from checkpoint.formats.safetensors import SafetensorsFolder
from checkpoint.migrate.errors import MigrationError
from checkpoint.migrate.parts import FileParts
from checkpoint.store import StoreError
from jaxserve.errors import JaxserveError
from jaxserve.migration.arrays import problems
from jaxserve.migration.source import open_source
from jaxserve.migration.verify import Verdict, verify_model

REFUSALS = (FormatError, MigrationError, StoreError, JaxserveError, OSError)


def flippable(target: Path) -> list[Path]:
    """The files of a model; not the leases of a store, which say nothing of the values."""
    if target.is_file():
        return [target, target.with_name(f"{target.name}.manifest.json")]
    return [
        path
        for path in sorted(target.rglob("*"))
        if path.is_file()
        and path.stat().st_size
        and not {"lease", "gates", "fenced"} & set(path.relative_to(target).parts)
    ]


FORMATS = [("own", "orbax"), ("hf", "safetensors"), ("a.gguf", "gguf")]


@pytest.mark.parametrize(("name", "to"), FORMATS)
def test_flipped_bits_are_found(name: str, to: str, tmp_path: Path) -> None:
    flip_bits(tmp_path, name, to, num_flips=6)


@pytest.mark.long
@pytest.mark.parametrize(("name", "to"), FORMATS)
def test_100_flipped_bits_are_all_found(name: str, to: str, tmp_path: Path) -> None:
    flip_bits(tmp_path, name, to, num_flips=100)


def flip_bits(tmp_path: Path, name: str, to: str, *, num_flips: int) -> None:
    target = tmp_path / name
    convert(TINY / "mqa", target, to)
    assert verify_model(target).verdict is Verdict.VERIFIED
    random_ = random.Random(7)
    files = flippable(target)
    weights = [path.stat().st_size for path in files]
    for count in range(num_flips):
        (path,) = random_.choices(files, weights) if count % 2 else [random_.choice(files)]
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[random_.randrange(len(flipped))] ^= 1 << random_.randrange(8)
        path.write_bytes(flipped)
        assert verify_model(target).verdict is Verdict.DAMAGED, path
        with pytest.raises(REFUSALS):
            convert(target, tmp_path / f"never-{count}", "safetensors")
        path.write_bytes(original)
    assert verify_model(target).verdict is Verdict.VERIFIED


def test_without_a_manifest_the_structure_is_checked_and_oddities_are_told(tmp_path: Path) -> None:
    assert verify_model(TINY / "mqa").verdict is Verdict.SOUND
    tensors = load_file(TINY / "mqa" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    spoilt = tensors[name].astype(np.float32)
    spoilt[0, 0] = np.nan
    big = np.ones((257, 4096), np.float32)
    big[100:150] = 0
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()} | {name: spoilt}
    found = verify_model(write_tensors(tmp_path / "nan", tensors))
    assert found.verdict is Verdict.SOUND
    assert found.warnings == (f"{name}: 1 values are NaN or infinite",)
    tensors = {"model.embed_tokens.weight": big}
    found = verify_model(write_tensors(tmp_path / "some", tensors))
    assert found.verdict is Verdict.DAMAGED


def test_a_long_run_of_zeros_is_told(tmp_path: Path) -> None:
    """What a hole in a download reads as."""
    tensors = load_file(TINY / "mqa" / "model.safetensors")
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    width = tensors[embedding].shape[1]
    rows_a_page = 4096 // (4 * width)
    tensors[head] = np.ones((100 * rows_a_page, width), np.float32)
    tensors[embedding] = tensors[head].copy()
    tensors[embedding][rows_a_page : 33 * rows_a_page] = 0
    folder = write_tensors(tmp_path / "hf", tensors, vocab_size=len(tensors[head]))
    found = verify_model(folder)
    assert found.verdict is Verdict.SOUND, found
    assert found.warnings == (f"{embedding}: 131072 zero bytes on end; was the download whole?",)


def test_what_is_not_finite_is_not_quantised(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(TINY / "mqa" / "model.safetensors")
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    tensors[name][-1, -1] = np.inf
    source = write_tensors(tmp_path / "hf", tensors)
    with pytest.raises(MigrationError, match=r"holds NaN or infinity, which cannot be quantised"):
        convert(source, tmp_path / "a.gguf", "gguf", quantization="Q8_0")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("shard", [1, 4])
def test_a_truncated_shard_is_found(shard: int, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY / "llama2_mha", tmp_path / "hf")
    path = folder / f"model-{shard:05d}-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    found = verify_model(folder)
    assert found.verdict is Verdict.DAMAGED
    assert "is the download whole?" in found.problems[0]


def header(fields: object, data: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "header of 2^63": (2**63).to_bytes(8, "little") + b"{}",
    "header past the end": (10**6).to_bytes(8, "little") + b"{}",
    "duplicate key": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "overlap": header({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "hole": header({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
    "tail": header({"a": F32}, bytes(12)),
    "shape lies": header({"a": {**F32, "shape": [2**62, 4]}}, bytes(8)),
    "negative": header({"a": {**F32, "shape": [-2]}}, bytes(8)),
    "deep": header(b"[" * 100_000),
    "not utf-8": header(b"\xff\xfe{}"),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00" + b"\x8c\x05posix\x94\x8c\x06system",
    "zip": b"PK\x03\x04" + bytes(60),
    "empty": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_lying_safetensors_file_is_refused(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copyfile(TINY / "mqa" / "config.json", folder / "config.json")
    (folder / "model.safetensors").write_bytes(HOSTILE[kind])
    start_s = time.process_time()
    with pytest.raises(FormatError):
        convert(folder, tmp_path / "own", "orbax")
    assert time.process_time() - start_s < 2
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "a\0b", "C:x"])
def test_a_shard_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY / "mqa", tmp_path / "hf")
    (folder / "model.safetensors").rename(tmp_path / "outside")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError):
        convert(folder, tmp_path / "own", "orbax")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_links_out_of_the_folder_are_refused(file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY / "mqa", tmp_path / "hf")
    outside = tmp_path / "outside"
    if (folder / file).exists():
        (folder / file).rename(outside)
    else:
        outside.write_text("{}")
    (folder / file).symlink_to(outside)
    with pytest.raises(FormatError, match="leads out of"):
        convert(folder, tmp_path / "own", "orbax")


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(FormatError, match="not a regular file"):
        convert(tmp_path / "a.gguf", tmp_path / "own", "orbax")


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY / "mqa", tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="a pickle"):
        convert(folder, tmp_path / "own", "orbax")


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (10**4, JaxserveError, r"and \d+ more"),
        (10**6, FormatError, "more than 250000 tensors"),
        pytest.param(249_000, JaxserveError, r"and \d+ more", marks=pytest.mark.long),
    ],
)
def test_a_header_of_very_many_tensors_is_refused(
    count: int, error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copyfile(TINY / "mqa" / "config.json", folder / "config.json")
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(b'"t%d":%s' % (i, entry) for i in range(count)) + b"}"
    (folder / "model.safetensors").write_bytes(header(text))
    start_s = time.process_time()
    with pytest.raises(error, match=message):
        convert(folder, tmp_path / "own", "orbax")
    assert time.process_time() - start_s < (5 if count != 249_000 else 60)


def test_a_gguf_string_length_bomb_is_refused(tmp_path: Path) -> None:
    bomb = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62)
    (tmp_path / "a.gguf").write_bytes(bomb + bytes(64))
    with pytest.raises(FormatError):
        convert(tmp_path / "a.gguf", tmp_path / "own", "orbax")


def test_a_gguf_of_very_many_tensors_is_refused(tmp_path: Path) -> None:
    count = 10**6
    (tmp_path / "a.gguf").write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, count, 0) + bytes(32 * count)
    )
    start_s = time.process_time()
    with pytest.raises(FormatError, match="claims 1000000 tensors"):
        convert(tmp_path / "a.gguf", tmp_path / "own", "orbax")
    assert time.process_time() - start_s < 2


def mutated(data: bytes, random_: random.Random) -> bytes:
    """One to eight edits, most of them where the header is."""
    out = bytearray(data)
    for _ in range(random_.randint(1, 8)):
        position = random_.randrange(min(len(out), 4096) if random_.random() < 0.8 else len(out))
        match random_.randrange(5):
            case 0:
                out[position] ^= 1 << random_.randrange(8)
            case 1:
                out[position] = random_.randrange(256)
            case 2:
                del out[position : position + random_.randint(1, 64)]
            case 3:
                out[position:position] = random_.randbytes(random_.randint(1, 16))
            case _:
                number = random_.choice([2**63, 2**64 - 1, 2**31, 0, 1, len(out)])
                out[position : position + 8] = number.to_bytes(8, "little")
        if len(out) < 16:
            break
    return bytes(out)


def read_everything(path: Path) -> None:
    """What a conversion reads: names, shapes, values."""
    source = open_source(path)
    try:
        if not problems(source):
            for piece in source.pieces.values():
                shape = source.parts.shape(piece.array)
                source.parts.read_part(piece.array, tuple(slice(0, size) for size in shape))
    finally:
        source.close()


def fuzz(tmp_path: Path, seconds: float, seed: int, clock: Callable[[], float]) -> int:
    """Mutates the files of all formats; returns how many cases were tried."""
    random_ = random.Random(seed)
    convert(TINY / "mqa", tmp_path / "a.gguf", "gguf", quantization="Q8_0")
    convert(TINY / "mqa", tmp_path / "own", "orbax")
    (tmp_path / "a.gguf.manifest.json").unlink()
    hf = shutil.copytree(TINY / "mqa", tmp_path / "hf")
    sharded = shutil.copytree(TINY / "llama2_mha", tmp_path / "sharded")
    targets = [
        (tmp_path / "a.gguf", tmp_path / "a.gguf"),
        (hf, hf / "model.safetensors"),
        (hf, hf / "config.json"),
        (sharded, sharded / "model.safetensors.index.json"),
        (tmp_path / "own", tmp_path / "own" / "model.json"),
        (tmp_path / "own", tmp_path / "own" / "jaxserve-manifest.json"),
        (tmp_path / "own", tmp_path / "own" / "source" / "headers" / "model.safetensors"),
    ]
    cases, end_s = 0, clock() + seconds
    while clock() < end_s:
        model, file = random_.choice(targets)
        original = file.read_bytes()
        file.write_bytes(mutated(original, random_))
        start_s = time.process_time()  # Of the processor: others may hold the machine up.
        try:
            read_everything(model)
        except REFUSALS:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {cases}, {file.name}: {error!r}") from error
        assert time.process_time() - start_s < 10, f"seed {seed}, case {cases}: hangs"
        file.write_bytes(original)
        cases += 1
    return cases


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 2, seed=1, clock=time.process_time) > 10


@pytest.mark.long
def test_two_minutes_of_mutated_files(tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fuzz(tmp_path, 120, seed=random.randrange(10**6), clock=time.monotonic) > 500
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, f"{grown} KiB more memory than before"


def test_the_folder_reader_lists_shards() -> None:
    files = SafetensorsFolder(TINY / "llama2_mha").files
    assert [file.path.name for file in files] == [
        f"model-{shard:05d}-of-00004.safetensors" for shard in range(1, 5)
    ]


def test_a_quantized_vector_is_read(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 64, dtype=np.float32)
    kind = GGMLQuantizationType.Q8_0
    raw = quantize(values, kind)
    (tmp_path / "blocks").write_bytes(b"head" + raw.tobytes())
    location = TensorLocation(tmp_path / "blocks", 4, raw.size, (64,), None, kind)
    with closing(FileParts({"norm": location})) as parts:
        whole = parts.read_part("norm", (slice(None),))
        part = parts.read_part("norm", (slice(3, 40),))
    np.testing.assert_allclose(whole, values, atol=1 / 127)
    assert whole[3:40].tobytes() == part.tobytes()
