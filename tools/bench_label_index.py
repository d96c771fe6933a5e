"""What an index of labels finds, how long it takes to make, and from what size on it is faster.

    python tools/bench_label_index.py --data build/wordnet --labels 18273 130000 500000

Labels are the embeddings of a data set's labels, then of its training points, by the encoder that
training begins with; beyond those, copies of them with noise of a length of `NOISE`. Texts are its
validation points, one at a time, as a server has them. Prints a line of JSON for each size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.xc.config import EncoderConfig
from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.encoders import initial_params, spec_of
from jaxserve.xc.evaluation import embed, index_recall
from jaxserve.xc.label_index import IndexSettings, LabelIndex
from jaxserve.xc.retrieval import top_labels
from tools.xc_study.plan import ENCODER_SOURCE

NOISE = 0.5
NUM_RANKED = 100
NUM_QUERIES = 1000
NUM_TIMED = 50

Floats = npt.NDArray[np.float32]


def vectors_of(dataset: XcDataset, width: int, num_labels: int) -> tuple[Floats, Floats]:
    """Labels float32[num_labels, width] and texts float32[NUM_QUERIES, width], of length one."""
    config = EncoderConfig(source=ENCODER_SOURCE, width=width)
    spec = spec_of(config, dataset)
    params = initial_params(config, spec, 0)
    sources = (dataset.labels(), dataset.split("train").texts)
    real = np.concatenate([embed(spec, params, texts) for texts in sources])
    rng = np.random.default_rng(0)
    noisy = real[rng.integers(0, len(real), max(num_labels - len(real), 0))]
    noise = rng.standard_normal(noisy.shape, np.float32)
    noisy += NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    texts = embed(spec, params, dataset.split("validation").texts)[:NUM_QUERIES]
    return np.concatenate([real, noisy])[:num_labels], texts


def median_ms(search: Callable[[Floats], Any], queries: Floats) -> float:
    """Of a search of one text; the first call, which compiles, left out."""
    search(queries[:1])
    milliseconds = []
    for number in range(1, NUM_TIMED + 1):
        begin_s = time.perf_counter()
        search(queries[number : number + 1])
        milliseconds.append(1e3 * (time.perf_counter() - begin_s))
    return float(np.median(milliseconds))


def measured(labels: Floats, queries: Floats, settings: IndexSettings) -> dict[str, Any]:
    """Of one size."""
    begin_s = time.perf_counter()
    index = LabelIndex.build(labels, settings)
    build_s = time.perf_counter() - begin_s
    on_device = jnp.asarray(labels)
    rounds = [
        (
            median_ms(lambda one: np.asarray(top_labels(one, on_device, k=NUM_RANKED)[1]), queries),
            median_ms(lambda one: index.search(one, NUM_RANKED), queries),
        )
        for _ in range(3)
    ]
    exact_ms, index_ms = np.median(rounds, axis=0)
    return {
        "labels": labels.shape[0],
        "width": labels.shape[1],
        "build_s": round(build_s, 1),
        "exact_ms": round(float(exact_ms), 2),
        "index_ms": round(float(index_ms), 2),
        "rounds_ms": np.round(rounds, 2).tolist(),
        f"recall@{NUM_RANKED}": round(index_recall(index, queries, labels, NUM_RANKED), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a prepared data set")
    parser.add_argument("--labels", type=int, nargs="+", default=[18_000, 100_000])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--num-links", type=int, default=IndexSettings.num_links)
    parser.add_argument("--build-width", type=int, default=IndexSettings.build_width)
    parser.add_argument("--search-width", type=int, default=IndexSettings.search_width)
    options = parser.parse_args()
    settings = IndexSettings(
        num_links=options.num_links,
        build_width=options.build_width,
        search_width=options.search_width,
    )
    dataset = XcDataset(options.data)
    for num_labels in options.labels:
        labels, queries = vectors_of(dataset, options.width, num_labels)
        print(json.dumps(measured(labels, queries, settings)), flush=True)


if __name__ == "__main__":
    main()
