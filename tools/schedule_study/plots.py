"""The plots beside docs/results/schedules.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.schedule_study.fixed_runs import CHUNK
from tools.schedule_study.verdicts import losses_of

matplotlib.use("agg")
matplotlib.rcParams["svg.hashsalt"] = "jaxserve"


def write_plots(document: Path, results: dict[str, Any]) -> None:
    """`schedules-NAME.svg` beside the document, for the results that are there."""
    if char := results.get("char"):
        _save(_char_figure(char), document.with_name("schedules-text.svg"))
    if digits := results.get("digits"):
        _save(_digits_figure(digits), document.with_name("schedules-digits.svg"))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})


def _char_figure(char: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    rates, losses, budgets = figure.subplots(1, 3)
    plan = char["plan"]
    whole = plan["num_steps"]
    counts = np.arange(whole // CHUNK) * CHUNK + CHUNK / 2
    for label in (f"auto from {rate:g}" for rate in plan["initial_rates"]):
        runs = char["runs"][label]
        rates.plot(counts, np.mean([run["rates"] for run in runs], axis=0), label=label)
        _curve(losses, counts, runs, label)
    for kind in ("cosine", "knee"):
        _curve(losses, counts, char["runs"][f"{kind} {whole}"], f"{kind}, tuned")
    rates.set(yscale="log", xlabel="step", ylabel="learning rate", title="rates of auto")
    losses.set(xlabel="step", ylabel="train loss", title="train loss")
    lowest = min(np.mean(losses_of(char, f"{kind} {whole}")) for kind in ("cosine", "knee"))
    losses.set_ylim(lowest - 0.05, lowest + 0.8)
    _by_budget(budgets, char, "knee", [*plan["budgets"], whole], "knee, tuned")
    lines = [("cosine", "--")]
    for peak, lengths, style in zip(
        plan["equal_peaks"], plan["equal_budgets"], (":", "-."), strict=True
    ):
        _by_budget(budgets, char, f"knee at {peak:g}", sorted([*lengths, whole]), f"knee, {peak:g}")
        lines.append((f"cosine at {peak:g}", style))
    for label, style in lines:
        level = losses_of(char, f"{label} {whole}").mean()
        budgets.axhline(level, color="black", lw=1, linestyle=style, label=f"{label}, {whole}")
    budgets.set(xlabel="budget, steps", ylabel="held-out loss", title="shorter budgets")
    for axes in (rates, losses, budgets):
        axes.legend(fontsize=7)
    return figure


def _curve(axes: Axes, counts: np.ndarray, runs: list[dict[str, Any]], label: str) -> None:
    axes.plot(counts, np.mean([run["train_losses"] for run in runs], axis=0), label=label, lw=1)


def _by_budget(axes: Axes, char: dict[str, Any], kind: str, steps: list[int], label: str) -> None:
    values = [losses_of(char, f"{kind} {length}") for length in steps]
    means = [losses.mean() for losses in values]
    errors = [losses.std(ddof=1) / len(losses) ** 0.5 for losses in values]
    axes.errorbar(steps, means, errors, marker="o", markersize=3, capsize=2, label=label)


def _digits_figure(digits: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    histogram, losses = figure.subplots(1, 2)
    explore = digits["explore"]
    values = [value for found in explore.values() for value in found["sharpness"]]
    bins = np.geomspace(min(values), max(values), 25)
    for fraction, found in explore.items():
        label = f"{float(fraction):.0%} explored"
        histogram.hist(found["sharpness"], bins, alpha=0.5, label=label)
    histogram.set(xscale="log", xlabel="sharpness", ylabel="runs", title="sharpness")
    histogram.legend(fontsize=7)
    losses.boxplot(
        [found["test_loss"] for found in explore.values()],
        tick_labels=[f"{float(fraction):.0%}" for fraction in explore],
    )
    losses.set(xlabel="explored", ylabel="test loss", title="test loss")
    return figure
