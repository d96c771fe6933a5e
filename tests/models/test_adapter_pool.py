"""A pool of adapters beside the weights: each row gets its own, as if it were merged in."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint.errors import FormatError
from models.adapter_pool import AdapterPool, one_place, place_leaves, pool_shapes, write_place
from models.gpu_layout import lay_out_for_gpu
from models.loading import ModelSource, open_model
from models.lora import merge
from models.lora_peft import CONFIG_FILE, WEIGHTS_FILE, read_peft
from models.ops.attention.dense import dense_attend
from tests.models.test_tiny_goldens import TINY, dense_logits
from tests.models.tiny_adapters import random_lora, write_adapter

MAX_RANK = 3
RANKS = (2, 3)
TOKENS = np.arange(5, 25, dtype=np.int32)


def filled_pool(source: ModelSource, folder: Path, dtype: jnp.dtype) -> AdapterPool:
    """Two adapters of different ranks, the second one of fewer projections."""
    config = source.config
    shapes = pool_shapes(config, dtype, len(RANKS), MAX_RANK)
    pool = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for index in range(len(RANKS)):
        files = write_adapter(folder / str(index), lora_of(source, index), config)
        place = one_place(read_peft(files, config), pool_shapes(config, dtype, 1, MAX_RANK))
        pool = write_place(pool, place_leaves(place, lambda _, leaf: jnp.asarray(leaf)), index)
    return pool


def lora_of(source: ModelSource, index: int):
    targets = ("o_proj", "qkv_proj", "v_proj") if index else ()
    return random_lora(source.config, index, rank=RANKS[index], targets=targets)


def make_forward(source: ModelSource, pool: AdapterPool):
    """Logits of `TOKENS`, all of whose rows have one adapter."""
    family, config = source.family, source.config

    @jax.jit
    def forward(params: dict, adapter: jax.Array) -> jax.Array:
        x = family.embed(params, config, TOKENS)
        positions = jnp.arange(len(TOKENS), dtype=jnp.int32)
        rows = jnp.full(len(TOKENS), adapter, jnp.int32)
        x, _ = family.run_layers(
            params, config, x, positions, (), dense_attend(config), adapter_of_row=rows
        )
        return family.logits(params, config, x)

    return lambda params, adapter: np.asarray(forward({**params, "adapters": pool}, adapter))


@pytest.mark.parametrize("variant", ["biases", "phi3", "falcon_7b", "mixtral"])
def test_rows_get_what_merged_weights_give(variant: str, tmp_path: Path) -> None:
    source = open_model(TINY / variant)
    params = source.load_params(jnp.float32)
    forward = make_forward(source, filled_pool(source, tmp_path, jnp.float32))
    base = forward(params, 0)
    for index in range(len(RANKS)):
        merged = forward(merge(params, lora_of(source, index)), 0)
        found = forward(params, index + 1)
        np.testing.assert_allclose(found, merged, rtol=0, atol=5e-5)
        assert np.abs(merged - base).max() > 0.1, "an adapter without effect would prove nothing"
    if variant == "biases":
        np.testing.assert_array_equal(base, dense_logits(source, params, TOKENS))
        apart = forward(params, 1)
        # As on a GPU: q, k and v, gate and up side by side.
        together = forward(lay_out_for_gpu(params), 1)
        np.testing.assert_allclose(together, apart, rtol=0, atol=1e-5)


def test_a_model_without_such_projections_is_refused() -> None:
    with pytest.raises(FormatError, match="no projection of a gpt2 model"):
        pool_shapes(open_model(TINY / "gpt2").config, jnp.float32, 1, 4)


def spoil(folder: Path, what: str) -> None:
    """One thing that is wrong with the files in `folder`."""
    fields = json.loads((folder / CONFIG_FILE).read_text())
    tensors = load_file(folder / WEIGHTS_FILE)
    name = sorted(tensors)[0]
    match what:
        case "NaN":
            tensors[name][0, 0] = np.nan
        case "overflow":
            fields["lora_alpha"] = 1e8
            tensors[sorted(tensors)[1]][:] = 1e35
        case "rank":
            fields["r"] = 10**9
        case "method":
            fields["use_future_trick"] = True
        case "base":
            fields["init_lora_weights"] = "pissa"
        case "type":
            tensors[name] = tensors[name].astype(np.int8)
        case "extra":
            tensors["base_model.model.lm_head.lora_A.weight"] = tensors[name]
    (folder / CONFIG_FILE).write_text(json.dumps(fields))
    save_file(tensors, folder / WEIGHTS_FILE)
    if what == "cut short":
        with (folder / WEIGHTS_FILE).open("r+b") as file:
            file.truncate(200)
    if what == "pickle":
        (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("NaN", "q_proj.a holds NaN"),
        ("overflow", "holds NaN or infinity"),
        ("rank", "wrong shape"),
        ("method", "use_future_trick"),
        ("base", "init_lora_weights 'pissa'"),
        ("type", "not a floating-point type"),
        ("extra", "unexpected: base_model.model.lm_head"),
        ("cut short", "header claims"),
        ("pickle", "pickled adapters are never read"),
    ],
)
def test_files_that_cannot_be_served_are_refused(what: str, message: str, tmp_path: Path) -> None:
    config = open_model(TINY / "biases").config
    lora = random_lora(config, 1, targets=("q_proj",))
    folder = write_adapter(tmp_path / "adapter", lora, config)
    spoil(folder, what)
    with pytest.raises(FormatError, match=message):
        one_place(read_peft(folder, config), pool_shapes(config, jnp.float32, 1, 2))


def test_more_ranks_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    config = open_model(TINY / "biases").config
    folder = write_adapter(tmp_path / "adapter", random_lora(config, 1, rank=4), config)
    with pytest.raises(FormatError, match="--max-lora-rank 4"):
        one_place(read_peft(folder, config), pool_shapes(config, jnp.float32, 1, 2))
