"""A small data set of extreme classification, and a tokenizer of its words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from jaxserve.xc.dataset import Origin, XcDataset, write_dataset
from jaxserve.xc.raw_data import Point, RawData, split_points
from models.tokenizer import Tokenizer

NUM_TOPICS = 24
WORDS_A_TOPIC = 4
ORIGIN = Origin(name="tiny", package="made here", sha256=None, licence="none")


def tiny_tokenizer() -> Tokenizer:
    """One token a word, from 1 on; 0 is the unknown word."""
    words = [f"w{topic}x{place}" for topic in range(NUM_TOPICS) for place in range(WORDS_A_TOPIC)]
    vocabulary = {"[UNK]": 0} | {word: number for number, word in enumerate(words, 1)}
    backend = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return Tokenizer(backend)


def tiny_raw(num_points: int = 160) -> RawData:
    """Texts of words of their one or two topics; a topic is a label, and so is its pair."""
    rng = np.random.default_rng(0)
    points = []
    for number in range(num_points):
        topics = rng.choice(NUM_TOPICS, 1 + number % 2, replace=False)
        words = [f"w{topic}x{rng.integers(WORDS_A_TOPIC)}" for topic in topics for _ in range(3)]
        labels = dict.fromkeys(name for t in topics for name in (f"t{t:02}", f"p{t // 2:02}"))
        points.append(Point(f"point-{number}", " ".join(words), tuple(labels)))
    texts = {f"t{topic:02}": f"w{topic}x0 w{topic}x1" for topic in range(NUM_TOPICS)}
    texts |= {f"p{pair:02}": f"w{2 * pair}x2 w{2 * pair + 1}x3" for pair in range(NUM_TOPICS // 2)}
    return split_points(points, texts)


def tiny_dataset(folder: Path, num_points: int = 160) -> XcDataset:
    """Written to `folder`/xc."""
    return write_dataset(folder / "xc", tiny_raw(num_points), ORIGIN, tiny_tokenizer(), 6)
