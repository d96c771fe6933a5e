"""A GGUF file's own codes: what they stand for, and the model that is served from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType

from checkpoint.errors import FormatError
from checkpoint.param_loading import export_tensors, flatten
from models.config import ModelConfig
from models.gguf_codes import kinds_in_file, load_codes
from models.loading import ModelSource, open_model
from models.native_layout import HEAD, lay_out_natively
from models.ops.attention.dense import dense_attend
from models.ops.packed import GROUP, Codes, Kind
from models.registry import get_family
from tests.native_library import native_library

CONFIG = ModelConfig(
    family="llama",
    vocab_size=70,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
# Tensors whose names end so have another type than Q4_1.
TYPES = {
    "ffn_down": GgmlType.Q8_0,
    "attn_output": GgmlType.Q4_0,
    "token_embd": GgmlType.Q8_0,
    "output": GgmlType.Q4_1,
    "blk.1.attn_k": GgmlType.Q4_0,
}


def write_model(path: Path, config: ModelConfig) -> ModelSource:
    """Random weights, quantised by the gguf package."""
    family = get_family("llama")
    params = family.init_params(config, jax.random.key(3), jnp.float32)
    params = jax.tree.map(lambda leaf: leaf if (leaf == 1).all() else leaf * 6, params)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, values in export_tensors(params, family.name_tables["gguf"](config)):
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        kinds = [
            kind for part, kind in TYPES.items() if name.removesuffix(".weight").endswith(part)
        ]
        kind = kinds[-1] if kinds else GgmlType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_model(path)


def values_of(leaf: Codes) -> np.ndarray:
    scales = np.repeat(leaf.scales.astype(np.float32), GROUP, axis=-2)
    if leaf.minima is None:
        return (leaf.codes.astype(np.float32) - 128) * scales
    return leaf.codes * scales + np.repeat(leaf.minima.astype(np.float32), GROUP, axis=-2)


@pytest.mark.parametrize("is_tied", [True, False])
def test_codes_stand_for_the_files_values(tmp_path: Path, is_tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=is_tied)
    source = write_model(tmp_path / "coded.gguf", config)
    kinds = dict(kinds_in_file(source))
    assert kinds["layers.mlp.down_proj.kernel"] == Kind.Q8
    assert kinds["layers.attention.o_proj.kernel"] == Kind.Q4
    # Q4_0 and Q4_1 are one kind here, so layers may differ.
    assert kinds["layers.attention.k_proj.kernel"] == Kind.Q4
    assert kinds[HEAD] == (Kind.Q8 if is_tied else Kind.Q4)
    expected = flatten(source.load_params(jnp.float32))
    params, head = load_codes(source, np.float32)
    leaves = flatten(params)
    assert leaves.keys() == expected.keys() - {"lm_head"}
    for path, leaf in leaves.items():
        assert isinstance(leaf, Codes) == path.endswith(".kernel")
        values = values_of(leaf) if isinstance(leaf, Codes) else leaf
        np.testing.assert_allclose(values, expected[path], rtol=1e-6, atol=1e-6, err_msg=path)
    floats = np.asarray(expected["embed"]).T if is_tied else expected["lm_head"]
    np.testing.assert_allclose(values_of(head)[0], floats, rtol=1e-6, atol=1e-6)


def test_logits_are_those_of_the_dequantised_model_within_the_rounding_of_rows(
    tmp_path: Path,
) -> None:
    native_library()
    source = write_model(tmp_path / "coded.gguf", CONFIG)
    kinds = dict(kinds_in_file(source))
    params, head = load_codes(source, np.float32)
    laid_out = lay_out_natively(params, head, lambda path: kinds.get(path, Kind.FLOAT32))
    # q and k are of one kind, so all projections could be joined.
    assert "qkv_proj" in laid_out["packed_kernels"]["attention"]
    family = get_family("llama")
    token_ids = jnp.asarray(np.random.default_rng(0).integers(0, 70, 24), jnp.int32)

    @jax.jit
    def logits(params):
        x = family.embed(params, CONFIG, token_ids)
        x, _ = family.run_layers(params, CONFIG, x, jnp.arange(24), (), dense_attend(CONFIG))
        return family.logits(params, CONFIG, x)

    exact = np.asarray(logits(source.load_params(jnp.float32)))
    served = np.asarray(logits(jax.tree.map(jnp.asarray, laid_out)))
    # Rows are rounded to 8 bits before each product: half a step of 1/127 of a group's largest,
    # some 0.3 % of a product, and there are 14 on the way to a logit.
    error = np.linalg.norm(served - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.03


def test_only_a_gguf_file_has_codes_to_keep() -> None:
    source = open_model(Path(__file__).parent.parent / "goldens" / "tiny" / "biases")
    with pytest.raises(FormatError, match="leave --weights-format out"):
        kinds_in_file(source)
