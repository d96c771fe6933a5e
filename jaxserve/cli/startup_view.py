"""How start-up looks on a terminal: phases as they end, then what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from jaxserve.engine.memory_plan import format_bytes

if TYPE_CHECKING:
    from jaxserve.engine.startup import StartupReport


class PhasePrinter:
    """One line a phase, as `start_engine` reports it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, phase: str, seconds: float) -> None:
        self._console.print(f"  {phase:<28} {seconds:7.2f} s", style="dim")


def print_report(console: Console, report: StartupReport) -> None:
    """The resolved settings and the memory plan."""
    console.print(_settings_table(report))
    console.print(_memory_table(report))
    console.print(f"ready after {report.ready_s:.1f} s, {report.num_compiles} compilations")


def _settings_table(report: StartupReport) -> Table:
    settings, scheduler = report.settings, report.settings.scheduler
    table = Table(title="settings", title_justify="left", show_header=False)
    rows = {
        "model": report.model_name,
        "device": report.device,
        "dtype": settings.dtype.name,
        "attention": settings.attention.name,
        "policy": scheduler.policy,
        "token budget": str(scheduler.token_budget),
        "buckets": ", ".join(map(str, scheduler.buckets)),
        "requests at once": str(scheduler.max_num_seqs),
        "context": f"{scheduler.max_model_len} tokens",
        "queue": f"{scheduler.max_queued_requests} requests, "
        f"{scheduler.max_queued_tokens} prompt tokens",
        "prefix cache": "on" if scheduler.prefix_caching else "off",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory_table(report: StartupReport) -> Table:
    memory = report.memory
    scheduler = report.settings.scheduler
    table = Table(title="memory", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    pool = f"KV pool ({memory.num_pages} pages of {scheduler.page_size} tokens)"
    for name, size in (
        ("weights", memory.weights_bytes),
        (pool, memory.kv_pool_bytes),
        ("slots", memory.slots_bytes),
        ("temporaries of a step", memory.temp_bytes),
        ("left free", memory.headroom_bytes),
    ):
        table.add_row(name, format_bytes(size))
    return table
