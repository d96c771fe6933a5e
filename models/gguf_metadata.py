"""Typed access to a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoint.errors import FormatError


class MetadataReader:
    """Typed access to metadata; each miss is a FormatError that names the key."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise FormatError(f"GGUF metadata lacks {key!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise FormatError(f"GGUF metadata {key!r} must be a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise FormatError(f"GGUF metadata {key!r} must be a whole number")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value == 0:
            raise FormatError(f"GGUF metadata {key!r} must be positive")
        return value

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self.metadata else None

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise FormatError(f"GGUF metadata {key!r} must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise FormatError(f"GGUF metadata {key!r} must be a boolean")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list):
            raise FormatError(f"GGUF metadata {key!r} must be an array of strings")
        return value

    def integers(self, key: str) -> list[int]:
        """Whole numbers, none when the file lacks the key."""
        result: list[int] = self._array(key, "iu", "whole numbers")
        return result

    def numbers(self, key: str) -> list[float]:
        """Numbers, none when the file lacks the key."""
        result: list[float] = self._array(key, "f", "numbers")
        return result

    def _array(self, key: str, kinds: str, what: str) -> list[Any]:
        value = self.metadata.get(key)
        if value is None:
            return []
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise FormatError(f"GGUF metadata {key!r} must be an array of {what}")
        return list(value.tolist())

    def bos_token_id(self) -> int | None:
        return self.optional_integer("tokenizer.ggml.bos_token_id")

    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: end of sequence, of turn and of message."""
        ids = (
            self.optional_integer(f"tokenizer.ggml.{name}_token_id")
            for name in ("eos", "eot", "eom")
        )
        return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))
