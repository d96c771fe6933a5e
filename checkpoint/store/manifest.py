"""The manifest: what a checkpoint consists of, with a digest for everything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from checkpoint.store.durable import canonical_json
from checkpoint.store.tree import Stored

FORMAT = "jaxserve-checkpoint-2"


@dataclass(frozen=True)
class ArrayRecord:
    """One array.

    Attributes:
        shape: sizes.
        dtype: NumPy's name of it.
        blake3: digest of the logical values, see `tree.digest`; it does not depend on how
            the array is stored or sharded.
        key_impl: for PRNG key data: the generator's name.
    """

    shape: tuple[int, ...]
    dtype: str
    blake3: str
    key_impl: str | None

    @property
    def stored(self) -> Stored:
        """Shape and type alone."""
        return Stored(self.shape, self.dtype, self.key_impl)


@dataclass(frozen=True)
class FileRecord:
    """One file: its size in bytes and the digest of its bytes."""

    size_bytes: int
    blake3: str


@dataclass(frozen=True)
class Manifest:
    """One checkpoint.

    Attributes:
        step: its number.
        arrays: by name.
        files: by path, relative to the step's folder; all but the manifest and the
            commit record.
        metadata: what the caller wished to keep with it; JSON values.
    """

    step: int
    arrays: Mapping[str, ArrayRecord]
    files: Mapping[str, FileRecord]
    metadata: Mapping[str, Any]

    def encode(self) -> bytes:
        """The file's bytes."""
        return canonical_json(
            {
                "format": FORMAT,
                "step": self.step,
                "arrays": {name: asdict(record) for name, record in self.arrays.items()},
                "files": {path: asdict(record) for path, record in self.files.items()},
                "metadata": self.metadata,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Raises ValueError on anything but what `encode` wrote."""
        fields = json.loads(data)
        try:
            if fields["format"] != FORMAT:
                raise ValueError(f"format is {fields['format']!r}, this version reads {FORMAT!r}")
            arrays = {
                name: ArrayRecord(
                    tuple(int(size) for size in record["shape"]),
                    str(record["dtype"]),
                    str(record["blake3"]),
                    record["key_impl"],
                )
                for name, record in fields["arrays"].items()
            }
            files = {path: FileRecord(**record) for path, record in fields["files"].items()}
            return cls(int(fields["step"]), arrays, files, fields["metadata"])
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a field is missing or of the wrong type: {error!r}") from error
