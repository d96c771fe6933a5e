"""The digest of the model that adapters belong to."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from checkpoint.store import Store
from checkpoint.store.layout import StoreLayout
from jaxserve.trainer.base_digest import base_digest
from models.checkpoint_model import CHECKPOINTS, write_model_folder
from models.loading import open_model
from tests.engine.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("base")
    model = open_model(make_tiny_model(folder / "hf"))
    write_model_folder(folder / "run", model.config, None)
    params = model.load_params("float32")
    with Store(folder / "run" / CHECKPOINTS) as store:
        for step in (1, 2):
            params["embed"] = params["embed"] + np.float32(step)
            store.save(step, {"params": params}).wait()
    return folder / "run"


def digest(name: str | Path) -> str:
    return base_digest(open_model(name))


def test_every_checkpoint_has_its_own(run: Path) -> None:
    nothing = hashlib.sha256().hexdigest()
    assert len({digest(f"{run}@1"), digest(f"{run}@2"), nothing}) == 3
    assert digest(run) == digest(f"{run}@2")


def test_it_does_not_depend_on_the_place_or_on_what_the_run_does_next(
    run: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    (moved / "ledger.jsonl").write_text("{}\n")
    shutil.rmtree(StoreLayout(moved / CHECKPOINTS).step(2))
    assert digest(f"{moved}@1") == digest(moved) == digest(f"{run}@1")


def test_one_changed_byte_of_a_folder_is_seen(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "hf")
    before = digest(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "x"}))
    assert digest(folder) != before
