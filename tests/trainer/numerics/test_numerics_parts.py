"""World, ranges, tree and layout by themselves: no model, no devices."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.trainer.errors import StateMismatch
from jaxserve.trainer.fingerprint import NumericsFingerprint, take_fingerprint
from jaxserve.trainer.flat_vector import FlatVector, Leaf
from jaxserve.trainer.gradient_tree import Node, TreeSum, subtrees, sum_nodes
from jaxserve.trainer.state_layout import Scalar, StateLayout
from jaxserve.trainer.step_config import IncidentConfig, OptimizerConfig, StepConfig
from jaxserve.trainer.world import LogicalWorld, num_subtrees

WORLD = LogicalWorld(
    global_batch_size=64,
    num_logical_shards=16,
    micro_batch_size=2,
    seq_len=8,
    settings={"optimizer.name": "adamw", "rates": [0.1, 0.2]},
)


@settings(deadline=None, max_examples=50)
@given(
    shards=st.sampled_from([1, 2, 8, 64]),
    num_devices=st.integers(1, 64),
    speeds=st.lists(st.floats(0.1, 10.0), min_size=64, max_size=64) | st.none(),
)
def test_ranges_cover_all_shards_and_balance_them(
    shards: int, num_devices: int, speeds: list[float] | None
) -> None:
    world = LogicalWorld(
        global_batch_size=shards, num_logical_shards=shards, micro_batch_size=1, seq_len=8
    )
    if num_devices > shards:
        with pytest.raises(ConfigError, match=f"{num_devices} devices cannot share {shards}"):
            world.ranges_of(num_devices)
        return
    weights = None if speeds is None else speeds[:num_devices]
    ranges = world.ranges_of(num_devices, weights)
    assert [part.first for part in ranges] == [0, *(part.end for part in ranges[:-1])]
    assert ranges[-1].end == shards
    assert all(len(part) >= 1 for part in ranges)
    if weights is None:
        assert max(len(part) for part in ranges) == -(-shards // num_devices)
    else:
        slowest = max(len(part) / speed for part, speed in zip(ranges, weights, strict=True))
        assert slowest == pytest.approx(least_time(shards, weights))


def least_time(shards: int, speeds: list[float]) -> float:
    """The earliest time by which the devices can have done all shards, each at least one."""
    times = sorted(size / speed for speed in speeds for size in range(1, shards + 1))
    return next(
        time
        for time in times
        if time >= max(1 / speed for speed in speeds)
        and sum(int(time * speed + 1e-9) for speed in speeds) >= shards
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_logical_shards": 12}, "must be a power of two, such as 8 or 16"),
        ({"global_batch_size": 60}, "must be a multiple of num_logical_shards"),
        ({"micro_batch_size": 3}, "it must be one of 1, 2, 4"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"data_seed": -1}, "data_seed is -1"),
        ({"mode": "quick"}, "mode is 'quick'"),
    ],
)
def test_world_names_the_field_that_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(WORLD, **changes)


def test_world_survives_json_and_finds_differences() -> None:
    copy = LogicalWorld.from_json(json.loads(json.dumps(WORLD.to_json())))
    assert not WORLD.differences(copy)
    other = dataclasses.replace(copy, data_seed=1, settings={"optimizer.name": "lion"})
    assert WORLD.differences(other) == [
        ("data_seed", 0, 1),
        ("optimizer.name", "adamw", "lion"),
        ("rates", [0.1, 0.2], None),
    ]
    with pytest.raises(ConfigError, match="format is 99"):
        LogicalWorld.from_json({**WORLD.to_json(), "format": 99})
    with pytest.raises(ConfigError, match="unknown fields: color"):
        LogicalWorld.from_json({**WORLD.to_json(), "color": 1})


def test_ordered_mode_wants_equal_shares() -> None:
    ordered = dataclasses.replace(WORLD, mode="ordered")
    assert len(ordered.ranges_of(4)) == 4
    with pytest.raises(ConfigError, match="which 3 devices do not divide"):
        ordered.ranges_of(3)


@settings(deadline=None)
@given(first=st.integers(0, 63), size=st.integers(1, 64))
def test_subtrees_are_the_fewest_that_cover(first: int, size: int) -> None:
    end = min(first + size, 64)
    nodes = subtrees(first, end)
    leaves = [
        leaf for node in nodes for leaf in range(node.first_leaf, node.first_leaf + 2**node.level)
    ]
    assert leaves == list(range(first, end))
    assert len(nodes) == num_subtrees(first, end)
    total = TreeSum[str](lambda left, right: f"({left}{right})")
    for leaf in range(first, end):
        total.push(Node(0, leaf), ".")
    assert tuple(node for node, _ in total.parts) == nodes


@settings(deadline=None)
@given(borders=st.lists(st.integers(1, 31), max_size=8), seed=st.integers(0, 2**32 - 1))
def test_sum_does_not_depend_on_who_holds_the_leaves(borders: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    cuts = [0, *sorted(set(borders)), 32]
    parts: list[tuple[Node, np.float32]] = []
    for first, end in itertools.pairwise(cuts):
        total = TreeSum[np.float32](lambda left, right: left + right)
        for leaf in range(first, end):
            total.push(Node(0, leaf), values[leaf])
        parts += total.parts
    halves = values
    while len(halves) > 1:
        halves = halves[0::2] + halves[1::2]
    assert sum_nodes(parts[::-1], lambda left, right: left + right) == halves[0]


def test_sum_of_too_few_nodes_is_refused() -> None:
    with pytest.raises(ValueError, match="do not make up a tree"):
        sum_nodes([(Node(0, 0), 1.0), (Node(1, 1), 2.0)], lambda left, right: left + right)


def layout() -> StateLayout:
    leaves = [Leaf("norm", (5,), False), Leaf("layers/w", (2, 3, 4), True), Leaf("b", (3,), False)]
    scalars = (Scalar("opt_state/count", (), "int32"), Scalar("progress/next_step", (), "int64"))
    flat = FlatVector.of(leaves, block_size=16)
    return StateLayout(flat, ("params", "opt_state/mu", "ema"), scalars)


def test_layout_puts_decayed_leaves_first_and_pads() -> None:
    flat = layout().flat
    assert [leaf.name for leaf in flat.leaves] == ["layers/w", "norm", "b"]
    assert (flat.num_decayed, flat.num_values, flat.num_blocks) == (24, 32, 2)
    assert StateLayout.from_json(json.loads(json.dumps(layout().to_json()))) == layout()


def test_tree_of_a_buffer_views_it_and_fill_is_its_inverse() -> None:
    one = layout()
    buffer = np.random.default_rng(0).integers(0, 255, one.size_bytes).astype(np.uint8)
    for name in one.vectors:
        one.vector(buffer, name)[...] = np.arange(32, dtype=np.float32).reshape(2, 16)
    tree = one.tree(buffer)
    assert tree["params"]["layers"]["w"].shape == (2, 3, 4)
    np.testing.assert_array_equal(tree["ema"]["b"], [29, 30, 31])
    tree["progress"]["next_step"][...] = 7
    assert one.scalar(buffer, "progress/next_step") == 7
    copy = np.zeros(one.size_bytes, np.uint8)
    one.fill(copy, tree)
    for name in one.vectors:
        np.testing.assert_array_equal(one.vector(copy, name), one.vector(buffer, name))
    flat_names = {"params/norm": np.zeros(5, np.float32)}
    with pytest.raises(StateMismatch, match="ema/b is missing"):
        one.fill(copy, flat_names)
    tree["params"]["norm"] = np.zeros(6, np.float32)
    with pytest.raises(StateMismatch, match=r"params/norm is float32\[6\], not float32\[5\]"):
        one.fill(copy, tree)
    with pytest.raises(StateMismatch, match="a buffer of 3 bytes"):
        one.tree(np.zeros(3, np.uint8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(name="muon"), "orthogonalises whole matrices"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(name="adma"), "must be one of adamw"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(name="lion", eps=1e-8), r"optimizer.eps has no effect"),
        (lambda: OptimizerConfig(b1=1.0), "optimizer.b1 is 1.0"),
        (lambda: OptimizerConfig(clip_norm=0.0), "optimizer.clip_norm is 0.0"),
        (lambda: IncidentConfig(min_history=200), "incidents.min_history is 200"),
        (lambda: StepConfig(sharding="zero2"), "sharding is 'zero2'"),  # type: ignore[arg-type]
        (lambda: StepConfig(dropout=1.0), "dropout is 1.0"),
    ],
)
def test_config_names_the_field_that_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_fingerprint_tells_what_changed() -> None:
    flags = ["--xla_cpu_multi_thread_eigen=false", "--xla_force_host_platform_device_count=8"]
    mine = take_fingerprint(jax.devices()[0], flags, {"data": "ab"})
    assert mine.xla_flags == ("--xla_cpu_multi_thread_eigen=false",)
    copy = NumericsFingerprint.from_json(json.loads(json.dumps(mine.to_json())))
    assert not mine.differences(copy)
    other = dataclasses.replace(
        copy, xla_flags=(), packages={**mine.packages, "jaxlib": "0.0.1"}, digests={"data": "cd"}
    )
    assert [name for name, *_ in mine.differences(other)] == [
        "digests.data",
        "packages.jaxlib",
        "xla_flags",
    ]
