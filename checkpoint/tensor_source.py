"""TensorSource: named arrays in a file or folder, read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file says of one tensor."""

    shape: tuple[int, ...]
    """Row-major; a matrix is `[out, in]`."""
    dtype: str
    """The dtype in the file, e.g. "float32", "bfloat16", or a quantisation such as "Q4_1"."""


class TensorSource(Protocol):
    """Named arrays, read lazily."""

    def names(self) -> Sequence[str]:
        """All tensor names, each once."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of `name`. Raises KeyError for an unknown name."""
        ...

    def read(self, name: str) -> npt.NDArray[Any]:
        """The values of `name`, row-major; may be a read-only view of the file.

        Quantised tensors come as float32, floating ones in their own dtype.
        """
        ...
