"""StoreSource: the parameters of a stored step as a TensorSource."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.store.open_step import OpenStep
from checkpoint.tensor_source import TensorInfo

PARAMS = "params"


class StoreSource:
    """The arrays below one root of a step, e.g. `params/layers/mlp/up_proj/kernel` under the
    name `layers.mlp.up_proj.kernel`. Every value is verified before it is handed out.

    Args:
        step: an open step; it stays open as long as this lives.
        root: the first part of the arrays' names, without its slash.

    Raises:
        FormatError: the step holds nothing below `root`.
    """

    def __init__(self, step: OpenStep, root: str = PARAMS) -> None:
        self.step = step
        prefix = f"{root}/"
        self._arrays = {
            name.removeprefix(prefix).replace("/", "."): name
            for name in step.arrays
            if name.startswith(prefix)
        }
        if not self._arrays:
            raise FormatError(
                f"step {step.step} of {step.folder.parent.parent} holds no arrays {prefix}...; "
                "it is not the checkpoint of a model"
            )

    def names(self) -> Sequence[str]:
        """All names, without the root, with dots."""
        return tuple(self._arrays)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of `name`."""
        record = self.step.arrays[self._arrays[name]]
        return TensorInfo(record.shape, record.dtype)

    def read(self, name: str) -> npt.NDArray[Any]:
        """The values of `name`. Raises CorruptStep, StoreUnreadable."""
        return self.step.read(self._arrays[name])

    def array_name(self, name: str) -> str:
        """The name in the store."""
        return self._arrays[name]
