"""The model folder: written by training and conversion, read by the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten
from checkpoint.store import CorruptStep, Store, StoreError
from jaxserve import model_store
from models.checkpoint_model import (
    CHECKPOINTS,
    MODEL_FILE,
    open_stored_model,
    read_model_config,
    write_model_folder,
)
from models.config import ModelConfig, RopeScaling
from models.config_json import config_from_json, config_to_json
from models.loading import open_model
from models.model_path import split_step
from models.registry import get_family
from models.tokenizer import Tokenizer
from models.tokenizer_files import save_tokenizer

TINY = Path(__file__).parent.parent / "goldens" / "tiny"
VARIANTS = sorted(path.name for path in TINY.iterdir() if path.is_dir())
CONFIG = open_model(TINY / "biases").config


def write_run(folder: Path, *steps: int) -> dict[int, dict[str, np.ndarray]]:
    """A folder as training leaves it; returns the parameters of each step."""
    write_model_folder(folder, CONFIG, None)
    family = get_family(CONFIG.family)
    written = {}
    with Store(folder / CHECKPOINTS) as store:
        for step in steps:
            params = family.init_params(CONFIG, jax.random.key(step), jnp.float32)
            moments = jax.tree.map(lambda leaf: leaf * 2, params)
            store.save(step, {"params": params, "opt_state": {"mu": moments}}).wait()
            written[step] = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    return written


def assert_same(params: dict, expected: dict[str, np.ndarray]) -> None:
    loaded = flatten(params)
    assert loaded.keys() == expected.keys()
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_comes_back(variant: str, tmp_path: Path) -> None:
    config = open_model(TINY / variant).config
    write_model_folder(tmp_path, config, None)
    assert read_model_config(tmp_path) == config


def test_factors_and_several_ends_come_back() -> None:
    scaling = RopeScaling("factors", 1.0, factors=(1.0, 2.5))
    config = replace(CONFIG, rope_scaling=scaling, eos_token_ids=(2, 5), sliding_window=9)
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "257"}, "config.vocab_size cannot be '257'"),
        ({"num_heads": True}, "config.num_heads"),
        ({"rope_theta": float("nan")}, "config.rope_theta"),
        ({"rope_scaling": {"kind": "linear"}}, "config.rope_scaling lacks the field 'factor'"),
        ({"new_thing": 1}, "unknown field 'new_thing'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        config_from_json({**config_to_json(CONFIG), **change})


def test_the_newest_checkpoint_is_opened_and_any_other_by_its_step(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", 3, 10)
    source = open_model(tmp_path / "run")
    assert (source.name, source.config) == ("run", CONFIG)
    assert_same(source.load_params(jnp.float32), written[10])
    older = open_model(f"{tmp_path / 'run'}@3")
    assert older.name == "run"
    assert_same(older.load_params(jnp.float32), written[3])
    with pytest.raises(StoreError, match=r"no step 4; there are \[3, 10\]"):
        open_model(f"{tmp_path / 'run'}@4")


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", 3, 10)
    data = max(
        (tmp_path / "run" / CHECKPOINTS / "steps" / f"{10:012d}" / "arrays").rglob("*"),
        key=lambda path: path.stat().st_size if path.is_file() else 0,
    )
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    assert_same(open_model(tmp_path / "run").load_params(jnp.float32), written[3])
    with pytest.raises(CorruptStep):
        open_model(f"{tmp_path / 'run'}@10")


def test_layers_may_be_stored_one_by_one(tmp_path: Path) -> None:
    write_model_folder(tmp_path, CONFIG, None)
    params = get_family(CONFIG.family).init_params(CONFIG, jax.random.key(0), jnp.float32)
    layers = params["layers"]
    single = {
        str(layer): jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers)
        for layer in range(CONFIG.num_layers)
    }
    with Store(tmp_path / CHECKPOINTS) as store:
        store.save(0, {"params": {**params, "layers": single}}).wait()
    assert open_stored_model(tmp_path).convention == "own_unscanned"
    expected = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    assert_same(open_model(tmp_path).load_params(jnp.float32), expected)


def test_a_step_that_is_read_is_not_deleted(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3)
    opened = open_stored_model(tmp_path / "run")
    with Store(tmp_path / "run" / CHECKPOINTS) as store:
        store._delete_unless_read(3)
        assert store.steps() == [3]
        opened.step.close()
        store._delete_unless_read(3)
        assert store.steps() == []


def test_folders_that_hold_no_checkpoint_say_so(tmp_path: Path) -> None:
    write_model_folder(tmp_path, CONFIG, None)
    with pytest.raises(StoreError, match="holds no checkpoints"):
        open_model(tmp_path)
    with Store(tmp_path / CHECKPOINTS) as store:
        with pytest.raises(StoreError, match="nothing was saved"):
            open_model(tmp_path)
        store.save(0, {"other": np.zeros(3)}).wait()
    with pytest.raises(FormatError, match=r"holds no arrays params/"):
        open_model(tmp_path)
    with pytest.raises(FormatError, match="no step 3 to choose"):
        open_model(f"{TINY / 'mqa'}@3")


def test_a_folder_of_another_model_is_not_overwritten(tmp_path: Path) -> None:
    write_model_folder(tmp_path, CONFIG, None)
    write_model_folder(tmp_path, CONFIG, None)
    other: ModelConfig = replace(CONFIG, num_layers=3)
    with pytest.raises(FormatError, match="num_layers differ"):
        write_model_folder(tmp_path, other, None)
    (tmp_path / MODEL_FILE).write_text('{"format": "jaxserve-model-9", "config": {}}')
    with pytest.raises(FormatError, match="use the version that wrote it"):
        open_model(tmp_path)


def test_steps_are_cut_from_paths_that_do_not_exist(tmp_path: Path) -> None:
    assert split_step("runs/a@12") == (Path("runs/a"), 12)
    assert split_step("runs/a@b") == (Path("runs/a@b"), None)
    odd = tmp_path / "a@12"
    odd.mkdir()
    assert split_step(odd) == (odd, None)
    assert model_store.resolve(f"{odd}@7") == Path(f"{odd}@7")


@pytest.mark.real_model
def test_a_gguf_tokenizer_comes_back_identically(smollm2_path: Path, tmp_path: Path) -> None:
    original = open_model(smollm2_path).load_tokenizer()
    save_tokenizer(original, tmp_path)
    read = Tokenizer.from_folder(tmp_path)
    chat = [{"role": "user", "content": "Why is the sky blue? 1234 <|im_end|> \u00e9\n\n x"}]
    assert read.encode_chat(chat) == original.encode_chat(chat)
    ids = original.encode("  12 caf\u00e9 \U0001f600 <|im_start|> don't")
    assert read.encode("  12 caf\u00e9 \U0001f600 <|im_start|> don't") == ids
    assert read.decode(ids) == original.decode(ids)
    assert read.special_token_ids == original.special_token_ids
