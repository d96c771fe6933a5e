"""Writes GGUF files byte by byte, so that tests can make each of them lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

UINT8, INT32, UINT32, BOOL, STRING, ARRAY, UINT64 = 0, 5, 4, 7, 8, 9, 10
F32, Q4_0, Q8_0 = 0, 2, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(name: str, kind: int, length: int, values: bytes) -> bytes:
    return key(name, ARRAY, struct.pack("<IQ", kind, length) + values)


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


@dataclass
class GgufBytes:
    """A small honest file; change a field to make it lie."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: list[bytes] = field(default_factory=lambda: [key("general.name", STRING, text("x"))])
    tensors: list[bytes] = field(
        default_factory=lambda: [tensor("a", [4, 2], F32, 0), tensor("b", [32], Q8_0, 32)]
    )
    num_keys: int | None = None
    num_tensors: int | None = None
    data: bytes = bytes(range(32)) + bytes(34)
    alignment: int = 32

    def write(self, path: Path) -> Path:
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_keys)
        head += b"".join(self.keys) + b"".join(self.tensors)
        path.write_bytes(head + bytes(-len(head) % self.alignment) + self.data)
        return path
