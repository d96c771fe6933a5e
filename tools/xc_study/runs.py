"""One run: training, its curve, and the measures of its test ranking, as a JSON record."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.run_identity import make_world
from jaxserve.trainer.shard_gradient import named_leaves, nested
from jaxserve.trainer.xc_runner import XcRunner, build_runner
from jaxserve.xc import metrics
from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.encoders import spec_of
from jaxserve.xc.evaluation import NUM_RANKED, choose_fusion
from jaxserve.xc.retrieval import retrieve
from tools.xc_study.plan import NUM_ENCODES, Plan

Floats = npt.NDArray[np.float32]


def run_encoder(plan: Plan, method: str, seed: int) -> dict[str, Any]:
    """Trains an encoder, and keeps its parameters in `encoder_folder`."""
    config, dataset = plan.encoder_config(method, seed), XcDataset(plan.data)
    assert config.xc is not None
    spec = spec_of(config.xc.encoder, dataset)
    runner = build_runner(config, make_world(config), jax.devices()[:1], None, dataset, spec, None)
    record = _train(runner, config.total_steps, plan, config.batch.global_batch_size)
    points, labels = (np.asarray(one) for one in runner.task.embeddings(runner.params(), "test"))
    record |= measured(dataset, retrieve(points, labels, NUM_RANKED)[1])
    folder = encoder_folder(plan, method, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, leaf in named_leaves(runner.params()[0]).items():
        np.save(folder / f"{name.replace('/', '.')}.npy", np.asarray(leaf), allow_pickle=False)
    return record | {"kind": "encoder", "method": method, "seed": seed}


def run_classifiers(plan: Plan, method: str, seed: int) -> dict[str, Any]:
    """Trains label classifiers on the encoder of `method`; chooses the fusion on validation."""
    dataset = XcDataset(plan.data)
    spec = spec_of(plan.encoder_config(method, seed).xc.encoder, dataset)  # type: ignore[union-attr]
    encoder = nested(
        {
            path.stem.replace(".", "/"): np.load(path, allow_pickle=False)
            for path in encoder_folder(plan, method, seed).glob("*.npy")
        }
    )
    config = plan.classifier_config(seed)
    runner = build_runner(
        config, make_world(config), jax.devices()[:1], None, dataset, spec, encoder
    )
    runner.load_state(None)
    begun = _embedded(runner)
    before = measured(dataset, retrieve(begun["test"], begun["labels"], NUM_RANKED)[1])
    record = _train(runner, config.total_steps, plan, config.batch.global_batch_size)
    ended = _embedded(runner)
    record |= measured(dataset, retrieve(ended["test"], ended["labels"], NUM_RANKED)[1])
    truth = dataset.split("validation").labels
    fusion = choose_fusion(truth, ended["validation"], ended["labels"], begun["labels"])
    fused = ended["labels"] + np.float32(fusion.weight) * begun["labels"]
    return record | {
        "kind": "classifiers",
        "method": method,
        "seed": seed,
        "at_start": before["measures"],
        "fusion_weight": fusion.weight,
        "fusion_tried": {str(weight): value for weight, value in fusion.tried.items()},
        "fused": measured(dataset, retrieve(ended["test"], fused, NUM_RANKED)[1])["measures"],
    }


def encoder_folder(plan: Plan, method: str, seed: int) -> Path:
    """Where a run's encoder is kept."""
    return plan.out / "encoders" / f"{method}-{seed}"


def _train(runner: XcRunner, num_steps: int, plan: Plan, batch_size: int) -> dict[str, Any]:
    """Trains to the end, with P@1 on validation now and then. Evaluations are not timed."""
    runner.load_state(None)
    curve, train_s, mining_s, losses = [], 0.0, 0.0, []
    between = plan.evaluate_every * plan.num_points / batch_size
    due = between
    for step in range(num_steps):
        begin_s = time.perf_counter()
        record = runner.run_step(step)
        train_s += time.perf_counter() - begin_s
        mining_s += record.data_wait_s
        losses.append(float(record.loss))
        if step + 1 >= due or step + 1 == num_steps:
            due += between
            precision = 100 * (1 - float(runner.evaluate().loss))
            curve.append(
                {
                    "step": step + 1,
                    "encodes": (step + 1) * NUM_ENCODES,
                    "train_s": round(train_s, 2),
                    "mining_s": round(mining_s, 2),
                    "loss": round(float(np.mean(losses[-50:])), 5),
                    "validation_P@1": round(precision, 3),
                }
            )
            print(json.dumps(curve[-1]), flush=True)
    return {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "train_s": round(train_s, 2),
        "mining_s": round(mining_s, 2),
        "curve": curve,
    }


def _embedded(runner: XcRunner) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    for split in ("validation", "test"):
        points, labels = runner.task.embeddings(runner.params(), split)
        found |= {split: np.asarray(points), "labels": np.asarray(labels)}
    return found


def measured(dataset: XcDataset, ranked: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Measures of a test ranking, and for each point whether its first label is right."""
    train, test = dataset.split("train").labels, dataset.split("test").labels
    found = metrics.report(test, ranked, train.label_counts(), train.num_points)
    bits = np.packbits(test.hits(ranked[:, :1])[:, 0])
    return {
        "measures": {name: round(value, 3) for name, value in found.items()},
        "right_at_1": base64.b64encode(bits.tobytes()).decode(),
        "num_test": test.num_points,
    }
