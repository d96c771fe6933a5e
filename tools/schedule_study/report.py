"""The tables of docs/results/schedules.md, from the results."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.schedule_study.statistics import mean_of, paired
from tools.schedule_study.verdicts import checks_of, losses_of


def write_tables(document: Path, results: dict[str, Any]) -> None:
    """Replaces what lies between `<!-- table NAME -->` and `<!-- end -->` in the document.

    Raises:
        ValueError: The document has no place for one of the tables.
    """
    text = document.read_text()
    for name, table in tables_of(results).items():
        found = re.search(rf"<!-- table {name} -->\n(.*?)<!-- end -->", text, flags=re.S)
        if found is None:
            raise ValueError(f"{document} has no place for {name}: add <!-- table {name} -->")
        text = f"{text[: found.start(1)]}{table}\n{text[found.end(1) :]}"
    document.write_text(text)


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """Name -> Markdown."""
    tables: dict[str, str] = {}
    if char := results.get("char"):
        tables |= {
            "checks": _checks(char),
            "char-setup": _setup(char, sum(map(len, char["runs"].values())), _corpus_row(char)),
            "char-tuning": _tuning(char["tuning"], char["peaks"]),
            "char-losses": _char_losses(char),
            "char-budgets": _budgets(char),
            "char-tuned": _tuned_rates(char),
        }
    if digits := results.get("digits"):
        tuning = {kind: found["tuning"] for kind, found in digits["schedules"].items()}
        peaks = {kind: found["peak"] for kind, found in digits["schedules"].items()}
        tables |= {
            "digits-setup": _setup(digits, _num_digits_runs(digits)),
            "digits-tuning": _tuning(tuning, peaks),
            "digits-losses": _digits_losses(digits),
            "digits-explore": _explore(digits),
        }
    return tables


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _checks(char: dict[str, Any]) -> str:
    rows = []
    for check in checks_of(char):
        value = check.value
        is_share = check.limit > 0.01
        mean, low, high = (
            f"{number:.1%}" if is_share else f"{number:+.4f}"
            for number in (value.mean, value.low, value.high)
        )
        limit = f"{check.limit:.0%}" if is_share else f"{check.limit:+g}"
        rows.append([check.demand, mean, f"{low} to {high}", limit, check.verdict])
    return _table(["demand", "measured", "95 % interval", "at most", ""], rows)


def _corpus_row(char: dict[str, Any]) -> list[str]:
    corpus = char["corpus"]
    digest = f"SHA-256 `{corpus['sha256']}`"
    return ["text", f"{corpus['name']}, {corpus['num_bytes']:,} bytes, {digest}"]


def _setup(found: dict[str, Any], num_runs: int, *rows: list[str]) -> str:
    run, plan = found["run"], found["plan"]
    seeds = f"results {_joined(plan['seeds'])}; tuning {_joined(plan['tuning_seeds'])}"
    return _table(
        ["what", "value"],
        [
            *rows,
            ["seeds", seeds],
            ["runs spent on tuning", str(found["num_tuning_runs"])],
            ["runs of the results", str(num_runs)],
            ["machine, date", f"{run['machine']}, {run['date']}"],
            ["time", f"{run['wall_s']:.0f} s, {run['cpu_s']:.0f} CPU-s"],
        ],
    )


def _joined(values: Sequence[Any]) -> str:
    """Of three or more whole numbers in a row only the ends."""
    is_range = len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1))
    return f"{values[0]} to {values[-1]}" if is_range else ", ".join(map(str, values))


def _tuning(tuning: dict[str, dict[str, list[float]]], best: dict[str, float]) -> str:
    peaks = sorted({peak for losses in tuning.values() for peak in losses}, key=float)
    rows = []
    for kind, losses in tuning.items():
        cells = [
            f"{statistics.fmean(losses[peak]):.4f}" if peak in losses else "" for peak in peaks
        ]
        chosen = peaks.index(f"{best[kind]:g}")
        cells[chosen] = f"**{cells[chosen]}**"
        rows.append([kind, *cells])
    return _table(["schedule, at a peak of", *peaks], rows)


def _char_losses(char: dict[str, Any]) -> str:
    whole = char["plan"]["num_steps"]
    cosine = losses_of(char, f"cosine {whole}")
    num_search = {kind: sum(map(len, by.values())) for kind, by in char["tuning"].items()}
    rows = []
    for label, runs in char["runs"].items():
        kind, _, rest = label.partition(" ")
        if (rest.isdigit() and int(rest) != whole) or rest.startswith("at "):
            continue
        losses = losses_of(char, label)
        name = f"{kind}, tuned" if rest.isdigit() else label
        search = str(num_search[kind]) if rest.isdigit() else "0"
        difference = paired(losses, cosine[: len(losses)]).text() if kind != "cosine" else ""
        rows.append([name, search, str(len(runs)), mean_of(losses).text(), difference])
    rows.sort(key=lambda row: row[3])
    header = ["rate", "search runs", "seeds", "held-out loss", "less tuned cosine (paired)"]
    return _table(header, rows)


def _budgets(char: dict[str, Any]) -> str:
    plan = char["plan"]
    equal = [length for lengths in plan["equal_budgets"] for length in lengths]
    lengths = sorted({*plan["budgets"], *equal, plan["num_steps"]})
    rows = []
    at_equal = [
        f"{kind} at {peak:g}" for peak in plan["equal_peaks"] for kind in ("cosine", "knee")
    ]
    for label in ("cosine", "linear", "knee", *at_equal):
        cells = []
        for length in lengths:
            key = f"{label} {length}"
            has_run = key in char["runs"]
            cells.append(f"{losses_of(char, key).mean():.4f}" if has_run else "")
        rows.append([label if " at " in label else f"{label}, tuned", *cells])
    return _table(["held-out loss after steps", *map(str, lengths)], rows)


def _tuned_rates(char: dict[str, Any]) -> str:
    rows = []
    for label, runs in char["runs"].items():
        if "peak" not in runs[0]:
            continue
        peaks = [run["peak"] for run in runs]
        rows.append(
            [
                label,
                f"{statistics.median(peaks):.2e} ({min(peaks):.2e} to {max(peaks):.2e})",
                f"{statistics.fmean(run['ramp_steps'] for run in runs):.0f}",
                f"{statistics.fmean(run['overhead_by_passes'] for run in runs):.1%}",
                f"{statistics.fmean(run['overhead_by_time'] for run in runs):.1%}",
            ]
        )
    header = ["rate", "peak: median (range)", "last probe at step"]
    return _table([*header, "overhead in passes", "in time"], rows)


def _num_digits_runs(digits: dict[str, Any]) -> int:
    losses = [found["test_losses"] for found in digits["schedules"].values()]
    losses += [found["test_loss"] for found in digits["explore"].values()]
    return sum(map(len, losses))


def _digits_losses(digits: dict[str, Any]) -> str:
    cosine = digits["schedules"]["cosine"]["test_losses"]
    rows = []
    for kind, found in digits["schedules"].items():
        losses = found["test_losses"]
        difference = paired(losses, cosine).text() if kind != "cosine" else ""
        rows.append([kind, f"{found['peak']:g}", mean_of(losses).text(), difference])
    return _table(["schedule", "tuned peak", "test loss", "less cosine (paired)"], rows)


def _explore(digits: dict[str, Any]) -> str:
    rows = []
    for fraction, found in digits["explore"].items():
        sharpness = found["sharpness"]
        quartiles = statistics.quantiles(sharpness, n=4)
        rows.append(
            [
                f"{float(fraction):.0%}",
                f"{quartiles[1]:.4f} ({quartiles[0]:.4f} to {quartiles[2]:.4f})",
                mean_of(found["test_loss"]).text(),
                f"{statistics.median(found['train_loss']):.2e}",
            ]
        )
    header = ["explored", "sharpness: median (quartiles)", "test loss", "train loss: median"]
    lines = [
        f"- Spearman, explored fraction and {name}: {found['rho']:+.2f} "
        f"({found['low']:+.2f} to {found['high']:+.2f}), {found['num_runs']} runs"
        for name, found in digits["correlations"].items()
    ]
    return "\n".join([_table(header, rows), "", *lines])
