"""open_model reads the config at once and says what is wrong with a path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten
from models.loading import open_model

TINY = Path(__file__).parent.parent / "goldens" / "tiny"


def test_a_folder_is_opened_by_its_config() -> None:
    source = open_model(TINY / "biases")
    assert source.name == "biases"
    assert source.config.hidden_size == 32
    assert source.convention == "hf"
    params = source.load_params(jnp.bfloat16)
    assert {leaf.dtype for leaf in flatten(params).values()} == {jnp.dtype(jnp.bfloat16)}


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
