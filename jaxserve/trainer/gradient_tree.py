"""The one binary tree along which a step's gradients are added, whoever holds them.

Leaves are the micro-batches of the global batch in order. A node of level k covers 2**k
leaves from a multiple of 2**k on. Its value is that of its left half plus that of its right
half: the same two operands in the same order on any number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, order=True)
class Node:
    """Leaves `index << level .. (index + 1 << level) - 1`."""

    level: int
    index: int

    @property
    def first_leaf(self) -> int:
        """The first leaf that it covers."""
        return self.index << self.level


class TreeSum(Generic[Value]):
    """A sum under way: a binary counter of finished sub-trees.

    Holds at most one value a level, so at most log2(number of leaves) + 1 of them.

    Args:
        add: left and right operand to their sum; may use up both.
    """

    def __init__(self, add: Callable[[Value, Value], Value]) -> None:
        self._add = add
        self._parts: list[tuple[Node, Value]] = []

    def push(self, node: Node, value: Value) -> None:
        """Adds the next node in order of leaves."""
        while self._parts and _is_right_sibling(node, self._parts[-1][0]):
            left_node, left = self._parts.pop()
            value = self._add(left, value)
            node = Node(left_node.level + 1, left_node.index >> 1)
        self._parts.append((node, value))

    @property
    def parts(self) -> list[tuple[Node, Value]]:
        """Finished sub-trees in order of leaves: one, the root, when all leaves are in."""
        return self._parts


def subtrees(first: int, end: int) -> tuple[Node, ...]:
    """The fewest nodes that cover leaves `first .. end - 1`, in order.

    They are what a `TreeSum` of these leaves holds in the end.
    """
    nodes: list[Node] = []
    while first < end:
        level = (end - first).bit_length() - 1
        if first:
            level = min(level, (first & -first).bit_length() - 1)
        nodes.append(Node(level, first >> level))
        first += 1 << level
    return tuple(nodes)


def sum_nodes(nodes: Iterable[tuple[Node, Value]], add: Callable[[Value, Value], Value]) -> Value:
    """The root of a tree from nodes that together cover all its leaves, in any order.

    Raises:
        ValueError: they do not.
    """
    total = TreeSum(add)
    for node, value in sorted(nodes, key=lambda pair: pair[0].first_leaf):
        total.push(node, value)
    if len(total.parts) != 1 or total.parts[0][0].index != 0:
        raise ValueError(f"nodes {[node for node, _ in total.parts]} do not make up a tree")
    return total.parts[0][1]


def _is_right_sibling(node: Node, other: Node) -> bool:
    return node.level == other.level and node.index == other.index + 1 and node.index % 2 == 1
