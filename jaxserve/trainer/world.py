"""The logical world: what a training run computes, whatever devices compute it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from jaxserve.errors import ConfigError

Mode: TypeAlias = Literal["exact", "ordered"]
MODES: tuple[Mode, ...] = ("exact", "ordered")

FORMAT_VERSION = 1
MAX_SEED = 2**31 - 1

Setting: TypeAlias = str | int | float | bool | list[Any] | None
Difference: TypeAlias = tuple[str, Any, Any]
"""(field, its value in the first, its value in the second)."""


@dataclass(frozen=True)
class Range:
    """Logical shards `first .. end - 1`."""

    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, kw_only=True)
class LogicalWorld:
    """Frozen at a run's first start; the order of all its sums follows from it.

    The global batch is cut into logical shards, those into micro-batches. A micro-batch is
    one leaf of the tree along which gradients are added, a logical shard the smallest part
    that a device can be given.

    Attributes:
        global_batch_size: B, examples of a step.
        num_logical_shards: G, a power of two; no more devices than these can take part.
        micro_batch_size: examples of one gradient program; `B / G` is this times a power of two.
        seq_len: T, tokens of an example.
        data_seed: order of the examples.
        rng_seed: root of all other random numbers.
        mode: "exact": the same bits on any number of devices. "ordered": the same data,
            random numbers and updates, but sums in the order that the devices suggest.
        settings: whatever else decides the result, by its field's name in the config.

    Raises:
        ConfigError: names the field, and what would do.
    """

    global_batch_size: int
    num_logical_shards: int
    micro_batch_size: int
    seq_len: int
    data_seed: int = 0
    rng_seed: int = 0
    mode: Mode = "exact"
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "num_logical_shards", "micro_batch_size", "seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
        for name in ("data_seed", "rng_seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value <= MAX_SEED:
                raise ConfigError(f"{name} is {value!r}; it must be 0 to {MAX_SEED}")
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        num_shards, batch = self.num_logical_shards, self.global_batch_size
        if not _is_power_of_two(num_shards):
            nearest = 1 << (num_shards.bit_length() - 1)
            raise ConfigError(
                f"num_logical_shards is {num_shards}; it must be a power of two, "
                f"such as {nearest} or {2 * nearest}"
            )
        if batch % num_shards:
            raise ConfigError(
                f"global_batch_size is {batch}; it must be a multiple of "
                f"num_logical_shards ({num_shards})"
            )
        per_shard = batch // num_shards
        parts, rest = divmod(per_shard, self.micro_batch_size)
        if rest or not _is_power_of_two(parts):
            fitting = [
                per_shard >> k for k in range(per_shard.bit_length()) if per_shard % 2**k == 0
            ]
            raise ConfigError(
                f"micro_batch_size is {self.micro_batch_size}; with {per_shard} examples a logical "
                f"shard (global_batch_size / num_logical_shards) it must be one of "
                f"{', '.join(map(str, sorted(set(fitting))))}"
            )

    @property
    def num_leaves(self) -> int:
        """Micro-batches of a step, a power of two: the leaves of the tree of sums."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def leaves_per_shard(self) -> int:
        """Micro-batches of a logical shard, a power of two."""
        return self.num_leaves // self.num_logical_shards

    def first_index(self, step: int) -> int:
        """Number, among all examples of the run, of the first one of `step` (from 0)."""
        return step * self.global_batch_size

    def ranges_of(
        self, num_devices: int, weights: Sequence[float] | None = None
    ) -> tuple[Range, ...]:
        """The logical shards of each device: contiguous, at least one each.

        The largest share of work in terms of `weights` is as small as can be; what freedom
        is left puts the borders where they cut few sub-trees, since each whole sub-tree is
        one vector to send.

        Args:
            num_devices: N, at most G.
            weights: relative speeds of the devices, all above 0; equal unless given.

        Raises:
            ConfigError: too many devices, or the weights do not fit them.
        """
        num_shards = self.num_logical_shards
        if not 1 <= num_devices <= num_shards:
            raise ConfigError(
                f"{num_devices} devices cannot share {num_shards} logical shards; use 1 to "
                f"{num_shards}, or a new run with a larger num_logical_shards"
            )
        if self.mode == "ordered" and (num_shards % num_devices or weights is not None):
            raise ConfigError(
                f"mode 'ordered' gives every device equally many of the {num_shards} logical "
                f"shards, which {num_devices} devices do not divide; mode 'exact' takes any number"
            )
        speeds = [1.0] * num_devices if weights is None else [float(w) for w in weights]
        if len(speeds) != num_devices or not all(0 < speed < float("inf") for speed in speeds):
            raise ConfigError(f"weights are {weights}; {num_devices} numbers above 0 are needed")
        return share_shards(num_shards, speeds)

    def differences(self, other: LogicalWorld) -> list[Difference]:
        """Fields, and `settings` by their own names, in which `other` is another world."""
        mine, theirs = _flat(self), _flat(other)
        return [
            (name, mine.get(name), theirs.get(name))
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def to_json(self) -> dict[str, Any]:
        """A value for `world.json`; `from_json` is its inverse."""
        return {"format": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LogicalWorld:
        """Raises: ConfigError: it was not made by `to_json` of this version."""
        fields = dict(value)
        version = fields.pop("format", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"world.json: format is {version!r}, this version reads {FORMAT_VERSION}"
            )
        known = {one.name for one in dataclasses.fields(cls)}
        if fields.keys() != known:
            odd = sorted(fields.keys() ^ known)
            raise ConfigError(f"world.json: missing or unknown fields: {', '.join(odd)}")
        return cls(**fields)


def share_shards(num_shards: int, speeds: Sequence[float]) -> tuple[Range, ...]:
    """The logical shards of each device, at most as many as shards; see `ranges_of`."""
    sizes = _largest_sizes(num_shards, speeds)
    ranges: list[Range] = []
    first = 0
    for device in range(len(speeds)):
        room_after = sum(sizes[device + 1 :])
        least = max(first + 1, num_shards - room_after)
        most = min(first + sizes[device], num_shards - (len(speeds) - device - 1))
        end = max(range(least, most + 1), key=_trailing_zeros)
        ranges.append(Range(first, end))
        first = end
    return tuple(ranges)


def num_subtrees(first: int, end: int) -> int:
    """How many aligned sub-trees make up the leaves `first .. end - 1`."""
    split = max(range(first, end + 1), key=_trailing_zeros)
    return (split - first).bit_count() + (end - split).bit_count()


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _trailing_zeros(value: int) -> int:
    return (value & -value).bit_length() if value else 64


def _largest_sizes(num_shards: int, speeds: Sequence[float]) -> list[int]:
    """Most shards that each device may get so that the slowest is done as early as can be."""
    sizes = [1] * len(speeds)
    while sum(sizes) < num_shards:
        # The next shard goes where it ends first; ties go to the first device.
        times = [(size + 1) / speed for size, speed in zip(sizes, speeds, strict=True)]
        soonest = min(times)
        sizes[times.index(soonest)] += 1
    slowest = max(size / speed for size, speed in zip(sizes, speeds, strict=True))
    return [
        max(size, int(slowest * speed + 1e-9)) for size, speed in zip(sizes, speeds, strict=True)
    ]


def _flat(world: LogicalWorld) -> dict[str, Any]:
    values = {
        one.name: getattr(world, one.name)
        for one in dataclasses.fields(world)
        if one.name != "settings"
    }
    # As JSON has them: tuples become lists, so that a world read back is the same world.
    settings: dict[str, Any] = json.loads(json.dumps(dict(world.settings)))
    return values | settings
