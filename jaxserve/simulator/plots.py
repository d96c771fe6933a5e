"""Charts as PNG files. matplotlib comes with the extra `plot`."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.simulator.sim_executor import SimStep

MAX_TIMELINE_STEPS = 60
_PREFILL, _DECODE, _HYBRID = "#d1495b", "#2e86ab", "#7a5195"


def start() -> Any:
    """matplotlib's pyplot, drawing to files. Raises ConfigError if it is absent."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib: install it with `pip install 'jaxserve[plot]'`"
        ) from error


def timeline(pyplot: Any, steps: Sequence[SimStep], path: Path) -> None:
    """The first steps: a lane a pipeline stage, coloured by what a step holds."""
    shown = steps[:MAX_TIMELINE_STEPS]
    num_stages = len(shown[0].stage_start_s)
    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.7 * num_stages))
    for step in shown:
        plan = step.plan
        colour = (
            _HYBRID if plan.decodes and plan.prefills else (_PREFILL if plan.prefills else _DECODE)
        )
        for stage, start_s in enumerate(step.stage_start_s):
            axes.barh(
                stage, step.stage_s, left=start_s, color=colour, edgecolor="white", height=0.8
            )
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in (_PREFILL, _DECODE, _HYBRID)
    ]
    axes.legend(
        handles, ["prefill", "decode", "both"], loc="lower right", bbox_to_anchor=(1, 1), ncols=3
    )
    axes.set_yticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(f"first {len(shown)} steps", loc="left")
    _save(pyplot, figure, path)


def capacity_bars(
    pyplot: Any, by_policy: Mapping[str, Sequence[float]], title: str, path: Path
) -> None:
    """Median capacity of each policy; the line spans the seeds."""
    figure, axes = pyplot.subplots(figsize=(1.5 + 1.5 * len(by_policy), 4))
    medians = [statistics.median(values) for values in by_policy.values()]
    spans = [
        [median - min(values) for median, values in zip(medians, by_policy.values(), strict=True)],
        [max(values) - median for median, values in zip(medians, by_policy.values(), strict=True)],
    ]
    bars = axes.bar(list(by_policy), medians, yerr=spans, capsize=4, color=_DECODE)
    axes.bar_label(bars, fmt="%.2f")
    axes.set_ylabel("capacity, requests/s")
    axes.set_title(title)
    _save(pyplot, figure, path)


def curves(pyplot: Any, runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """P99 time between tokens and P50 TTFT over the rate, a line a policy."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for policy in dict.fromkeys(run["policy"] for run in runs):
        own = [run for run in runs if run["policy"] == policy]
        rates = [run["qps"] for run in own]
        left.plot(rates, [run["tbt_s"]["p99"] for run in own], marker="o", label=policy)
        right.plot(rates, [run["ttft_s"]["p50"] for run in own], marker="o", label=policy)
    left.set_ylabel("P99 time between tokens, s")
    right.set_ylabel("P50 time to first token, s")
    for axes in (left, right):
        axes.set_xlabel("requests/s")
        axes.set_yscale("log")
        axes.legend()
    _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from error
    pyplot.close(figure)
