"""PrepareConfig: what `jaxserve data prepare` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.sources import FORMATS

KINDS = ("text", "chat")
OVERLONG = ("truncate", "drop")
DEFAULT_FIELDS = {"text": "text", "chat": "messages"}
MAX_SEQ_LEN = 1 << 20
MAX_WORKERS = 256


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    """Options of a preparation; checked here, once.

    Attributes:
        sources: files and folders, in reading order.
        out: the folder to make.
        seq_len: positions a row, T.
        kind: "text" (learn every token) or "chat" (learn the assistant's answers).
        file_format: "auto", by the file's ending, or one of FORMATS for all files.
        field: JSON field or Parquet column; None: "text", or "messages" for chats.
        eval_fraction: share of the documents that goes to the eval split.
        overlong: what happens to a conversation that does not fit a row.
        pack: several conversations a row, else one.
        num_workers: processes that encode; the result is the same for any number.
        force: replace `out` if it exists, and unfinished work with other options.
    """

    sources: tuple[Path, ...]
    out: Path
    seq_len: int = 512
    kind: str = "text"
    file_format: str = "auto"
    field: str | None = None
    eval_fraction: float = 0.01
    overlong: str = "truncate"
    pack: bool = True
    num_workers: int = 1
    force: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("SOURCE: name at least one file or folder")
        if not 8 <= self.seq_len <= MAX_SEQ_LEN:
            raise DataError(f"--seq-len must be from 8 to {MAX_SEQ_LEN}, not {self.seq_len}")
        _check_choice("--kind", self.kind, KINDS)
        _check_choice("--format", self.file_format, ("auto", *FORMATS))
        _check_choice("--overlong", self.overlong, OVERLONG)
        if not 0 <= self.eval_fraction <= 0.5:
            raise DataError(f"--eval-fraction must be from 0 to 0.5, not {self.eval_fraction}")
        if not 1 <= self.num_workers <= MAX_WORKERS:
            raise DataError(f"--workers must be from 1 to {MAX_WORKERS}, not {self.num_workers}")
        if self.kind == "chat" and self.file_format == "text":
            raise DataError("--kind chat needs jsonl or parquet: plain text has no messages")

    @property
    def value_field(self) -> str:
        """The field to read."""
        return self.field or DEFAULT_FIELDS[self.kind]

    def content_options(self) -> dict[str, Any]:
        """The options that the bytes of the result depend on."""
        options: dict[str, Any] = {"field": self.value_field, "eval_fraction": self.eval_fraction}
        if self.kind == "chat":
            options |= {"overlong": self.overlong, "pack": self.pack}
        return options


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
