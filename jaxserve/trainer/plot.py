"""`plot.png`: loss and learning rate of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxserve.trainer.errors import RunError


def draw(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the lines of `metrics.jsonl`, as `read_metrics` gives them.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise RunError(
            f"{path.name} is not drawn, since matplotlib is missing: pip install 'jaxserve[plot]'; "
            "or set logging.plot to false"
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot

    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "evaluation_loss" in line]
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1)
    )
    above.plot([one["step"] for one in steps], [one["loss"] for one in steps], lw=1, label="train")
    if evaluations:
        above.plot(
            [one["step"] for one in evaluations],
            [one["evaluation_loss"] for one in evaluations],
            "o-", lw=1, label="evaluation",
        )  # fmt: skip
        above.legend()
    above.set_ylabel("loss (nats a token)")
    below.plot([one["step"] for one in steps], [one["lr"] for one in steps], lw=1)
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
    temporary.replace(path)
