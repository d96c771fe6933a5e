"""Our logits against those that transformers computed for tiny models of each variant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.loading import ModelSource, open_model
from models.ops.attention.dense import dense_attend

TINY = Path(__file__).parent.parent / "goldens" / "tiny"
VARIANTS = sorted(path.name for path in TINY.iterdir() if path.is_dir())
TOLERANCE = 1e-5


def dense_logits(source: ModelSource, params: dict, token_ids: np.ndarray) -> np.ndarray:
    family, config = source.family, source.config

    @jax.jit
    def forward(params: dict, token_ids: jax.Array) -> jax.Array:
        x = family.embed(params, config, token_ids)
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        attend = dense_attend(config)
        x, _ = family.run_layers(params, config, x, positions, (), attend)
        return family.logits(params, config, x)

    return np.asarray(forward(params, token_ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str) -> None:
    source = open_model(TINY / variant)
    golden = np.load(TINY / variant / "logits.npz", allow_pickle=False)
    logits = dense_logits(source, source.load_params(jnp.float32), golden["token_ids"])
    assert logits.dtype == np.float32
    assert np.abs(golden["logits"]).max() > 0.5, "a golden near zero would prove nothing"
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=TOLERANCE)


def test_every_variant_has_a_golden() -> None:
    features = {variant: open_model(TINY / variant).config for variant in VARIANTS}
    assert features["llama2_mha"].num_kv_heads == features["llama2_mha"].num_heads
    assert features["llama3_rope_scaling"].rope_scaling.kind == "llama3"
    assert features["linear_rope_scaling"].rope_scaling.kind == "linear"
    assert features["mistral_sliding_window"].sliding_window == 7
    assert features["mistral_full_attention"].sliding_window is None
    assert features["tied"].tie_word_embeddings
    assert features["biases"].attention_bias
    assert features["biases"].mlp_bias
    assert features["mqa"].num_kv_heads == 1
    assert features["head_dim"].head_dim * features["head_dim"].num_heads != 32


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("llama3_rope_scaling", {"rope_scaling": None}),
        ("mistral_sliding_window", {"sliding_window": 8}),
    ],
)
def test_a_goldens_logits_depend_on_the_feature(variant: str, change: dict) -> None:
    source = open_model(TINY / variant)
    changed = replace(source, config=replace(source.config, **change))
    golden = np.load(TINY / variant / "logits.npz", allow_pickle=False)
    logits = dense_logits(changed, source.load_params(jnp.float32), golden["token_ids"])
    assert np.abs(logits - golden["logits"]).max() > 2 * TOLERANCE
