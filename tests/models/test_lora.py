"""Adapters: their start, their effect, merging, and peft's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten
from models.loading import open_model
from models.lora import Lora, LoraConfig, init_adapters, merge
from models.lora_peft import CONFIG_FILE, WEIGHTS_FILE, load_peft, save_peft
from models.registry import LLAMA
from models.training import loss_sum
from tests.models.test_tiny_goldens import dense_logits
from tests.models.training_rows import TINY, random_rows

GOLDENS = Path(__file__).parent.parent / "goldens"
CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"))
ROWS = random_rows(TINY, [[5, 9], [16]], 16)


@pytest.fixture(scope="module")
def params() -> dict:
    return LLAMA.init_params(TINY, jax.random.key(0), jnp.float32)


@pytest.fixture(scope="module")
def adapters(params: dict) -> dict:
    """Adapters that do something: B is random too."""
    leaves, structure = jax.tree.flatten(init_adapters(params, CONFIG, jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    made = [
        leaf + 0.5 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, made)


def test_new_adapters_have_the_chosen_projections_and_change_nothing(params: dict) -> None:
    abstract = LLAMA.abstract_params(TINY, jnp.bfloat16)
    made = init_adapters(abstract, CONFIG, jax.random.key(1))
    shapes = {path: leaf.shape for path, leaf in flatten(made).items()}
    assert shapes == {
        "layers.attention.q_proj.a": (3, 24, 3),
        "layers.attention.q_proj.b": (3, 3, 32),
        "layers.attention.v_proj.a": (3, 24, 3),
        "layers.attention.v_proj.b": (3, 3, 16),
        "layers.mlp.down_proj.a": (3, 40, 3),
        "layers.mlp.down_proj.b": (3, 3, 24),
    }
    for path, leaf in flatten(made).items():
        assert leaf.dtype == jnp.float32
        assert (jnp.abs(leaf).max() > 0) == path.endswith(".a")
    with_new = loss_sum(params, TINY, ROWS, lora=Lora(made, CONFIG.scale))
    assert with_new == loss_sum(params, TINY, ROWS)


def test_merged_weights_give_what_adapters_beside_them_give(params: dict, adapters: dict) -> None:
    lora = Lora(adapters, CONFIG.scale)
    beside = loss_sum(params, TINY, ROWS, lora=lora)
    merged = merge(params, lora)
    np.testing.assert_allclose(loss_sum(merged, TINY, ROWS), beside, rtol=1e-5)
    assert abs(beside - loss_sum(params, TINY, ROWS)) > 1e-3 * beside
    changed = {
        path
        for path, leaf in flatten(params).items()
        if not np.array_equal(leaf, flatten(merged)[path])
    }
    assert changed == {
        "layers.attention.q_proj.kernel",
        "layers.attention.v_proj.kernel",
        "layers.mlp.down_proj.kernel",
    }


def test_gradient_of_adapters_is_that_of_the_merged_weights(params: dict, adapters: dict) -> None:
    gradient = jax.grad(lambda a: loss_sum(params, TINY, ROWS, lora=Lora(a, CONFIG.scale)))
    through_merge = jax.grad(lambda a: loss_sum(merge(params, Lora(a, CONFIG.scale)), TINY, ROWS))
    found, expected = (flatten(jax.jit(f)(adapters)) for f in (gradient, through_merge))
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=2e-5 * float(jnp.abs(leaf).max()))


def test_frozen_weights_cost_no_gradient(params: dict, adapters: dict) -> None:
    def flops(argnum: int) -> float:
        gradient = jax.grad(
            lambda p, a: loss_sum(p, TINY, ROWS, lora=Lora(a, CONFIG.scale)), argnums=argnum
        )
        return float(jax.jit(gradient).lower(params, adapters).compile().cost_analysis()["flops"])

    assert flops(1) < 0.8 * flops(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, "rank is 0"),
        ({"rank": 1, "alpha": 0.0}, "alpha is 0.0"),
        ({"rank": 1, "alpha": 1.0, "targets": ("q_proj", "wq")}, r"\['q_proj', 'wq'\]; name"),
        ({"rank": 1, "alpha": 1.0, "targets": ()}, "name one or more of q_proj"),
    ],
)
def test_a_config_without_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saved_adapters_come_back_bit_for_bit(adapters: dict, dtype, tmp_path: Path) -> None:
    lora = Lora(jax.tree.map(lambda leaf: leaf.astype(dtype), adapters), CONFIG.scale)
    save_peft(tmp_path / "new", lora, TINY, base_model="tiny")
    loaded = load_peft(tmp_path / "new", TINY)
    assert loaded.scale == lora.scale
    for path, leaf in flatten(lora.adapters).items():
        read = flatten(loaded.adapters)[path]
        assert read.dtype == dtype
        assert np.asarray(read).tobytes() == np.asarray(leaf).tobytes(), path
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        CONFIG_FILE,
        WEIGHTS_FILE,
    ]


def test_adapters_that_are_there_are_kept_unless_asked(adapters: dict, tmp_path: Path) -> None:
    save_peft(tmp_path, Lora(adapters, 2.0), TINY)
    with pytest.raises(FormatError, match="already holds adapter_config"):
        save_peft(tmp_path, Lora(adapters, 1.0), TINY)
    assert load_peft(tmp_path, TINY).scale == 2.0
    save_peft(tmp_path, Lora(adapters, 1.0), TINY, overwrite=True)
    assert load_peft(tmp_path, TINY).scale == 1.0


def test_an_adapter_of_peft_gives_pefts_logits() -> None:
    source = open_model(GOLDENS / "tiny" / "biases")
    golden = np.load(GOLDENS / "lora" / "logits.npz", allow_pickle=False)
    base = source.load_params(jnp.float32)
    merged = merge(base, load_peft(GOLDENS / "lora", source.config))
    logits = dense_logits(source, merged, golden["token_ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5)
    without = dense_logits(source, base, golden["token_ids"])
    assert np.abs(without - golden["logits"]).max() > 0.1


def test_saved_files_are_those_that_peft_writes(tmp_path: Path) -> None:
    config = open_model(GOLDENS / "tiny" / "biases").config
    save_peft(tmp_path, load_peft(GOLDENS / "lora", config), config)
    ours, theirs = (load_file(path / WEIGHTS_FILE) for path in (tmp_path, GOLDENS / "lora"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    ours, theirs = (
        json.loads((path / CONFIG_FILE).read_text()) for path in (tmp_path, GOLDENS / "lora")
    )
    assert sorted(theirs.pop("target_modules")) == ours.pop("target_modules")
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 0}, "r is 0"),
        ({"r": 5}, r"wrong shape: .*lora_A.weight is \(3, 32\), the model needs \(5, 32\)"),
        ({"lora_alpha": "7"}, "lora_alpha is '7'"),
    ],
)
def test_an_unsupported_setting_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDENS / "lora", tmp_path / "copy")
    fields = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(fields | change))
    with pytest.raises(FormatError, match=message):
        load_peft(folder, open_model(GOLDENS / "tiny" / "biases").config)


def test_rank_stabilised_adapters_have_their_own_scale(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDENS / "lora", tmp_path / "copy")
    fields = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(fields | {"use_rslora": True}))
    config = open_model(GOLDENS / "tiny" / "biases").config
    assert load_peft(folder, config).scale == 7 / 3**0.5
    assert load_peft(GOLDENS / "lora", config).scale == 7 / 3


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDENS / "lora", tmp_path / "copy")
    config = open_model(GOLDENS / "tiny" / "biases").config
    tensors = load_file(folder / WEIGHTS_FILE)
    lost = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    del tensors[lost]
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 32))
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(FormatError, match=f"missing: {lost}") as error:
        load_peft(folder, config)
    assert "unexpected: base_model.model.model.layers.9" in str(error.value)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(FormatError, match="pickled adapters are never read"):
        load_peft(folder, config)
