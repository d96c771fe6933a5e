"""The options that every command with an engine shares, defined once.

A command takes one parameter `engine_config` and is decorated:

    @app.command()
    @with_engine_options
    def serve(engine_config: EngineConfig, grpc_port: Annotated[int, ...] = 50051) -> None:

Its command line then has `--model`, `--dtype` ... in place of `engine_config`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxserve.engine.config import (
    DTYPES,
    KERNELS,
    KV_CACHE_DTYPES,
    POLICIES,
    QUANTIZATIONS,
    SPECULATIVE_METHODS,
    STEP_BUDGETS,
    WEIGHT_FORMATS,
    EngineConfig,
)
from models.mesh_shape import MeshError, MeshShape, parse_mesh

_UNIT_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_byte_size(text: str) -> int:
    """Bytes of "536870912", "512MiB" or "2GB" (powers of 1024 and of 1000)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNIT_BYTES:
        raise typer.BadParameter(f"{text!r} is no size: write bytes, 512MiB or 2GB")
    return int(float(match[1]) * _UNIT_BYTES[match[2]])


def parse_buckets(text: str) -> str | tuple[int, ...]:
    """ "auto", "one", or ascending row counts of "4,32,128"."""
    if text in ("auto", "one"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f'{text!r} is neither "auto" nor "one" nor row counts like 4,32,128'
        ) from None


def parse_mesh_option(text: str | MeshShape) -> MeshShape:
    """A mesh of "data=2,tensor=4"; the default is one already."""
    if isinstance(text, MeshShape):
        return text
    try:
        return parse_mesh(text)
    except MeshError as error:
        raise typer.BadParameter(str(error)) from None


def parse_lora(text: str) -> tuple[str, Path]:
    """Name and folder of "sql=adapters/sql"."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise typer.BadParameter(f"--lora {text!r}: write NAME=FOLDER, like sql=adapters/sql")
    return name, Path(folder)


def complete_model(incomplete: str) -> list[str]:
    from jaxserve.model_catalog import CATALOG

    return [name for name in CATALOG if name.startswith(incomplete)]


def _complete_from(values: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


_MODEL = "Model and numbers"
_MESH = "Devices"
_STEP = "Step and batch"
_MEMORY = "KV cache"
_QUEUE = "Queue"
_LORA = "Adapters"
_SPECULATION = "Speculative decoding"
_COMPILE = "Compilation"

ENGINE_OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Catalogue name (`jaxserve models`), a GGUF file or a Hugging Face folder.",
            autocompletion=complete_model,
            rich_help_panel=_MODEL,
        ),
    ],
    "dtype": Annotated[
        str,
        typer.Option(
            help="Of weights and KV cache: float32, bfloat16 or auto (float32 on a CPU, "
            "bfloat16 on a GPU).",
            autocompletion=_complete_from(DTYPES),
            rich_help_panel=_MODEL,
        ),
    ],
    "quantization": Annotated[
        str,
        typer.Option(
            help="Keeps the projections' weights in fewer bits: int8 or int4. Less memory; the "
            "cost in quality is in docs/models.md.",
            autocompletion=_complete_from(QUANTIZATIONS),
            rich_help_panel=_MODEL,
        ),
    ],
    "weights_format": Annotated[
        str,
        typer.Option(
            help="native keeps a GGUF file's own 4- and 8-bit codes, for the native CPU kernels; "
            "float turns them into numbers of --dtype.",
            autocompletion=_complete_from(WEIGHT_FORMATS),
            rich_help_panel=_MODEL,
        ),
    ],
    "kernels": Annotated[
        str,
        typer.Option(
            help="What multiplies on a CPU: native, xla or auto (native where `make native` has "
            "installed it and it runs the model).",
            autocompletion=_complete_from(KERNELS),
            rich_help_panel=_MODEL,
        ),
    ],
    "attention": Annotated[
        str,
        typer.Option(
            help="Implementation of attention; auto picks the fastest for the platform.",
            rich_help_panel=_MODEL,
        ),
    ],
    "mesh": Annotated[
        Any,
        typer.Option(
            help="Devices to serve the model on, like tensor=4 or data=2,stage=2,tensor=2 "
            "(docs/meshes.md).",
            metavar="AXIS=N,..",
            parser=parse_mesh_option,
            show_default="one device",
            rich_help_panel=_MESH,
        ),
    ],
    "virtual_devices": Annotated[
        int | None,
        typer.Option(
            help="Divides a CPU into that many devices, to try a mesh out.",
            show_default="1",
            rich_help_panel=_MESH,
        ),
    ],
    "policy": Annotated[
        str,
        typer.Option(
            help=f"Scheduling policy: {', '.join(POLICIES)}.",
            autocompletion=_complete_from(POLICIES),
            rich_help_panel=_STEP,
        ),
    ],
    "token_budget": Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a step. Larger: prompts go in faster; smaller: running streams "
            "wait less for them.",
            show_default="128 on a CPU, 512 on a GPU",
            rich_help_panel=_STEP,
        ),
    ],
    "step_budget": Annotated[
        str,
        typer.Option(
            help="What limits the prompt tokens of a step: tokens (--token-budget), time (the "
            "predicted step keeps --slo-tbt-ms) or slack (what running streams can spare).",
            autocompletion=_complete_from(STEP_BUDGETS),
            rich_help_panel=_STEP,
        ),
    ],
    "slo_tbt_ms": Annotated[
        float | None,
        typer.Option(
            help="Objective for the time between tokens. Steps are measured at start, and the "
            "largest token budget that keeps it is chosen.",
            show_default="none",
            rich_help_panel=_STEP,
        ),
    ],
    "slo_ttft_ms": Annotated[
        float | None,
        typer.Option(
            help="Objective for the first token, for --policy slack and --step-budget slack.",
            show_default="6000 for these two",
            rich_help_panel=_STEP,
        ),
    ],
    "buckets": Annotated[
        Any,
        typer.Option(
            help="Row counts of the compiled steps, like 4,32,128. `one`: a single program, "
            "which makes outputs bit-equal whatever runs beside a request.",
            metavar="auto|one|N,N,..",
            parser=parse_buckets,
            rich_help_panel=_STEP,
        ),
    ],
    "max_num_seqs": Annotated[
        int | None,
        typer.Option(
            help="Most requests that run at once; the others wait.",
            show_default="32 on a CPU, 256 on a GPU",
            rich_help_panel=_STEP,
        ),
    ],
    "max_model_len": Annotated[
        int | None,
        typer.Option(
            help="Most tokens of one request, prompt and output together.",
            show_default="the model's, at most 2048 on a CPU, 8192 on a GPU",
            rich_help_panel=_MEMORY,
        ),
    ],
    "kv_cache_bytes": Annotated[
        int | None,
        typer.Option(
            help="Memory for keys and values: 512MiB, 2GB or bytes.",
            metavar="SIZE",
            parser=parse_byte_size,
            show_default="8 full-length requests on a CPU, 85% of free memory on a GPU",
            rich_help_panel=_MEMORY,
        ),
    ],
    "kv_cache_dtype": Annotated[
        str,
        typer.Option(
            help="Of keys and values: auto (--dtype), int8 or fp8_e4m3. Room for more tokens; the "
            "cost in quality is in docs/models.md.",
            autocompletion=_complete_from(KV_CACHE_DTYPES),
            rich_help_panel=_MEMORY,
        ),
    ],
    "page_size": Annotated[
        int,
        typer.Option(help="Tokens of one page of the KV cache.", rich_help_panel=_MEMORY),
    ],
    "watermark": Annotated[
        float,
        typer.Option(
            help="Fraction of pages kept free for running requests to grow into.",
            rich_help_panel=_MEMORY,
        ),
    ],
    "prefix_caching": Annotated[
        bool,
        typer.Option(
            "--prefix-caching/--no-prefix-caching",
            help="Compute a prompt's beginning only once when requests share it.",
            rich_help_panel=_MEMORY,
        ),
    ],
    "max_queued_requests": Annotated[
        int,
        typer.Option(
            help="Most requests that may wait; further ones are refused at once.",
            rich_help_panel=_QUEUE,
        ),
    ],
    "max_queued_tokens": Annotated[
        int,
        typer.Option(help="Most prompt tokens that may wait.", rich_help_panel=_QUEUE),
    ],
    "speculative_method": Annotated[
        str,
        typer.Option(
            help="ngram guesses next tokens from the request's own text and checks several in one "
            "step: the same outputs, faster where text repeats (docs/speculative_decoding.md).",
            autocompletion=_complete_from(SPECULATIVE_METHODS),
            rich_help_panel=_SPECULATION,
        ),
    ],
    "num_speculative_tokens": Annotated[
        int | None,
        typer.Option(
            help="Most tokens that are guessed at once.",
            show_default="4",
            rich_help_panel=_SPECULATION,
        ),
    ],
    "prompt_lookup_max": Annotated[
        int | None,
        typer.Option(
            help="Most last tokens that are looked up in the text.",
            show_default="4",
            rich_help_panel=_SPECULATION,
        ),
    ],
    "prompt_lookup_min": Annotated[
        int | None,
        typer.Option(
            help="Least last tokens that must stand in the text before.",
            show_default="3",
            rich_help_panel=_SPECULATION,
        ),
    ],
    "lora": Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            help="An adapter to begin with (PEFT's files); may be given again. Requests choose it "
            "by its name (docs/adapters.md).",
            metavar="NAME=FOLDER",
            show_default="none",
            rich_help_panel=_LORA,
        ),
    ],
    "max_loras": Annotated[
        int | None,
        typer.Option(
            help="Room for that many adapters at once.",
            show_default="as many as --lora names",
            rich_help_panel=_LORA,
        ),
    ],
    "max_lora_rank": Annotated[
        int | None,
        typer.Option(
            help="Most ranks of an adapter.",
            show_default="the largest of --lora, else 16",
            rich_help_panel=_LORA,
        ),
    ],
    "compilation_cache_dir": Annotated[
        Path | None,
        typer.Option(
            help="Keeps compiled steps between starts. It holds native code, so it must be "
            "yours alone (mode 0700).",
            show_default="~/.cache/jaxserve/xla",
            rich_help_panel=_COMPILE,
        ),
    ],
}
"""EngineConfig field -> its command-line option. Defaults are EngineConfig's."""


def build_engine_config(**values: Any) -> EngineConfig:
    """The config of parsed option values, keyed by field. Raises ConfigError."""
    if "lora" in values:
        values["lora"] = tuple(parse_lora(text) for text in values["lora"] or ())
    return EngineConfig(**values)


def with_engine_options(
    command: Callable[..., Any], *, names: Sequence[str] = tuple(ENGINE_OPTIONS)
) -> Callable[..., Any]:
    """Replaces the parameter `engine_config` by the options of EngineConfig in `names`.

    The options come after the command's own parameters in its help. A command
    with a parameter named like one of EngineConfig's fields is refused with
    TypeError.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.name != "engine_config"]
    if len(own) == len(signature.parameters):
        raise TypeError(f"{command.__name__} has no parameter engine_config")
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults[name],
            annotation=ENGINE_OPTIONS[name],
        )
        for name in names
    ]
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    own_names = {p.name for p in own}
    if clash := own_names & set(names):
        raise TypeError(f"{command.__name__}: {', '.join(sorted(clash))} is an engine option")

    def run(**values: Any) -> Any:
        engine = {name: values.pop(name) for name in names}
        return command(engine_config=build_engine_config(**engine), **values)

    run.__name__ = command.__name__
    run.__doc__ = command.__doc__
    run.__module__ = command.__module__
    parameters = [*keyword, *shared]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
