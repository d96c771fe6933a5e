"""Device memory of a step against its number of points, with and without mined negatives.

    python tools/bench_xc_memory.py                          # a bag of embeddings, as in the study
    python tools/bench_xc_memory.py --encoder all-minilm-l6-v2

compiles steps of `ngame` (2S texts), `ngame_centroid` (2S + 320) and `ance` (3S) and prints what
XLA says that they need: temporaries and arguments. Nothing is run, so any size can be asked for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxserve.model_store import resolve
from jaxserve.xc.config import LossConfig
from jaxserve.xc.encoders import EncoderSpec
from models.bag_of_embeddings import BagConfig
from models.encoder_loading import open_encoder
from tools.xc_study.memory import step_bytes
from tools.xc_study.plan import NUM_MINED

VOCAB_SIZE = 30522
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", help="a transformer; without it, a bag of embeddings")
    parser.add_argument("--points", type=int, nargs="+", default=[2**n for n in range(8, 14)])
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--loss", choices=("triplet", "softmax"), default="triplet")
    options = parser.parse_args()
    loss = LossConfig(name=options.loss)
    if options.encoder is None:
        bag = BagConfig(vocab_size=VOCAB_SIZE, width=96, hidden=192)
        encoder = EncoderSpec(bag, options.max_tokens)
    else:
        config = open_encoder(resolve(options.encoder)).config
        encoder = EncoderSpec(config, options.max_tokens, (0,), (0,))
    print("| points S | ngame MiB | ngame_centroid MiB | ance MiB | ance / ngame |")
    print("|---|---|---|---|---|")
    for num_points in options.points:
        plain, centroid, ance = (
            step_bytes(encoder, loss, num_points, num_extra)
            for num_extra in (0, NUM_MINED, num_points)
        )
        sizes = " | ".join(f"{one / MIB:.0f}" for one in (plain, centroid, ance))
        print(f"| {num_points} | {sizes} | {ance / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
