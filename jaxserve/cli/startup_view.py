"""How start-up looks on a terminal: phases as they end, then what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from jaxserve.engine.memory_plan import format_bytes

if TYPE_CHECKING:
    from jaxserve.engine.encoder.startup import EncoderReport
    from jaxserve.engine.settings import EngineSettings
    from jaxserve.engine.startup import StartupReport
    from models.mesh_shape import MeshShape


class PhasePrinter:
    """One line a phase, as `start_engine` reports it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, phase: str, seconds: float) -> None:
        self._console.print(f"  {phase:<28} {seconds:7.2f} s", style="dim")


def print_report(console: Console, report: StartupReport | EncoderReport) -> None:
    """The resolved settings and the memory plan."""
    # Imported late: `--help` must not wait for jax, nor text generation for what encoders need.
    from jaxserve.engine.startup import StartupReport

    if isinstance(report, StartupReport):
        console.print(_settings_table(report))
        console.print(_memory_table(report))
    else:
        console.print(_encoder_settings_table(report))
        console.print(_encoder_memory_table(report))
    console.print(f"ready after {report.ready_s:.1f} s, {report.num_compiles} compilations")


def _settings_table(report: StartupReport) -> Table:
    settings, scheduler = report.settings, report.settings.scheduler
    rows = {
        "model": report.model_name,
        "device": report.device,
        "mesh": _mesh_text(settings.mesh),
        "dtype": settings.dtype.name,
        "weights": _weights_text(settings),
        "keys and values": settings.kv_quantization or settings.dtype.name,
        "kernels": _kernels_text(settings),
        "attention": settings.attention.name,
        "policy": scheduler.policy,
        "token budget": str(scheduler.token_budget),
        "buckets": ", ".join(map(str, scheduler.buckets)),
        "requests at once": str(settings.num_seqs),
        "context": f"{scheduler.max_model_len} tokens",
        "queue": f"{scheduler.max_queued_requests} requests, "
        f"{scheduler.max_queued_tokens} prompt tokens",
        "prefix cache": "on" if scheduler.prefix_caching else "off",
    }
    if settings.loras is not None:
        rows["adapters"] = f"{settings.loras.max_loras} of rank {settings.loras.max_rank} at most"
    return _rows_table("settings", rows)


def _weights_text(settings: EngineSettings) -> str:
    native = settings.native
    if native is None or native.file_kinds is None:
        return settings.quantization or settings.dtype.name
    kinds = Counter(kind.name for _, kind in native.file_kinds)
    held = ", ".join(f"{name} ({count} kinds of matrices)" for name, count in kinds.items())
    return f"as in the file: {held}"


def _kernels_text(settings: EngineSettings) -> str:
    native = settings.native
    if native is None:
        return "xla"
    return f"native: {native.instruction_set}, {native.num_threads} threads"


def _mesh_text(mesh: MeshShape) -> str:
    if mesh.num_devices == 1:
        return "one device"
    return f"{mesh}: {mesh.num_devices} devices"


def _rows_table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory_table(report: StartupReport) -> Table:
    memory = report.memory
    scheduler = report.settings.scheduler
    pool = f"KV pool ({memory.num_pages} pages of {scheduler.page_size} tokens)"
    sizes = {
        "weights": memory.weights_bytes,
        "adapters": memory.adapters_bytes,
        pool: memory.kv_pool_bytes,
        "slots": memory.slots_bytes,
        "temporaries of a step": memory.temp_bytes,
        "left free": memory.headroom_bytes,
    }
    one = report.settings.mesh.num_devices == 1
    return _sizes_table(sizes, "memory" if one else "memory of each device")


def _sizes_table(sizes: Mapping[str, int], title: str = "memory") -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in sizes.items():
        table.add_row(name, format_bytes(size))
    return table


def _encoder_settings_table(report: EncoderReport) -> Table:
    settings = report.settings
    steps = ", ".join(f"{bucket.num_texts} x {bucket.num_positions}" for bucket in settings.buckets)
    rows = {
        "model": report.model_name,
        "device": report.device,
        "dtype": settings.dtype.name,
        "token budget": str(settings.token_budget),
        "steps (texts x tokens)": steps,
        "longest text": f"{settings.max_tokens} tokens",
        "queue": f"{settings.max_queued_requests} texts, {settings.max_queued_tokens} tokens",
    }
    return _rows_table("settings", rows)


def _encoder_memory_table(report: EncoderReport) -> Table:
    memory = report.memory
    sizes = {
        "weights": memory.weights_bytes,
        "temporaries of the steps": memory.temp_bytes,
        "left free": memory.headroom_bytes,
    }
    return _sizes_table(sizes)
