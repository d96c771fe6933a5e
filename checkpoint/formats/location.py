"""TensorLocation: where a tensor's bytes lie, for readers that take them part by part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """One tensor in one file, row-major."""

    path: Path
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    """None when quantised."""
    quantization: GGMLQuantizationType | None = None
