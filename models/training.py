"""The training forward of every model family: rows of tokens to a sum of losses.

Pure functions over the parameters' pytree, to be differentiated by the caller::

    loss, gradient = jax.value_and_grad(loss_sum)(params, config, rows)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import Params
from models.lora import Lora
from models.ops.attention.packed import ATTENTION_OUTPUT, block_masks, packed_attention
from models.ops.attention.window import layer_window
from models.ops.cross_entropy import weighted_nll_sum
from models.registry import get_family
from models.training_hooks import Branch, TrainingHooks

Remat: TypeAlias = Literal["none", "dots", "full"]
REMAT_POLICIES: tuple[Remat, ...] = ("none", "dots", "full")


class TrainRows(NamedTuple):
    """`b` rows of `T` positions, each row one or several packed segments."""

    inputs: jax.Array
    """`int32[b, T]`"""
    targets: jax.Array
    """`int32[b, T]`: the token that follows each input."""
    weights: jax.Array
    """`float32[b, T]` or `uint8[b, T]`: each target's share in the loss, 0 for padding."""
    segment_ids: jax.Array
    """`int32[b, T]`: positions attend to their own segment only; 0 is padding."""
    positions: jax.Array
    """`int32[b, T]`: position in the segment, for the rotary embedding."""


def loss_sum(
    params: Params,
    config: ModelConfig,
    rows: TrainRows,
    *,
    keys: jax.Array | None = None,
    dropout: float = 0.0,
    remat: Remat = "none",
    compute_dtype: DTypeLike = jnp.float32,
    lora: Lora | None = None,
) -> jax.Array:
    """The sum over all targets of weight times negative log-likelihood, in nats.

    Args:
        params: the family's parameters, of any float dtype.
        config: the model's shape.
        rows: what to predict from what.
        keys: `[b]` PRNG keys, one a row; needed with dropout. A row's masks depend on its
            key alone, not on the other rows.
        dropout: probability with which a value of the embedding, of an attention's output
            or of an MLP's output is dropped.
        remat: what the backward pass computes again instead of keeping it: "none",
            "dots" (all but the products with weights and attention's output) or "full"
            (whole layers).
        compute_dtype: parameters are cast to it; softmax and losses are float32 anyway,
            and gradients come in the parameters' own dtype.
        lora: adapters that are added to the projections that they name. Differentiate by
            them alone to leave `params` frozen; nothing is then computed for those.

    Returns:
        `float32[]`.

    Raises:
        ValueError: an unknown `remat`, a dropout outside `[0, 1)`, or one without keys.
    """
    family = get_family(config.family)
    batch, length = rows.inputs.shape
    params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), params)
    drop = _dropout(keys, dropout, (batch, length))

    masks = block_masks(rows.segment_ids, config.num_heads // config.num_kv_heads)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: tuple[()], layer_index: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
        window = layer_window(config, layer_index)
        out = packed_attention(q, k, v, masks, sliding_window=window)
        return out.reshape(batch * length, *out.shape[2:]), cache

    x = family.embed(params, config, rows.inputs.reshape(-1))
    x = drop(x, jnp.int32(0))
    hooks = TrainingHooks(
        wrap_layer=_remat(remat),
        branch_output=lambda out, layer, branch: drop(out, _dropout_site(layer, branch)),
        lora=lora,
    )
    x, _ = family.run_layers(params, config, x, rows.positions.reshape(-1), (), attend, hooks)
    return weighted_nll_sum(
        lambda head, hidden: family.logits(head, config, hidden),
        {name: params[name] for name in family.logits_params(config)},
        x,
        rows.targets.reshape(-1),
        rows.weights.reshape(-1).astype(jnp.float32),
    )


def _dropout_site(layer_index: jax.Array, branch: Branch) -> jax.Array:
    """A number for each place that drops; 0 is the embedding."""
    return 2 * layer_index + (1 if branch == "attention" else 2)


def _dropout(
    keys: jax.Array | None, rate: float, shape: tuple[int, int]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`drop(x[b * T, E], site)`."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout is {rate}; it must be at least 0 and less than 1")
    if rate == 0.0:
        return lambda x, _: x
    if keys is None:
        raise ValueError("dropout needs keys: one PRNG key a row")

    def drop(x: jax.Array, site: jax.Array) -> jax.Array:
        def kept(key: jax.Array) -> jax.Array:
            site_key = jax.random.fold_in(key, site)
            return jax.random.bernoulli(site_key, 1.0 - rate, (shape[1], x.shape[-1]))

        mask = jax.vmap(kept)(keys).reshape(x.shape)
        return jnp.where(mask, x / (1.0 - rate), 0.0).astype(x.dtype)

    return drop


def _remat(policy: Remat) -> Callable[[Callable[..., object]], Callable[..., object]]:
    if policy == "none":
        return lambda body: body
    if policy == "full":
        return jax.checkpoint
    if policy == "dots":
        saved = jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
        )
        return lambda body: jax.checkpoint(body, policy=saved)
    raise ValueError(f"remat {policy!r} is not known; use one of {', '.join(REMAT_POLICIES)}")
