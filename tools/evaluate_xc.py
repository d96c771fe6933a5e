"""Compares samplers, classifiers and baselines on a data set of extreme classification.

    python tools/evaluate_xc.py --data build/wordnet --out build/xc-study

runs what is missing of the plan, one JSON file a run in OUT/raw, and prints the tables. It can be
stopped at any moment and goes on with the same command. `jaxserve data xc wordnet-hypernyms --out
build/wordnet` makes the data set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxserve.engine.compilation import use_compilation_cache
from jaxserve.model_store import default_root
from jaxserve.xc.dataset import XcDataset
from tools.xc_study.baselines import run_baselines
from tools.xc_study.plan import Plan
from tools.xc_study.report import read_records, tables
from tools.xc_study.runs import run_classifiers, run_encoder

CLASSIFIED = "ngame"
"""The method whose encoders get classifiers."""
CLASSIFIERS = f"classifiers-{CLASSIFIED}"
BASELINES = "baselines"
PHASES = (
    ("random", "tas", "ngame", "ngame_centroid"),
    (CLASSIFIERS, "ance"),
    ("ngame_curriculum", "ngame_stale"),
)
"""What is run first, for all seeds, and what after it."""


def run_missing(plan: Plan, methods: list[str], num_seeds: int) -> None:
    """Runs what has no record yet, phase by phase and seed by seed."""
    for phase in PHASES:
        for seed in range(num_seeds):
            for method in phase:
                if method in methods:
                    _keep(plan, f"{method}-{seed}", partial(_run, plan, method, seed))
    if BASELINES in methods and not (plan.out / "raw" / "tfidf_10nn.json").is_file():
        for name, record in run_baselines(XcDataset(plan.data)).items():
            _keep(plan, name, partial(dict, record))


def _run(plan: Plan, method: str, seed: int) -> dict[str, Any]:
    if method == CLASSIFIERS:
        return run_classifiers(plan, CLASSIFIED, seed)
    return run_encoder(plan, method, seed)


def _keep(plan: Plan, name: str, run: Callable[[], dict[str, Any]]) -> None:
    path = plan.out / "raw" / f"{name}.json"
    if path.is_file():
        return
    print(f"== {name}", flush=True)
    record = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".new")
    staged.write_text(json.dumps(record, indent=1) + "\n")
    staged.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a prepared data set")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--classifier-epochs", type=int, default=20)
    parser.add_argument(
        "--evaluate-every", type=int, default=1, help="epochs between points of the curves"
    )
    parser.add_argument("--loss", choices=("triplet", "softmax"), default="triplet")
    every = [*(method for phase in PHASES for method in phase), BASELINES]
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    parser.add_argument("--report", action="store_true", help="only print the tables")
    options = parser.parse_args()
    use_compilation_cache(default_root() / "xla")
    num_points = XcDataset(options.data).split("train").labels.num_points
    plan = Plan(
        data=options.data,
        out=options.out,
        num_points=num_points,
        num_epochs=options.epochs,
        num_classifier_epochs=options.classifier_epochs,
        loss=options.loss,
        evaluate_every=options.evaluate_every,
    )
    if not options.report:
        run_missing(plan, options.methods, options.seeds)
    print(tables(read_records(plan.out / "raw")))


if __name__ == "__main__":
    main()
