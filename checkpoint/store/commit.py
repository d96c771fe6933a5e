"""The commit record: a folder without it is no checkpoint.

It is written and fsynced after the data and the manifest are on the disk, carries the
manifest's digest and its own, and appears in `steps` in the same rename as all the rest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from checkpoint.store.durable import canonical_json, sha256_hex
from checkpoint.store.errors import StoreUnreadable
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
        """Reads what `encode` wrote.

        Raises:
            ValueError: it is damaged.
            StoreUnreadable: it is whole, and of another version of this format.
        """
        fields = json.loads(data)
        try:
            kept = {name: value for name, value in fields.items() if name != "sha256"}
            whole = canonical_json({**kept, "sha256": sha256_hex(canonical_json(kept))})
            if whole != data:
                raise ValueError("its digest does not match its content")
            if kept["format"] != FORMAT:
                raise StoreUnreadable(
                    f"the checkpoint has the format {kept['format']!r}, and this version reads "
                    f"{FORMAT!r}: use the version that wrote it, or a newer one"
                )
            return cls(
                int(kept["step"]),
                int(kept["epoch"]),
                str(kept["manifest_sha256"]),
                float(kept["created_unix_s"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a field is missing or of the wrong type: {error!r}") from error

    def _fields(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}
