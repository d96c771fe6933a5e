"""A TensorSource over a dict, for tests of what is built on TensorSource."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from checkpoint.tensor_source import TensorInfo


@dataclass(frozen=True)
class MemorySource:
    tensors: Mapping[str, np.ndarray]

    def names(self) -> Sequence[str]:
        return tuple(self.tensors)

    def info(self, name: str) -> TensorInfo:
        array = self.tensors[name]
        return TensorInfo(array.shape, array.dtype.name)

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]
