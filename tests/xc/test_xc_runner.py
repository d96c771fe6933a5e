"""A tiny run of both stages: it learns, starts where it says, and stops when it collapses."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.errors import FormatError
from checkpoint.store import Store
from jaxserve.errors import ConfigError
from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.dry_run import plan_of
from jaxserve.trainer.errors import TrainConfigError
from jaxserve.trainer.run_identity import make_world
from jaxserve.trainer.xc_runner import XcRunner, make_xc_runner
from jaxserve.xc import metrics
from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.errors import EncoderCollapsed
from jaxserve.xc.evaluation import fuse, measure, without_excluded
from jaxserve.xc.label_sets import is_repeat
from jaxserve.xc.losses import encoder_losses
from jaxserve.xc.model_folder import open_xc_model
from jaxserve.xc.retrieval import retrieve
from tests.xc.tiny_xc import tiny_dataset
from tests.xc.xc_rig import state_of, stored_run, tiny_config, tiny_runner

ONE_LEAF = ("batch.num_logical_shards=1", "batch.micro_batch_size=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xc")
    tiny_dataset(path)
    return path


def _ranking(runner: XcRunner, split: str) -> np.ndarray:
    points, labels = runner.task.embeddings(runner._state.params(), split)
    return retrieve(points, labels, 10)[1]


def _precision(runner: XcRunner, split: str, k: int = 2) -> float:
    truth = XcDataset(runner.task._dataset.folder).split(split).labels
    return metrics.precision(truth, _ranking(runner, split), k)


def test_it_learns(folder: Path) -> None:
    runner = tiny_runner(tiny_config(folder, *ONE_LEAF))
    runner.load_state(None)
    before = _precision(runner, "train")
    losses = [float(runner.run_step(step).loss) for step in range(24)]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    assert _precision(runner, "train") > before + 0.1
    found = runner.evaluate()
    assert found.num_examples == len(XcDataset(folder / "xc").split("validation").texts)
    assert found.loss == pytest.approx(1 - _precision(runner, "validation", 1))


def test_the_gradient_is_that_of_one_program_over_the_batch(folder: Path) -> None:
    """Embeddings are cached and pulled back leaf by leaf; one big program says the same."""
    config = tiny_config(folder, "batch.num_logical_shards=4", "batch.micro_batch_size=4")
    runner = tiny_runner(config)
    runner.load_state(None)
    task = runner.task
    params = runner._state.params()
    done = task.step(params, runner._state.task_arrays, 0, None)
    order, spec, train = task._order, task._spec, task._train  # type: ignore[attr-defined]
    draw = order.sampler.draw(order.state, done.ids, 0)
    points = jnp.asarray(spec.pack(train.texts, draw.ids))
    labels = jnp.asarray(spec.pack(task._labels, draw.positives))  # type: ignore[attr-defined]
    excluded = train.labels.contains(draw.ids, draw.positives) | is_repeat(draw.positives)
    assert is_repeat(draw.positives).any()

    def loss_of(tree: dict) -> jax.Array:
        losses = encoder_losses(
            config.xc.loss, spec.embed(tree, points), spec.embed(tree, labels), excluded
        )
        return losses.mean()

    loss, gradient = jax.value_and_grad(loss_of)(params[0])
    assert float(done.gradients[1][0].sum()) == pytest.approx(float(loss), rel=1e-5)
    flat = np.asarray(done.gradients[0][0]).reshape(-1)
    offset = task.flat.offsets["embed"]
    size = gradient["embed"].size
    found = flat[offset : offset + size].reshape(gradient["embed"].shape)
    assert np.abs(gradient["embed"]).max() > 1e-3
    np.testing.assert_allclose(found, gradient["embed"], atol=1e-6)


def test_clusters_of_one_point_train_as_random_batches_bit_for_bit(folder: Path) -> None:
    states = []
    for name, size in (("random", 64), ("ngame", 1)):
        settings = (f"xc.sampler.name='{name}'", f"xc.sampler.cluster_size={size}")
        runner = tiny_runner(tiny_config(folder, *ONE_LEAF, *settings))
        runner.load_state(None)
        for step in range(9):
            record = runner.run_step(step)
        states.append((record.loss, record.params_digest))
    assert states[0] == states[1]


def test_mined_labels_that_micro_batches_cannot_share_are_named(folder: Path) -> None:
    settings = ("xc.sampler.name='ngame_centroid'", "xc.sampler.num_mined=8")
    with pytest.raises(ConfigError, match="num_mined is 8; it must be a multiple of the 16"):
        tiny_runner(tiny_config(folder, *settings))


def test_a_collapsed_run_ends_with_what_to_do(folder: Path) -> None:
    settings = ("xc.collapse_steps=3", "xc.encoder.width=1", "xc.sampler.name='random'")
    runner = tiny_runner(tiny_config(folder, *ONE_LEAF, *settings, "xc.loss.margin=1e-4"))
    runner.load_state(None)
    # In one dimension embeddings are 1 or -1: nearly all hinges are 0, the margin or about 2.
    params = runner._state.params()[0]
    same = jax.tree.map(jnp.ones_like, params)
    runner._state.load(runner._state.initial_buffer(same))
    for step in range(2):
        runner.run_step(step)
    with pytest.raises(EncoderCollapsed, match=r'xc\.loss\.name = "softmax"'):
        runner.run_step(2)


def test_classifiers_begin_as_the_labels_embeddings(folder: Path, tmp_path: Path) -> None:
    encoder = tiny_runner(tiny_config(folder, *ONE_LEAF))
    encoder.load_state(None)
    for step in range(10):
        encoder.run_step(step)
    runner, config = _classifiers(folder, tmp_path, encoder)
    runner.load_state(None)
    assert _ranking(runner, "test").tolist() == _ranking(encoder, "test").tolist()
    before = encoder._state.params()[0]
    losses = [float(runner.run_step(step).loss) for step in range(12)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    frozen = runner.task._encoders[0]  # type: ignore[attr-defined]
    for name in ("embed",):
        assert np.asarray(frozen[name]).tobytes() == np.asarray(before[name]).tobytes()
    assert config.xc.stage == "classifiers"


def _classifiers(folder: Path, tmp_path: Path, encoder: XcRunner) -> tuple[XcRunner, TrainConfig]:
    """A runner of the second stage on an encoder's newest state, kept as a run keeps it."""
    run = stored_run(tmp_path / "encoder", tiny_config(folder, *ONE_LEAF), encoder)
    settings = ("xc.stage='classifiers'", f"xc.encoder_run='{run}'")
    config = tiny_config(folder, *ONE_LEAF, *settings)
    return make_xc_runner(config, make_world(config), jax.devices()[:1])[0], config


def test_fusion_and_measures_of_stored_runs(folder: Path, tmp_path: Path) -> None:
    encoder = tiny_runner(tiny_config(folder, *ONE_LEAF))
    encoder.load_state(None)
    for step in range(6):
        encoder.run_step(step)
    runner, config = _classifiers(folder, tmp_path, encoder)
    runner.load_state(None)
    for step in range(6):
        runner.run_step(step)
    dataset = XcDataset(folder / "xc")
    model = open_xc_model(stored_run(tmp_path / "labels", config, runner))
    fusion = fuse(model, dataset)
    assert fusion.tried[fusion.weight] == max(fusion.tried.values())
    assert fusion.tried[0.0] == pytest.approx(100 * _precision(runner, "validation", 1))
    assert measure(model, dataset, "test")["P@3"] == pytest.approx(
        100 * _precision(runner, "test", 3)
    )
    plain = open_xc_model(tmp_path / "encoder")
    found = measure(plain, dataset, "test")["P@3"]
    assert found == pytest.approx(100 * _precision(encoder, "test", 3))
    # Classifiers of an encoder that is no longer what it was are refused.
    encoder.run_step(6)
    with Store(tmp_path / "encoder" / "checkpoints") as store:
        store.save(11, encoder.layout.tree(state_of(encoder))).wait()
    with pytest.raises(FormatError, match="classifiers of another encoder"):
        measure(model, dataset, "test")


def test_a_plan_without_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainConfigError, match="--dry-run: there is no plan for task"):
        plan_of(tiny_config(tmp_path))


def test_excluded_pairs_leave_rankings() -> None:
    ranked = np.array([[3, 1, 2], [1, 3, 0]], np.int32)
    excluded = np.array([[0, 1], [1, 2], [1, 1]], np.int32)
    assert without_excluded(ranked, excluded).tolist() == [[3, 2, -1], [3, 0, -1]]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("numerics.dropout=0.1", "numerics.dropout is 0.1"),
        ("numerics.mode=ordered", "numerics.mode is 'ordered'"),
        ("numerics.compute_dtype=bfloat16", "numerics.compute_dtype is 'bfloat16'"),
        ("numerics.param_dtype=bfloat16", "numerics.param_dtype is 'bfloat16'"),
        ("numerics.replay_every=4", "numerics.replay_every is 4"),
        ("numerics.remat=full", "numerics.remat is 'full'"),
        ("data.log_reads=true", "data.log_reads is True"),
        ("lora={rank = 4, alpha = 8.0}", "knows only None"),
        ("incidents.policy=rollback", "incidents.policy is 'rollback'"),
        ("schedule={kind = 'auto', initial_lr = 0.1}", "rate that tunes itself"),
        ("task=causal_lm", r"needs a table \[model\]"),
        ("xc.stage=classifiers", "encoder_run is None"),
        ("xc.encoder.kind=bert", "needs source"),
        ("xc.sampler.nme=ance", "did you mean xc.sampler.name"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, setting: str, said: str) -> None:
    with pytest.raises(TrainConfigError, match=said):
        tiny_config(tmp_path, setting)
