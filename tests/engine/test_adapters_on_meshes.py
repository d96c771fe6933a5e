"""Adapters on a mesh are divided as their projections are: the tokens of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.loading import open_model
from tests.models.tiny_adapters import random_lora, write_adapter
from tests.server.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
QUICK_COMPILATION = "--xla_backend_optimization_level=0"


@pytest.mark.long
def test_meshes_give_the_tokens_of_one_device(tmp_path: Path, compilation_cache: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    config = open_model(model).config
    adapters = [
        write_adapter(tmp_path / str(seed), random_lora(config, seed), config) for seed in range(2)
    ]
    meshes = ("data=1", "tensor=4", "data=2,stage=2")
    command = [sys.executable, "-m", "tests.engine.adapter_mesh_run", str(model)]
    command += [*map(str, adapters), str(compilation_cache), *meshes]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_COMPILATION}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len({tuple(ids) for ids in found["data=1"]}) == 3
    for mesh in meshes[1:]:
        assert found[mesh] == found["data=1"], mesh
