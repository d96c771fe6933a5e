"""`jaxserve bench quality`: perplexity on a text, and what quantisation costs of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jaxserve.cli.engine_options import with_engine_options
from jaxserve.cli.local_engine import local_engine
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.engine.memory_plan import MemoryPlan
    from jaxserve.engine.quality import Quality

_TEXT = "Text"


@dataclass(frozen=True, slots=True)
class _Row:
    quantization: str
    kv_cache_dtype: str
    weights_bytes: int
    kv_bytes_per_token: float
    num_tokens: int
    perplexity: float
    cost: float
    """Perplexity over that of the first row, less one."""


@with_engine_options
def quality(
    engine_config: EngineConfig,
    text: Annotated[
        Path,
        typer.Option(
            help="A text file, or JSON lines with a field `text`.",
            metavar="FILE",
            rich_help_panel=_TEXT,
        ),
    ],
    num_tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens of the text to use.", rich_help_panel=_TEXT)
    ] = 4096,
    window: Annotated[
        int,
        typer.Option(min=2, help="Tokens that are scored together.", rich_help_panel=_TEXT),
    ] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity on a text, through the steps that serve.

    With --quantization or --kv-cache-dtype, the model as it is gets measured too, and the cost is
    printed: of each, and of both together.

    Example: jaxserve bench quality --text examples/train/data/speeches.jsonl --quantization int8
    """
    content = _read(text)
    weights, kv = engine_config.quantization, engine_config.kv_cache_dtype
    formats = dict.fromkeys((("none", "auto"), (weights, "auto"), ("none", kv), (weights, kv)))
    rows: list[_Row] = []
    for quantization, kv_cache_dtype in formats:
        config = replace(engine_config, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
        measured, memory = _measure(config, content, num_tokens, window)
        cost = measured.perplexity / rows[0].perplexity - 1 if rows else 0.0
        # One page is spare, see `kv_pool`.
        num_pool_tokens = (memory.num_pages + 1) * config.page_size * config.mesh.data
        rows.append(
            _Row(
                quantization,
                kv_cache_dtype,
                memory.weights_bytes,
                memory.kv_pool_bytes * config.mesh.num_devices / num_pool_tokens,
                measured.num_tokens,
                measured.perplexity,
                cost,
            )
        )
    if as_json:
        typer.echo(json.dumps({"model": engine_config.model, "rows": [asdict(r) for r in rows]}))
    else:
        Console(highlight=False).print(_table(engine_config.model, rows))


def _measure(
    config: EngineConfig, content: str, num_tokens: int, window: int
) -> tuple[Quality, MemoryPlan]:
    from jaxserve.engine.quality import measure_quality

    with local_engine(config) as running:
        if window >= running.engine.max_model_len:
            raise ConfigError(
                f"--window {window} must be below --max-model-len {running.engine.max_model_len}"
            )
        token_ids = running.tokenizer.encode(content)[:num_tokens]
        measured = measure_quality(running.engine, token_ids, window=window)
        return measured, running.report.memory


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return content
        return "\n\n".join(json.loads(line)["text"] for line in content.splitlines() if line)
    except OSError as error:
        raise ConfigError(f"--text {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--text {path} must be UTF-8 text, or JSON lines with a field `text`"
        ) from error


def _table(model: str, rows: list[_Row]) -> Table:
    table = Table(title=model, title_justify="left")
    for name in ("quantization", "keys and values"):
        table.add_column(name)
    for name in ("weights", "a token's", "tokens", "perplexity", "cost"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.quantization,
            row.kv_cache_dtype,
            f"{row.weights_bytes / 1e6:.0f} MB",
            f"{row.kv_bytes_per_token / 1e3:.1f} kB",
            str(row.num_tokens),
            f"{row.perplexity:.3f}",
            f"{100 * row.cost:+.2f} %",
        )
    return table
