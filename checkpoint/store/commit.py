"""The commit record: a folder without it is no checkpoint.

It is written and fsynced after the data and the manifest are on the disk, carries the
manifest's digest and its own, and appears in `steps` in the same rename as all the rest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from checkpoint.store.durable import canonical_json, sha256_hex
from checkpoint.store.manifest import FORMAT


@dataclass(frozen=True)
class CommitRecord:
    """What `commit.json` says.

    Attributes:
        step: the step; a folder copied from another step shows by it.
        epoch: the writer's.
        manifest_sha256: digest of `manifest.json`.
        created_unix_s: wall-clock time; for people.
    """

    step: int
    epoch: int
    manifest_sha256: str
    created_unix_s: float

    def encode(self) -> bytes:
        """The file's bytes; every one of them is covered by the digest in it."""
        fields = self._fields()
        return canonical_json({**fields, "sha256": sha256_hex(canonical_json(fields))})

    @classmethod
    def decode(cls, data: bytes) -> CommitRecord:
        """Raises ValueError on anything but what `encode` wrote."""
        fields = json.loads(data)
        try:
            if fields["format"] != FORMAT:
                raise ValueError(f"format is {fields['format']!r}, this version reads {FORMAT!r}")
            record = cls(
                int(fields["step"]),
                int(fields["epoch"]),
                str(fields["manifest_sha256"]),
                float(fields["created_unix_s"]),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"a field is missing or of the wrong type: {error!r}") from error
        if record.encode() != data:
            raise ValueError("its digest does not match its content")
        return record

    def _fields(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}
