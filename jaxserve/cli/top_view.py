"""What `jaxserve top` shows of a server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxserve.proto.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from jaxserve.cli.top import Sample
    from jaxserve.load_window import LoadWindow, Percentiles

MAX_HISTORY = 60
_BLOCKS = " ▁▂▃▄▅▆▇█"
_STATE_STYLES = {"ready": "bold green", "degraded": "bold red", "draining": "bold yellow"}


def state_name(state: pb.ServerState) -> str:
    return pb.ServerState.Name(state).removeprefix("SERVER_STATE_").lower()


def as_values(sample: Sample, window: LoadWindow) -> dict[str, Any]:
    """All of it, for --json."""
    load = {
        name: value
        for name, value in MessageToDict(
            sample.load, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        ).items()
        if not isinstance(value, dict)  # Histograms: `window` tells what they say.
    }
    load["adapters"] = [
        {"name": one.name, "num_open": one.num_open, "num_requests": one.num_requests}
        for one in sample.load.adapters
    ]
    return {
        "server": {
            "state": state_name(sample.server.state),
            "version": sample.server.version,
            "uptime_s": sample.server.uptime_s,
        },
        "model": {
            "name": sample.model.name,
            "family": sample.model.family,
            "weights": sample.model.weights,
            "dtype": sample.model.dtype,
            "policy": sample.model.policy,
            "max_num_seqs": sample.model.max_num_seqs,
        },
        # Protobuf's JSON writes whole numbers of 64 bits as text.
        "load": {k: int(v) if isinstance(v, str) else v for k, v in load.items()},
        "window": asdict(window),
    }


def screen(sample: Sample, window: LoadWindow | None, history: Iterable[float]) -> RenderableType:
    """The whole view; `history` is of output tokens a second."""
    model = sample.model
    state = state_name(sample.server.state)
    title = Text.assemble(
        ("jaxserve top  ", "bold"),
        f"{model.weights or model.name}, {model.dtype}  ",
        (state, _STATE_STYLES.get(state, "bold")),
        f"  up {_duration(sample.server.uptime_s)}",
    )
    parts: list[RenderableType] = [_now(sample)]
    if window is None:
        parts.append(Text("the first window is on its way", "dim"))
    else:
        parts += [_rates(window, history), _times(window)]
    return Panel(Group(*parts), title=title, title_align="left", padding=(0, 1))


def _grid(*ratios: int) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    for ratio in ratios:
        table.add_column(ratio=ratio)
    return table


def _now(sample: Sample) -> RenderableType:
    load, model = sample.load, sample.model
    table = _grid(3, 5, 6)
    table.add_row("running", f"{load.num_running} / {model.max_num_seqs}",
                  _bar(load.num_running, model.max_num_seqs))  # fmt: skip
    waiting = f"{load.num_waiting}, {load.num_waiting_tokens} tokens"
    table.add_row("waiting", waiting, f"oldest {load.oldest_waiting_s:.1f} s")
    if load.num_pages_total:
        num_used = load.num_pages_total - load.num_pages_free - load.num_pages_cached
        table.add_row("KV pages", f"{num_used} / {load.num_pages_total}",
                      _bar(num_used, load.num_pages_total))  # fmt: skip
        table.add_row("", f"{load.num_pages_cached} kept prefixes", "")
    compiles = load.num_compiles_after_ready
    age = f"{load.last_step_age_s:.1f} s ago" if load.HasField("last_step_age_s") else "none yet"
    table.add_row("steps", f"{load.num_steps}", f"last one {age}")
    told = Text(f"{compiles} after READY", "red" if compiles else "green")
    for adapter in load.adapters:
        # Text, since rich reads markup in a string.
        name = Text(f"adapter {adapter.name}", no_wrap=True, overflow="ellipsis")
        table.add_row(name, f"{adapter.num_open} open", f"{adapter.num_requests} taken")
    table.add_row("compilations", f"{load.num_startup_compiles} at start", told)
    return table


def _rates(window: LoadWindow, history: Iterable[float]) -> RenderableType:
    table = _grid(3, 5, 6)
    table.add_row("output tokens/s", f"{window.output_tokens_per_s:.1f}",
                  Text(sparkline(history), "cyan"))  # fmt: skip
    table.add_row("prompt tokens/s", f"{window.prompt_tokens_per_s:.1f}", "")
    table.add_row("requests/s", f"{window.requests_per_s:.2f}",
                  f"{window.refused_per_s:.2f} refused/s")  # fmt: skip
    table.add_row("steps/s", f"{window.steps_per_s:.1f}", f"{_percent(window.step_fill)} full")
    table.add_row("preemptions", f"{window.num_preemptions}",
                  f"{_percent(window.prefix_hits)} of prompts in the cache")  # fmt: skip
    return table


def _times(window: LoadWindow) -> RenderableType:
    table = Table(expand=True, header_style="bold")
    table.add_column(f"ms, last {window.window_s:.1f} s")
    for name in ("P50", "P90", "P99"):
        table.add_column(name, justify="right")
    rows: tuple[tuple[str, Percentiles], ...] = (
        ("time to first token", window.ttft),
        ("between tokens", window.itl),
        ("in the queue", window.queue),
        ("a step", window.step),
    )
    for name, times in rows:
        values = (times.p50_ms, times.p90_ms, times.p99_ms)
        table.add_row(name, *map(_ms, values))
    return table


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _bar(value: int, total: int) -> RenderableType:
    return ProgressBar(total=max(1, total), completed=value, width=24)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def sparkline(values: Iterable[float]) -> str:
    """One character a value, its height relative to the highest."""
    seen = list(values)
    top = max(seen, default=0.0)
    if top <= 0:
        return ""
    return "".join(_BLOCKS[round(value / top * (len(_BLOCKS) - 1))] for value in seen)


def _duration(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
