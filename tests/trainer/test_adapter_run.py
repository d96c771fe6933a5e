"""A run that trains adapters is served, converted and exported as the model that it made."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.param_loading import flatten, unflatten
from checkpoint.store import StoreReader
from jaxserve.cli.checkpoint import export_adapter
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.live_weights import WeightsRefused
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.run_watcher import RunWatcher
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import RunningEngine, start_engine
from jaxserve.errors import ConfigError
from jaxserve.migration.convert import plan_reshard
from jaxserve.migration.diff import diff_models
from jaxserve.trained_model import open_model
from jaxserve.trainer.config import load_config
from jaxserve.trainer.errors import TrainConfigError
from jaxserve.trainer.run_folder import RunFolder
from jaxserve.trainer.run_model import write_run_model
from jaxserve.trainer.run_start import StartOptions, train
from models import loading
from models.checkpoint_model import CHECKPOINTS
from models.lora import Lora, merge
from models.lora_peft import load_peft
from models.ops.attention.dense import dense_attend
from tests.engine.tiny_model import make_tiny_model
from tests.migration.rig import convert
from tests.trainer.plain_view import PlainView

CONFIG = """
run_dir = "run"
total_steps = 4
compilation_cache_dir = "{cache}"
[model]
source = "base"
[lora]
rank = 4
alpha = 8.0
targets = ["q_proj", "down_proj"]
[data]
path = "{data}"
[batch]
global_batch_size = 4
num_logical_shards = 2
micro_batch_size = 2
[schedule]
kind = "constant"
peak_value = 0.1
[durability]
checkpoint_every = 2
[logging]
plot = false
"""
SCALE = 2.0
PROMPT = tuple(range(40, 60))
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, compilation_cache: Path
) -> Path:
    """With `base`, a model, and `run`, trained from it; it has the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("adapters")
    make_tiny_model(folder / "base")
    config = folder / "run.toml"
    config.write_text(CONFIG.format(cache=compilation_cache, data=tiny_data))
    loaded = load_config(config, [f"run_dir={folder / 'run'}"])
    assert train(loaded, StartOptions(), PlainView()) == 0
    return folder


def adapters(folder: Path, step: int) -> dict[str, Any]:
    arrays = StoreReader(folder / "run" / CHECKPOINTS).read_arrays(step)
    names = [name for name in arrays if name.startswith("params/")]
    return {name.removeprefix("params/").replace("/", "."): arrays[name] for name in names}


def merged(folder: Path, step: int = 4) -> Any:
    """The base with the adapters, in float32."""
    base = loading.open_model(folder / "base").load_params(jnp.float32)
    return merge(base, Lora(unflatten(adapters(folder, step)), SCALE))


def greedy(folder: Path, params: Any) -> list[int]:
    """What the model says, computed with no engine."""
    source = loading.open_model(folder / "base")
    family, config = source.family, source.config

    @jax.jit
    def best(params: Any, ids: jax.Array, last: int) -> jax.Array:
        positions = jnp.arange(ids.shape[0], dtype=jnp.int32)
        x = family.embed(params, config, ids)
        x, _ = family.run_layers(params, config, x, positions, (), dense_attend(config))
        return family.logits(params, config, x)[last].argmax()

    row = np.zeros(len(PROMPT) + NUM_TOKENS, np.int32)
    row[: len(PROMPT)] = PROMPT
    for end in range(len(PROMPT), len(row)):
        row[end] = int(best(params, row, end - 1))
    return row[len(PROMPT) :].tolist()


def answer(running: RunningEngine, name: str) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    request = GenerationRequest(name, PROMPT, sampling)
    (completion,) = complete_in_order(running.engine, [request], max_ahead=1)
    return list(completion.token_ids)


def test_it_is_served_as_the_model_that_it_made(folder: Path, compilation_cache: Path) -> None:
    base = loading.open_model(folder / "base").load_params(jnp.float32)
    expected = {step: greedy(folder, merged(folder, step)) for step in (2, 4)}
    assert greedy(folder, base) != expected[2] != expected[4]
    running = start_engine(
        EngineConfig(
            model=str(folder / "run"),
            dtype="float32",
            token_budget=8,
            buckets="one",
            max_num_seqs=6,
            page_size=4,
            compilation_cache_dir=compilation_cache,
        )
    )
    try:
        assert running.weights.name == "run@4"
        assert answer(running, "newest") == expected[4]
        assert not RunWatcher(running.weights, folder / "run", 1.0).look()
        running.weights.swap(Path(f"{folder / 'run'}@2"))
        assert running.weights.name == "run@2"
        assert answer(running, "older") == expected[2]
        (folder / "base").rename(folder / "elsewhere")
        with pytest.raises(WeightsRefused, match="which is not there"):
            running.weights.swap(folder / "run")
        (folder / "elsewhere").rename(folder / "base")
        assert RunWatcher(running.weights, folder / "run", 1.0).look()
    finally:
        running.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_weights_are_sums_rounded_once(folder: Path, dtype: str) -> None:
    expected = flatten(merged(folder))
    found = flatten(open_model(folder / "run").load_params(dtype))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path].astype(dtype), err_msg=path)


def test_it_is_converted_and_its_adapters_are_exported(folder: Path, tmp_path: Path) -> None:
    convert(folder / "run", tmp_path / "wide", "safetensors", dtype="float32")
    assert (tmp_path / "wide" / "tokenizer.json").is_file()
    expected = flatten(merged(folder))
    for path, leaf in flatten(loading.open_model(tmp_path / "wide").load_params("float32")).items():
        # One float32 product more or less: a rounding of the sum's last place.
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-7, err_msg=path)
    convert(folder / "run", tmp_path / "hf", "safetensors")
    assert diff_models(folder / "run", tmp_path / "hf").is_equal
    assert not diff_models(folder / "run", folder / "base").is_equal

    export_adapter(f"{folder / 'run'}@2", tmp_path / "adapter")
    exported = load_peft(tmp_path / "adapter", loading.open_model(folder / "base").config)
    assert exported.scale == SCALE
    trained = adapters(folder, 2)
    assert flatten(exported.adapters).keys() == trained.keys()
    for name, leaf in flatten(exported.adapters).items():
        np.testing.assert_array_equal(leaf, trained[name], err_msg=name)
    with pytest.raises(ConfigError, match="has no adapters"):
        export_adapter(str(folder / "base"), tmp_path / "none")
    with pytest.raises(ConfigError, match="is a run of adapters itself"):
        convert(folder / "run", tmp_path / "x", "safetensors", lora=tmp_path / "adapter")
    with (
        pytest.raises(ConfigError, match="reshard keeps all"),
        plan_reshard(
            folder / "run", tmp_path / "x", layers="scanned", num_workers=1, memory_bytes=None
        ),
    ):
        pass


def test_training_from_it_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = [f"model.source={folder / 'run'}", f"run_dir={tmp_path / 'next'}"]
    config = load_config(folder / "run.toml", settings)
    with pytest.raises(TrainConfigError, match=r"model\.source is .*/run, a run whose"):
        write_run_model(config, RunFolder(tmp_path / "next"))
    assert not (tmp_path / "next").exists()


def moved(folder: Path, tmp_path: Path) -> Path:
    """A copy of both; the copied run's base is the copied one."""
    for name in ("base", "run"):
        shutil.copytree(folder / name, tmp_path / name)
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(folder / "base"), str(tmp_path / "base")))
    return tmp_path / "run"


def test_a_base_that_is_missing_or_another_is_refused(folder: Path, tmp_path: Path) -> None:
    run = moved(folder, tmp_path)
    assert open_model(run).path == tmp_path / "base"
    config = run / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("rank = 4", "rank = 5"))
    with pytest.raises(ConfigError, match=r"q_proj\.a is \(2, 32, 4\), .* needs \(2, 32, 5\)"):
        open_model(run)
    config.write_text(re.sub(r"\[lora\][^\[]*\[[^\]]*\]\n", "", text))
    with pytest.raises(ConfigError, match=r"has no \[lora\] with a model.source"):
        open_model(run)
    config.write_text(text)
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{tmp_path / 'base'}, but its files are not those"):
        open_model(run)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'base'}, which is not there"):
        open_model(run)
