"""Adapters merged while converting are those merged in memory."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rig import TINY, convert

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten
from models.loading import open_model
from models.lora import Lora, LoraConfig, init_adapters, merge
from models.lora_peft import save_peft


def make_adapter(folder: Path, variant: str) -> Lora:
    source = open_model(TINY / variant)
    config = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj"))
    abstract = source.family.abstract_params(source.config, jnp.float32)
    adapters = init_adapters(abstract, config, jax.random.key(0))
    adapters = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), adapters
    )
    lora = Lora(adapters, config.scale)
    save_peft(folder, lora, source.config)
    return lora


@pytest.mark.parametrize("to", ["orbax", "safetensors", "gguf"])
def test_merged_is_merged(to: str, tmp_path: Path) -> None:
    lora = make_adapter(tmp_path / "adapter", "biases")
    target = tmp_path / ("m.gguf" if to == "gguf" else "m")
    convert(TINY / "biases", target, to, dtype="float32", lora=tmp_path / "adapter")
    base = open_model(TINY / "biases").load_params(jnp.float32)
    expected = flatten(merge(base, lora))
    changed = 0
    for path, leaf in flatten(open_model(target).load_params(jnp.float32)).items():
        # One float32 product more or less: a rounding of the sum's last place.
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7, err_msg=path)
        changed += not np.array_equal(leaf, flatten(base)[path])
    assert changed == 2


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", "llama3_rope_scaling")
    with pytest.raises(FormatError):
        convert(TINY / "biases", tmp_path / "m", "orbax", lora=tmp_path / "adapter")
