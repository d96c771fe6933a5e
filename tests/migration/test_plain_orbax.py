"""Checkpoints that Orbax wrote by itself are sources, given their config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rig import TINY, convert, model_files

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.migration.verify import Verdict, verify_model
from models.loading import open_model


def save_with_orbax(folder: Path, tree: dict[str, Any], *, is_managed: bool = False) -> Path:
    """As a program of Flax and Orbax saves; returns what it would call its checkpoint."""
    import orbax.checkpoint as ocp

    if is_managed:
        with ocp.CheckpointManager(folder.absolute()) as manager:
            manager.save(7, args=ocp.args.StandardSave(tree))
        return folder / "7"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step with an optimizer's counter beside the parameters."""
    params = open_model(TINY / "mqa").load_params(jnp.bfloat16)
    tree = {"params": params, "step": jnp.asarray(7, jnp.int32)}
    return save_with_orbax(tmp_path_factory.mktemp("orbax") / "run", tree, is_managed=True)


def test_it_becomes_the_model_that_it_was_made_of(saved: Path, tmp_path: Path) -> None:
    convert(saved, tmp_path / "own", "orbax", config=TINY / "mqa")
    assert verify_model(tmp_path / "own").verdict is Verdict.VERIFIED
    convert(tmp_path / "own", tmp_path / "back", "safetensors")
    convert(saved, tmp_path / "direct", "safetensors", config=TINY / "mqa")
    for made in ("back", "direct"):
        ours = flatten(open_model(tmp_path / made).load_params(jnp.bfloat16))
        for path, leaf in flatten(open_model(TINY / "mqa").load_params(jnp.bfloat16)).items():
            np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(leaf), err_msg=path)
        config = model_files(tmp_path / made)["config.json"]
        assert config == (TINY / "mqa" / "config.json").read_bytes()


def test_bare_folders_and_a_config_of_ours_will_do(tmp_path: Path) -> None:
    params = open_model(TINY / "tied").load_params(jnp.float32)
    saved = save_with_orbax(tmp_path / "saved", {"params": params})
    convert(TINY / "tied", tmp_path / "own", "orbax")
    convert(saved, tmp_path / "again", "orbax", config=tmp_path / "own", dtype="bfloat16")
    assert open_model(tmp_path / "again").config == open_model(TINY / "tied").config


def test_without_a_config_it_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Orbax wrote by itself.*--config FOLDER"):
        convert(saved, tmp_path / "own", "orbax")
    with pytest.raises(ConfigError, match="has its own"):
        convert(TINY / "mqa", tmp_path / "own", "orbax", config=TINY / "mqa")
    with pytest.raises(JaxserveError, match="missing: layers"):
        convert(saved, tmp_path / "own", "orbax", config=TINY / "biases")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["not JSON", "no tree", "strange name", "missing array", "link"])
def test_damaged_and_hostile_ones_are_refused(kind: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy") / "default"
    metadata = json.loads((folder / "_METADATA").read_text())
    tree = metadata["tree_metadata"]
    first = next(iter(tree.values()))
    match kind:
        case "not JSON":
            metadata = "{"
        case "no tree":
            del metadata["tree_metadata"]
        case "strange name":
            first["key_metadata"][-1]["key"] = "../../outside"
        case "missing array":
            tree["('params', 'new')"] = first | {
                "key_metadata": [{"key": "params", "key_type": 2}, {"key": "new", "key_type": 2}]
            }
        case "link":
            (folder / "d" / "more").symlink_to("/etc/passwd")
    (folder / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(FormatError):
        convert(tmp_path / "copy", tmp_path / "own", "orbax", config=TINY / "mqa")
    assert not (tmp_path / "own").exists()
