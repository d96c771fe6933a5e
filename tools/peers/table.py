"""The table: records to Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from tools.peers.ceilings import Ceilings, ModelSize, floor_s
from tools.peers.load import ROWS, Row
from tools.peers.records import Record


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a figure over rounds."""

    middle: float
    low: float
    high: float

    def text(self, pattern: str = "{:.3g}") -> str:
        """`median (low to high)`; one number if there was one round."""
        middle, low, high = (pattern.format(one) for one in (self.middle, self.low, self.high))
        return middle if self.low == self.high else f"{middle} ({low} to {high})"


def spread_of(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def rate(record: Record, row: Row) -> float:
    """Tokens a second, of those that the row counts."""
    prompts = sum(prompt for prompt, _ in record["lengths"])
    outputs = sum(output for _, output in record["lengths"])
    tokens = {"output": outputs, "prompt": prompts, "both": prompts + outputs}[row.counts]
    return float(tokens / record["elapsed_s"])


def loads_of(records: Iterable[Record], engine: str, row: Row) -> dict[int, Record]:
    """Round -> record."""
    return {
        record["round"]: record
        for record in records
        if record["kind"] == "load" and record["engine"] == engine and record["row"] == row.name
    }


def ratios(ours: dict[int, Record], theirs: dict[int, Record], row: Row) -> dict[str, Spread]:
    """Ours over theirs, round by round: both ran after each other."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return {}
    pairs = [(ours[index], theirs[index]) for index in common]
    found = {"rate": spread_of([rate(a, row) / rate(b, row) for a, b in pairs])}
    for name in ("ttft_s", "tpot_s"):
        if all(a[name] and b[name] for a, b in pairs):
            found[name] = spread_of([median(a[name]) / median(b[name]) for a, b in pairs])
    return found


def figures_table(
    records: Sequence[Record], machine: Ceilings, model: ModelSize, engines: Sequence[Record]
) -> list[str]:
    """One line for each row and engine."""
    lines = [
        "| load | engine | weights | computes in | tokens/s | of floor | TTFT, ms | TPOT, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        for engine in engines:
            found = list(loads_of(records, engine["engine"], row).values())
            if not found:
                continue
            cells = (
                row.label,
                engine["engine"],
                engine["weights"],
                engine["compute"],
                f"{spread_of([rate(one, row) for one in found]).text()} {row.counts_text}".strip(),
                _of_floor(found, machine, model, engine),
                _percentiles([value for one in found for value in one["ttft_s"]]),
                _percentiles([value for one in found for value in one["tpot_s"]]),
            )
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _of_floor(found: Sequence[Record], machine: Ceilings, model: ModelSize, engine: Record) -> str:
    shares = [
        floor_s(
            [(prompt, output) for prompt, output in one["lengths"]],
            model,
            machine,
            weights_bytes=engine["weights_bytes"],
            kv_value_bytes=engine["kv_value_bytes"],
        )
        / one["elapsed_s"]
        for one in found
    ]
    return f"{median(shares):.0%}"


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    middle, high = (1e3 * float(value) for value in np.percentile(seconds, (50, 99)))
    return f"{middle:.0f} / {high:.0f}" if middle >= 100 else f"{middle:.1f} / {high:.1f}"


def ratio_table(records: Sequence[Record], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Ours over a peer, for each pair and row."""
    lines = ["| load | ours / theirs | tokens/s | TTFT P50 | TPOT P50 |", "|---|---|---|---|---|"]
    for ours, theirs in pairs:
        for row in ROWS:
            found = ratios(loads_of(records, ours, row), loads_of(records, theirs, row), row)
            if found:
                texts = [
                    found[name].text("{:.2f}") if name in found else "-"
                    for name in ("rate", "ttft_s", "tpot_s")
                ]
                lines.append(f"| {row.label} | {ours} / {theirs} | " + " | ".join(texts) + " |")
    return lines


def engine_table(records: Sequence[Record], engines: Sequence[Record]) -> list[str]:
    """Starts, memory and quality of each engine."""
    lines = [
        "| engine | cold start, s | warm, s | peak memory, MB | perplexity | same answers |",
        "|---|---|---|---|---|---|",
    ]
    for engine in engines:
        own = [one for one in records if one.get("engine") == engine["engine"]]
        cells = (
            engine["engine"],
            _spread_or_dash([one["ready_s"] for one in own if one["kind"] == "start-cold"]),
            _spread_or_dash([one["ready_s"] for one in own if one["kind"] == "start-warm"]),
            _peak([one["peak_bytes"] for one in own if one["kind"] == "load"]),
            _last(own, "perplexity", "{:.3f}"),
            _agreement(own),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread_or_dash(values: Sequence[float]) -> str:
    return spread_of(values).text("{:.1f}") if values else "-"


def _peak(values: Sequence[int]) -> str:
    return f"{max(values) / 1e6:.0f}" if values else "-"


def _last(own: Sequence[Record], name: str, pattern: str) -> str:
    values = [one[name] for one in own if one.get(name) is not None]
    return pattern.format(values[-1]) if values else "-"


def _agreement(own: Sequence[Record]) -> str:
    found: list[dict[str, Any]] = [one for one in own if one["kind"] == "agreement"]
    if not found:
        return "-"
    last = found[-1]
    return f"{last['num_equal']} of {last['num_prompts']}, {last['mean_prefix']:.0%} of the text"
