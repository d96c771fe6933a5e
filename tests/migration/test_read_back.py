"""What was written is read again from the disk, as much of it as is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from rig import TINY, convert, write_tensors
from safetensors.numpy import load_file

from checkpoint.migrate.errors import VerificationFailed
from checkpoint.migrate.read_back import END_BYTES, ReadBack
from checkpoint.store.direct_file import Bytes, DirectFile
from jaxserve.migration.verify import Verdict, verify_model

VOCAB = 40_000
"""An embedding of 5 MB."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = load_file(TINY / "mqa" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name].astype(np.float32), (VOCAB, 32))
    return write_tensors(tmp_path / "hf", tensors, vocab_size=VOCAB)


def spoil(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """From now on a disk that keeps one byte of each large write wrongly."""
    write = DirectFile.write

    def spoiling(self: DirectFile, data: Bytes, offset: int) -> None:
        write(self, data, offset)
        if len(data) > 3 * END_BYTES:
            index = {"middle": len(data) // 2, "end": len(data) - 1}[place]
            os.pwrite(self._cached, bytes([data[index] ^ 1]), offset + index)

    monkeypatch.setattr(DirectFile, "write", spoiling)


@pytest.mark.parametrize("to", ["safetensors", "orbax"])
@pytest.mark.parametrize(
    ("read_back", "place"), [(ReadBack.FULL, "middle"), (ReadBack.FULL, "end"), (None, "end")]
)
def test_a_byte_that_the_disk_keeps_wrongly_stops_it(
    read_back: ReadBack | None,
    place: str,
    to: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, place)
    options = {} if read_back is None else {"read_back": read_back}
    with pytest.raises(VerificationFailed, match="read back from the target, is not what was"):
        convert(source, tmp_path / "made", to, **options)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("read_back", "place"), [(ReadBack.ENDS, "middle"), (ReadBack.NONE, "end")]
)
def test_what_is_not_read_back_is_found_by_verify(
    read_back: ReadBack, place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, place)
    convert(source, tmp_path / "made", "safetensors", read_back=read_back)
    assert verify_model(tmp_path / "made").verdict is Verdict.DAMAGED
