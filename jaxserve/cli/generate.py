"""`jaxserve generate`: completes a prompt, or a file of prompts, without a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxserve.cli.engine_options import with_engine_options
from jaxserve.cli.local_engine import local_engine
from jaxserve.cli.sampling_options import with_sampling_options
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from jaxserve.engine.offline import Completion
    from jaxserve.engine.prompt_record import BadRecord, ParsedLine
    from jaxserve.engine.startup import RunningEngine

app = typer.Typer(add_completion=False)

_MAX_BAD_LINES_SHOWN = 10
# Enough work queued that no slot falls empty while a long output is at the head.
_AHEAD_PER_SEQUENCE = 4

_FILE = "Files"


class OnError(StrEnum):
    stop = "stop"
    skip = "skip"


@app.command()
@with_engine_options
@with_sampling_options
def generate(
    engine_config: EngineConfig,
    sampling: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="Text to answer or to go on from.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, - for standard input. Each is "
            '{"id", "prompt" or "prompt_token_ids" or "messages", sampling fields}.',
            metavar="FILE",
            rich_help_panel=_FILE,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where the results go, - for standard output: JSON lines in the order of the "
            "input. They gather in FILE.partial, which can be tailed, until all are there.",
            metavar="FILE",
            rich_help_panel=_FILE,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output file.", rich_help_panel=_FILE)
    ] = False,
    on_error: Annotated[
        OnError,
        typer.Option(
            help="On a bad line: stop before anything is generated, or skip it and write "
            '{"id", "error"} in its place.',
            rich_help_panel=_FILE,
        ),
    ] = OnError.stop,
    adapter: Annotated[
        str,
        typer.Option(help="Name of one of --lora, for every prompt.", show_default="none"),
    ] = "",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt through the model's chat template, or not.",
            show_default="for a PROMPT if the model has one; not for files",
        ),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print a PROMPT's result as one JSON line.")
    ] = False,
) -> None:
    """Complete a prompt, or a file of prompts, without a server.

    Sampling options hold for every line of a file that does not set its own. A
    line may also set logit_bias, allowed_token_ids, bad_token_ids, prompt_logprobs,
    include_stop_str_in_output and skip_special_tokens.

    Examples:

        jaxserve generate "Why is the sky blue?"

        jaxserve generate "SELECT" --lora sql=adapters/sql --adapter sql

        jaxserve generate --input prompts.jsonl --output answers.jsonl --temperature 0
    """
    if adapter and adapter not in dict(engine_config.lora):
        raise ConfigError(f"--adapter {adapter}: no --lora has this name")
    if (prompt is None) == (input is None):
        raise ConfigError("give either a PROMPT or --input FILE")
    if prompt is not None:
        if output is not None:
            raise ConfigError("--output goes with --input; a PROMPT's answer is printed")
        with local_engine(engine_config) as running:
            _complete_prompt(
                running, prompt, sampling, adapter=adapter, chat=chat, as_json=json_output
            )
        return
    if output is None or input is None:
        raise ConfigError("--input needs --output FILE (- prints the results)")
    lines = _parse(_read_lines(input), sampling, on_error)
    with (
        _open_output(output, overwrite=overwrite) as file,
        local_engine(engine_config) as running,
    ):
        _complete_file(running, lines, file, adapter=adapter, chat=bool(chat), on_error=on_error)


def _complete_prompt(
    running: RunningEngine,
    prompt: str,
    sampling: dict[str, Any],
    *,
    adapter: str,
    chat: bool | None,
    as_json: bool,
) -> None:
    from jaxserve.engine.offline import join_outputs, stream
    from jaxserve.engine.prompt_record import completion_record, encode_prompt
    from jaxserve.engine.request import GenerationRequest
    from jaxserve.engine.sampling_json import sampling_from_json

    tokenizer = running.tokenizer
    use_chat = tokenizer.has_chat_template if chat is None else chat
    request = GenerationRequest(
        "prompt",
        encode_prompt(tokenizer, prompt, chat=use_chat),
        sampling_from_json(sampling),
        adapter=adapter,
    )
    outputs = []
    for one in stream(running.engine, request):
        outputs.append(one)
        if not as_json:
            typer.echo(one.text, nl=False)
            sys.stdout.flush()
    completion = join_outputs(outputs)
    if as_json:
        typer.echo(json.dumps(completion_record("prompt", completion), ensure_ascii=False))
    else:
        typer.echo()
        _print_logprobs(running, completion)
    _fail_on_error([completion])


def _print_logprobs(running: RunningEngine, completion: Completion) -> None:
    decode = running.tokenizer.decode
    for entry in completion.logprobs:
        others = "  ".join(
            f"{decode([token_id], skip_special_tokens=False)!r} {logprob:.3f}"
            for token_id, logprob in entry.top
        )
        token = decode([entry.token_id], skip_special_tokens=False)
        typer.echo(f"{token!r} {entry.logprob:.3f} (rank {entry.rank})  {others}".rstrip())


def _parse(
    lines: Sequence[str], sampling: dict[str, Any], on_error: OnError
) -> list[ParsedLine | BadRecord]:
    """Finds what can be found without a model, which takes seconds to load."""
    from jaxserve.engine.prompt_record import BadRecord, parse_lines

    parsed = list(parse_lines(lines, sampling_defaults=sampling))
    if on_error is OnError.stop:
        _refuse_bad_lines([line for line in parsed if isinstance(line, BadRecord)])
    return parsed


def _complete_file(
    running: RunningEngine,
    lines: Sequence[ParsedLine | BadRecord],
    file: IO[str],
    *,
    adapter: str,
    chat: bool,
    on_error: OnError,
) -> None:
    from jaxserve.engine.offline import complete_in_order
    from jaxserve.engine.prompt_record import (
        BadRecord,
        PromptRecord,
        completion_record,
        encode_lines,
    )

    engine = running.engine
    records = list(encode_lines(lines, running.tokenizer, engine.validate, chat=chat))
    good = [record for record in records if isinstance(record, PromptRecord)]
    if on_error is OnError.stop:
        _refuse_bad_lines([record for record in records if isinstance(record, BadRecord)])
    completions = complete_in_order(
        engine,
        (replace(record.request, adapter=adapter) for record in good),
        max_ahead=_AHEAD_PER_SEQUENCE * running.report.settings.num_seqs,
    )
    failed = []
    with _progress(len(records)) as advance:
        for record in records:
            if isinstance(record, PromptRecord):
                completion = next(completions)
                row = completion_record(record.id, completion)
                failed += [completion] if completion.finish_reason == "error" else []
            else:
                row = {"id": record.id, "error": str(record.error)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            advance()
    _fail_on_error(failed)


def _refuse_bad_lines(bad: Sequence[BadRecord]) -> None:
    messages = [
        f"line {record.line_number}: {record.error}" for record in bad[:_MAX_BAD_LINES_SHOWN]
    ]
    if len(bad) > _MAX_BAD_LINES_SHOWN:
        messages.append(f"and {len(bad) - _MAX_BAD_LINES_SHOWN} more")
    if messages:
        raise InvalidRequest(
            "--input",
            "\n  ".join(
                ["nothing was generated; mend these lines or use --on-error skip:", *messages]
            ),
        )


def _fail_on_error(completions: Sequence[Completion]) -> None:
    if any(completion.finish_reason == "error" for completion in completions):
        typer.secho("error: the engine failed; see above", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)


def _read_lines(path: Path) -> list[str]:
    try:
        if str(path) == "-":
            return sys.stdin.read().split("\n")
        # Not splitlines(): a JSON string may hold other line separators.
        return path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"--input {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input {path} is not UTF-8 at byte {error.start}") from error


@contextmanager
def _open_output(path: Path, *, overwrite: bool) -> Iterator[IO[str]]:
    """A file that takes its name only when all is written."""
    if str(path) == "-":
        yield sys.stdout
        return
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path} exists: choose another name or add --overwrite")
    partial = path.with_name(path.name + ".partial")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error
    complete = False
    try:
        with file:
            yield file
        partial.replace(path)
        complete = True
    finally:
        if not complete:
            if partial.stat().st_size:
                typer.echo(f"what was finished is in {partial}", err=True)
            else:
                partial.unlink()


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A progress bar on standard error if that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("Generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
