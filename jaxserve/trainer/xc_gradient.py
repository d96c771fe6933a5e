"""Gradients of a dual encoder over the negatives of the whole batch, on any number of devices.

The loss couples all texts of a batch, and yet no program is partitioned (gradient caching; Gao et
al. 2021): each micro-batch is embedded by one program on one device, all embeddings go to all
devices, each of which computes the same loss and its gradient for the embeddings, and each
micro-batch is then differentiated by one program again. All sums go along the fixed tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.exact_gradient import Gradients
from jaxserve.trainer.exchange import Exchange, add
from jaxserve.trainer.flat_vector import FlatVector
from jaxserve.trainer.gradient_tree import Node, TreeSum
from jaxserve.trainer.shard_gradient import Tree, flatten
from jaxserve.xc.config import LossConfig
from jaxserve.xc.dataset import Texts
from jaxserve.xc.encoders import EncoderSpec
from jaxserve.xc.losses import encoder_losses

ENCODE_CHUNK = 256
"""Texts of one program when all are embedded."""


@dataclass(frozen=True)
class ContrastSpec:
    """What the programs are compiled for.

    Attributes:
        encoder: of points and labels.
        flat: the vector of its parameters.
        loss: what is minimised.
        num_leaves: micro-batches of a batch.
        micro_batch_size: points of one; as many positives follow them, then labels that join.
    """

    encoder: EncoderSpec
    flat: FlatVector
    loss: LossConfig
    num_leaves: int
    micro_batch_size: int


class ContrastGradient:
    """The gradient of a batch.

    Args:
        spec: what to compile for.
        exchange: devices and their leaves.
    """

    def __init__(self, spec: ContrastSpec, exchange: Exchange) -> None:
        self._spec = spec
        self._exchange = exchange

    def __call__(
        self,
        params: Sequence[Tree],
        packed: Mapping[int, npt.NDArray[np.int32]],
        is_excluded: npt.NDArray[np.bool_],
        on_exchange: Callable[[], None] | None,
    ) -> tuple[Gradients, jax.Array, jax.Array]:
        """
        Args:
            params: of each local device.
            packed: texts of the local leaves.
            is_excluded: bool[B, B + M], pairs that are no negatives.
            on_exchange: called before others' gradients are waited for.

        Returns:
            Chunks and losses; the points' embeddings, float32[B, D]; and their spread, float32[],
            from 0 (all the same) to 1.
        """
        exchange, spec = self._exchange, self._spec
        on_device = [
            {leaf: jax.device_put(packed[leaf], exchange.devices[place])
             for leaf in range(exchange.leaf_ranges[place].first, exchange.leaf_ranges[place].end)}
            for place in exchange.local
        ]  # fmt: skip
        embedded = [
            [embed_leaf(spec.encoder, own, texts).reshape(-1) for texts in leaves.values()]
            for own, leaves in zip(params, on_device, strict=True)
        ]
        sums, losses = [], []
        whole = exchange.gather_leaves(embedded)
        first_points = first_spread = None
        for own, leaves, vectors in zip(params, on_device, whole, strict=True):
            shares, cotangents, points, spread = _contrast(spec, vectors, is_excluded)
            total = TreeSum(add)
            for leaf, texts in leaves.items():
                gradient = _pull_back(spec, own, texts, cotangents, np.int32(leaf))
                total.push(Node(0, leaf), flatten_alone(spec.flat, gradient))
            sums.append(total)
            losses.append([shares[leaf] for leaf in leaves])
            if first_points is None:
                first_points, first_spread = points, spread
        if on_exchange is not None:
            jax.block_until_ready([vector for one in sums for _, vector in one.parts])
            on_exchange()
        assert first_points is not None
        assert first_spread is not None
        return exchange.reduce(sums, losses), first_points, first_spread


@partial(jax.jit, static_argnums=0)
def embed_leaf(spec: EncoderSpec, params: Tree, packed: jax.Array) -> jax.Array:
    """Embeddings of packed texts, float32[n, D]."""
    return spec.embed(params, packed)


def embed_all(
    spec: EncoderSpec, exchange: Exchange, params: Sequence[Tree], texts: Texts
) -> jax.Array:
    """Embeddings of all texts, float32[n, D], on the first local device.

    The devices share the work, in programs of one shape: the bits do not depend on their number.
    """
    num_chunks = -(-len(texts) // ENCODE_CHUNK)
    per_device = -(-num_chunks // exchange.num_devices)
    parts = []
    for place, own in zip(exchange.local, params, strict=True):
        chunks = []
        for chunk in range(place * per_device, (place + 1) * per_device):
            ids = np.arange(chunk * ENCODE_CHUNK, (chunk + 1) * ENCODE_CHUNK)
            packed = spec.pack(texts, np.where(ids < len(texts), ids, -1))
            chunks.append(embed_leaf(spec, own, jax.device_put(packed, exchange.devices[place])))
        parts.append(jnp.concatenate(chunks))
    whole = parts[0] if exchange.num_devices == 1 else exchange.gather_values(parts)[0]
    return whole.reshape(-1, spec.width)[: len(texts)]


@partial(jax.jit, static_argnums=0)
def _contrast(
    spec: ContrastSpec, vectors: jax.Array, is_excluded: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Shares of the leaves in the mean loss, float32[num_leaves, 1], and its gradient for all
    embeddings, float32[num_leaves, rows, D]; then the points and their spread."""
    size, width = spec.micro_batch_size, spec.encoder.width
    vectors = vectors.reshape(spec.num_leaves, -1, width)
    num_points = spec.num_leaves * size

    def shares_of(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        points, positives, extra = (
            part.reshape(-1, width) for part in jnp.split(vectors, [size, 2 * size], axis=1)
        )
        labels = jnp.concatenate([positives, extra])
        losses = encoder_losses(spec.loss, points, labels, is_excluded) / num_points
        shares = losses.reshape(spec.num_leaves, size).sum(axis=1, keepdims=True)
        return shares.sum(), shares

    (_, shares), cotangents = jax.value_and_grad(shares_of, has_aux=True)(vectors)
    points = vectors[:, :size].reshape(num_points, width)
    deviation = points - points.mean(axis=0)
    spread = jnp.sqrt(jnp.square(deviation).sum(axis=1).mean())
    return shares, cotangents, points, spread


@partial(jax.jit, static_argnums=0)
def _pull_back(
    spec: ContrastSpec, params: Tree, packed: jax.Array, cotangents: jax.Array, leaf: jax.Array
) -> Tree:
    """A micro-batch's part of the gradient, as the parameters' tree."""
    _, pull = jax.vjp(lambda tree: spec.encoder.embed(tree, packed), params)
    gradient: Tree = pull(cotangents[leaf])[0]
    return gradient


@partial(jax.jit, static_argnums=0)
def flatten_alone(flat: FlatVector, gradient: Tree) -> jax.Array:
    """`flatten` as a program of its own.

    Behind a scatter in one program, XLA's CPU backend takes twice as long for both.
    """
    vector: jax.Array = flatten(flat, gradient)
    return vector
