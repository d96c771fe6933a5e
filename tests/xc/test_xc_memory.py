"""Memory of a step by XLA's own account: mined labels cost what they should, and no more."""

from __future__ import annotations

from jaxserve.xc.config import LossConfig
from jaxserve.xc.encoders import EncoderSpec
from models.bag_of_embeddings import BagConfig
from tools.xc_study.memory import step_bytes

ENCODER = EncoderSpec(BagConfig(vocab_size=64, width=64, hidden=128), max_tokens=32)
LOSS = LossConfig(name="softmax")


def test_a_hard_label_a_point_needs_at_least_a_third_more() -> None:
    assert 1.3 <= step_bytes(ENCODER, LOSS, 256, 256) / step_bytes(ENCODER, LOSS, 256, 0) <= 2.1
