"""A process that encodes blocks: one in, one out, over its standard input and output.

    python -P -m jaxserve.trainer.data.encode_worker

The first message in is {"tokenizer": FOLDER, "settings": {...}}, the others blocks:
{"items": [[value, is_start, is_end], ...]}. A message is its length (4 bytes, little-endian)
and JSON; an answer that holds tokens is followed by their bytes. The process ends at the end
of its input, so it never outlives whoever started it.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxserve.trainer.data.encoding import Encoded, Encoder, EncoderSettings, Item, RecordError
from models.tokenizer import Tokenizer

_LENGTH = struct.Struct("<I")


def write_message(stream: IO[bytes], fields: dict[str, Any]) -> None:
    """Sends `fields` as JSON."""
    data = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    data = stream.read(_LENGTH.unpack(head)[0])
    fields: dict[str, Any] = json.loads(data.decode("utf-8", "surrogatepass"))
    return fields


def write_start(stream: IO[bytes], tokenizer_folder: Path, settings: EncoderSettings) -> None:
    """Sends what a worker needs first."""
    write_message(stream, {"tokenizer": str(tokenizer_folder), "settings": asdict(settings)})


def write_block(stream: IO[bytes], items: list[Item]) -> None:
    """Sends a block."""
    rows = [[item.value, item.is_start, item.is_end] for item in items]
    write_message(stream, {"items": rows})


def read_encoded(stream: IO[bytes]) -> Encoded | None:
    """The answer to a block; None when the worker has gone. Raises RecordError."""
    head = read_message(stream)
    if head is None:
        return None
    if "error" in head:
        raise RecordError(head["number"], head["error"])
    arrays = [
        np.frombuffer(stream.read(size), dtype)
        for size, dtype in zip(head["sizes"], ("<i4", "<u4", "u1"), strict=True)
    ]
    return Encoded(arrays[0], arrays[1], arrays[2], head["counts"])


def serve(inputs: IO[bytes], outputs: IO[bytes]) -> None:
    """Encodes blocks until `inputs` ends."""
    start = read_message(inputs)
    if start is None:
        return
    tokenizer = Tokenizer.from_folder(start["tokenizer"])
    encoder = Encoder(tokenizer, EncoderSettings(**start["settings"]))
    while (message := read_message(inputs)) is not None:
        items = [Item(*row) for row in message["items"]]
        try:
            encoded = encoder.encode(items)
        except RecordError as error:
            write_message(outputs, {"number": error.number, "error": str(error)})
            continue
        parts = [
            encoded.lengths.astype("<i4").tobytes(),
            encoded.tokens.astype("<u4").tobytes(),
            encoded.weights.tobytes(),
        ]
        write_message(outputs, {"sizes": [len(part) for part in parts], "counts": encoded.counts})
        outputs.write(b"".join(parts))
        outputs.flush()


if __name__ == "__main__":
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        # Whoever asked has gone. Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
