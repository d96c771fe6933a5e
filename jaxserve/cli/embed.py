"""`jaxserve embed`: texts into vectors, without a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.cli.engine_options import complete_model, with_engine_options
from jaxserve.cli.local_engine import local_encoder
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from jaxserve.engine.encoder.startup import RunningEncoder
    from jaxserve.engine.encoder.texts import EncodedText

app = typer.Typer(add_completion=False)

_OPTIONS = ("dtype", "token_budget", "buckets", "max_model_len", "compilation_cache_dir")
"""Of the engine's: those that an encoder has a use for, and a single run."""


@app.command()
@partial(with_engine_options, names=_OPTIONS)
def embed(
    engine_config: EngineConfig,
    model: Annotated[
        str,
        typer.Argument(
            help="An encoder: a catalogue name, or a Hugging Face folder.",
            autocompletion=complete_model,
        ),
    ],
    text: Annotated[list[str] | None, typer.Argument(help="Texts, each for one vector.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="One text a line, - for standard input.", metavar="FILE"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="FILE.npy gets float32 [texts, numbers of a vector]; without it, JSON lines are "
            "printed.",
            metavar="FILE.npy",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file.")
    ] = False,
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Cut texts that are longer than the model takes."),
    ] = False,
) -> None:
    """Turn texts into vectors, without a server.

    Prints a JSON line a text: {"text", "num_tokens", "truncated", "embedding"}.

    Examples:

        jaxserve embed all-minilm-l6-v2 "a cat" "a dog"

        jaxserve embed all-minilm-l6-v2 --input texts.txt --output vectors.npy
    """
    if bool(text) == (input is not None):
        raise ConfigError("give either TEXT... or --input FILE")
    if output is not None and output.suffix != ".npy":
        raise ConfigError(f"--output {output} must end in .npy; without it, JSON is printed")
    if output is not None and output.exists() and not overwrite:
        raise ConfigError(f"--output {output} exists: choose another name or add --overwrite")
    texts = list(text) if text else _read_lines(input)
    with local_encoder(replace(engine_config, model=model)) as running:
        encoded, vectors = _embed(running, texts, truncate=truncate)
    if output is not None:
        _write(output, vectors)
    else:
        _print(texts, encoded, vectors)


def _embed(
    running: RunningEncoder, texts: Sequence[str], *, truncate: bool
) -> tuple[list[EncodedText], npt.NDArray[np.float32]]:
    import numpy as np

    from jaxserve.engine.encoder.texts import tokenize_texts
    from jaxserve.engine.offline import complete_in_order
    from jaxserve.engine.request import GenerationRequest

    settings = running.report.settings
    try:
        encoded = tokenize_texts(
            running.tokenizer, texts, max_tokens=settings.max_tokens, truncate=truncate
        )
    except InvalidRequest as error:
        message = str(error).replace("set truncate", "add --truncate")
        raise ConfigError(message) from error
    requests = (
        GenerationRequest(f"text-{index}", one.token_ids) for index, one in enumerate(encoded)
    )
    done = list(complete_in_order(running.engine, requests, max_ahead=4 * settings.max_texts))
    vectors = [one.embedding for one in done if one.embedding is not None]
    if len(vectors) < len(texts):
        typer.secho("error: the engine failed; see above", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)
    return encoded, np.stack(vectors)


def _print(
    texts: Sequence[str], encoded: Sequence[EncodedText], vectors: npt.NDArray[np.float32]
) -> None:
    for text, one, vector in zip(texts, encoded, vectors, strict=True):
        row = {
            "text": text,
            "num_tokens": len(one.token_ids),
            "truncated": one.is_cut,
            # A float32 as short as it can be written, not as the double that it becomes.
            "embedding": [float(str(number)) for number in vector],
        }
        typer.echo(json.dumps(row, ensure_ascii=False))


def _write(path: Path, vectors: npt.NDArray[np.float32]) -> None:
    import numpy as np

    try:
        with path.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error


def _read_lines(path: Path | None) -> list[str]:
    """The lines of a file; a last one that is empty does not count."""
    try:
        text = sys.stdin.read() if str(path) == "-" else Path(str(path)).read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--input {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input {path} is not UTF-8 at byte {error.start}") from error
    if not text:
        raise ConfigError(f"--input {path} holds no text")
    return text.removesuffix("\n").split("\n")
