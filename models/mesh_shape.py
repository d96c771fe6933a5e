"""MeshShape: how many devices serve a model, and along which axes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


class MeshError(ValueError):
    """A mesh that cannot be made, or that a model does not fit. The message names the way out."""


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Sizes of the mesh's axes; their product is the number of devices.

    Raises:
        MeshError: a size is not positive.
    """

    data: int = 1
    """D, replicas: each has all weights, and requests of its own."""
    stage: int = 1
    """P, stages of the pipeline: each has a run of layers, and their keys and values."""
    tensor: int = 1
    """T, parts of each layer: heads, feed-forward columns, experts, vocabulary."""

    def __post_init__(self) -> None:
        for name, size in self.sizes().items():
            if size < 1:
                raise MeshError(f"--mesh {name} must be at least 1, not {size}")

    def sizes(self) -> dict[str, int]:
        """Axis -> size, in the order in which devices are laid out: neighbours share a layer."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes().values())

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.sizes().items())


ONE_DEVICE = MeshShape()
MESH_AXES = tuple(ONE_DEVICE.sizes())


def parse_mesh(text: str) -> MeshShape:
    """The shape of "data=2,tensor=4"; an axis that is not named has size 1.

    Raises:
        MeshError: another axis, one named twice, or a size that is no number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or name not in MESH_AXES or not size.isdecimal():
            raise MeshError(
                f"--mesh {text!r} is no mesh: write sizes of {', '.join(MESH_AXES)}, like "
                "data=2,tensor=4 (experts are shared out over tensor)"
            )
        if name in sizes:
            raise MeshError(f"--mesh {text!r} names {name} twice")
        sizes[name] = int(size)
    return MeshShape(**sizes)
