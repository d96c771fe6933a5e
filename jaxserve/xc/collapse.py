"""When training has collapsed: all texts get the same embedding, and nothing is learnt any more."""

from __future__ import annotations

from jaxserve.xc.config import XcSection
from jaxserve.xc.errors import EncoderCollapsed

MARGIN_TOLERANCE = 0.02
MIN_SPREAD = 0.02


def collapsed_steps(config: XcSection, count: int, loss: float, spread: float) -> int:
    """How many steps in a row have looked collapsed, with this one.

    A step does if the embeddings' root mean square distance from their mean is below `MIN_SPREAD`
    (it is at most 1), or if the triplet loss is within 2 % of its margin: then the hardest
    negatives are as near as positives.

    Args:
        config: of the run.
        count: after the step before.
        loss: of this step.
        spread: of its points' embeddings.

    Raises:
        EncoderCollapsed: so many in a row as the config allows.
    """
    margin = config.loss.margin
    is_at_margin = config.loss.name == "triplet" and abs(loss - margin) <= MARGIN_TOLERANCE * margin
    count = count + 1 if spread < MIN_SPREAD or is_at_margin else 0
    if config.collapse_steps and count >= config.collapse_steps:
        raise EncoderCollapsed(
            f"training has collapsed: for {count} steps the loss was {loss:.4g} (margin {margin}) "
            f"and the embeddings' spread {spread:.4g}. Where labels are noisy, use xc.loss.name = "
            '"softmax"; otherwise lower the learning rate. xc.collapse_steps = 0 goes on anyway'
        )
    return count
