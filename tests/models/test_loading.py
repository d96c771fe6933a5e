"""open_model reads the config at once and says what is wrong with a path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint.errors import FormatError
from checkpoint.param_loading import export_tensors, flatten
from models.config import ModelConfig
from models.loading import ModelSource, open_model
from models.ops.rope import rope_frequencies

TINY = Path(__file__).parent.parent / "goldens" / "tiny"


def test_a_folder_is_opened_by_its_config() -> None:
    source = open_model(TINY / "biases")
    assert source.name == "biases"
    assert source.config.hidden_size == 32
    assert source.convention == "hf"
    params = source.load_params(jnp.bfloat16)
    assert {leaf.dtype for leaf in flatten(params).values()} == {jnp.dtype(jnp.bfloat16)}


def llama3_rope_factors(config: ModelConfig) -> np.ndarray:
    """What converters store as `rope_freqs.weight`, by wavelength."""
    scaling = config.rope_scaling
    assert scaling is not None
    context = scaling.original_max_position_embeddings
    factors = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * pair / config.head_dim)
        if wavelength < context / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > context / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = (context / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def write_gguf(source: ModelSource, path: Path, *, rope_factors: np.ndarray | None = None) -> None:
    """The folder's model as a GGUF file with float32 tensors and no tokenizer."""
    config = source.config
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
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    table = source.family.name_tables["gguf"](config)
    for name, values in export_tensors(source.load_params(jnp.float32), table):
        writer.add_tensor(name, values)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("variant", ["mqa", "tied", "head_dim"])
def test_the_same_model_as_a_gguf_file_has_the_same_parameters(
    variant: str, tmp_path: Path
) -> None:
    folder = open_model(TINY / variant)
    write_gguf(folder, tmp_path / "tiny.gguf")
    file = open_model(tmp_path / "tiny.gguf")
    assert (file.name, file.convention) == ("tiny", "gguf")
    assert file.config.tie_word_embeddings == folder.config.tie_word_embeddings
    assert file.config.head_dim == folder.config.head_dim
    assert file.config.rms_norm_eps == pytest.approx(folder.config.rms_norm_eps)
    expected = flatten(folder.load_params(jnp.float32))
    for path, leaf in flatten(file.load_params(jnp.float32)).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_a_config_that_is_not_the_weights_names_every_tensor(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY / "mqa", tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"intermediate_size": 60}))
    with pytest.raises(FormatError) as error:
        open_model(folder).load_params(jnp.float32)
    assert str(error.value).count("wrong shape: model.layers.") == 6
    assert "model.layers.1.mlp.down_proj.weight is (32, 56), the config needs (32, 60)" in str(
        error.value
    )


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model at"):
        open_model(tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"holds no config\.json"):
        open_model(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"model\.bin is not a model: give a \.gguf file"):
        open_model(tmp_path / "model.bin")
    (tmp_path / "broken.gguf").write_bytes(b"GGML")
    with pytest.raises(FormatError):
        open_model(tmp_path / "broken.gguf")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "must hold a JSON object"), ("[" * 10**5, "not valid JSON")],
)
def test_a_broken_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        open_model(tmp_path)


def test_llama3_scaling_of_a_gguf_file_is_the_folders(tmp_path: Path) -> None:
    folder = open_model(TINY / "llama3_rope_scaling")
    factors = llama3_rope_factors(folder.config)
    assert len(set(factors.tolist())) > 2  # kept, blended and slowed pairs
    write_gguf(folder, tmp_path / "tiny.gguf", rope_factors=factors)
    file = open_model(tmp_path / "tiny.gguf")
    np.testing.assert_allclose(
        rope_frequencies(file.config), rope_frequencies(folder.config), rtol=1e-6
    )
    file.load_params(jnp.float32)


@pytest.mark.parametrize("factors", [np.ones(3), np.array([1.0, -1.0, 1.0, np.inf] * 2)])
def test_rope_factors_that_make_no_sense_are_refused(factors: np.ndarray, tmp_path: Path) -> None:
    folder = open_model(TINY / "llama3_rope_scaling")
    write_gguf(folder, tmp_path / "tiny.gguf", rope_factors=factors.astype(np.float32))
    with pytest.raises(FormatError, match=r"rope_freqs\.weight must hold"):
        open_model(tmp_path / "tiny.gguf")


def test_gpt2_without_its_head_has_names_of_its_own(tmp_path: Path) -> None:
    whole = open_model(TINY / "gpt2")
    bare = {
        name.removeprefix("transformer."): whole.tensors.read(name).astype(np.float32)
        for name in whole.tensors.names()
    }
    bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)  # a mask, as old files have it
    save_file(bare, tmp_path / "model.safetensors")
    shutil.copy(TINY / "gpt2" / "config.json", tmp_path)
    source = open_model(tmp_path)
    assert (whole.convention, source.convention) == ("hf", "hf_base")
    expected, loaded = whole.load_params(jnp.float32), source.load_params(jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
