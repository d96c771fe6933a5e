"""`jaxserve data`: prepares training data once, and tells what a prepared set holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jaxserve.cli import data_xc
from jaxserve.cli.data_view import ProgressView, describe, render_example
from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.data.encode_sources import Progress
from jaxserve.trainer.data.prepare import prepare as prepare_data
from jaxserve.trainer.data.prepare_config import PrepareConfig
from jaxserve.trainer.data.tokenizer_source import load_tokenizer

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(data_xc.app, name="xc")

_DEFAULTS = PrepareConfig(sources=(Path(),), out=Path())


@app.callback()
def data() -> None:
    """Prepare training data once; look into what was prepared.

    Examples:

    jaxserve data prepare books/ --out data/books --tokenizer smollm2-135m-instruct

    jaxserve data prepare chats.jsonl.zst --kind chat --out data/chats --tokenizer model.gguf

    jaxserve data inspect data/chats --show 2

    jaxserve data xc wordnet-hypernyms --out data/wordnet
    """


@app.command()
def prepare(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="Files or folders: .txt .md .jsonl .parquet, the first three also .gz or .zst.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    tokenizer: Annotated[
        str, typer.Option(help="Model whose tokenizer to use: name, GGUF file or folder.")
    ],
    seq_len: Annotated[int, typer.Option(help="Positions a row.")] = _DEFAULTS.seq_len,
    kind: Annotated[
        str, typer.Option(help="text: learn every token. chat: learn the assistant's answers.")
    ] = _DEFAULTS.kind,
    file_format: Annotated[
        str, typer.Option("--format", help="auto (by ending), text, jsonl or parquet.")
    ] = _DEFAULTS.file_format,
    field: Annotated[
        str | None,
        typer.Option(help="JSON field or column to read [default: text, for chats messages]"),
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(help="Share of the documents for the eval split; 0: none.")
    ] = _DEFAULTS.eval_fraction,
    overlong: Annotated[
        str, typer.Option(help="Chats longer than a row: truncate or drop. Both are counted.")
    ] = _DEFAULTS.overlong,
    pack: Annotated[
        bool, typer.Option("--pack/--no-pack", help="Several chats a row, or one.")
    ] = _DEFAULTS.pack,
    workers: Annotated[
        int, typer.Option(help="Processes that encode. The result does not depend on it.")
    ] = _DEFAULTS.num_workers,
    force: Annotated[
        bool, typer.Option("--force", help="Replace --out, and unfinished work of other options.")
    ] = False,
) -> None:
    """Tokenise and pack text or chats into a folder that `jaxserve train` reads.

    Can be stopped at any moment: the same command goes on where it stopped, and the result
    is the same to the byte. OUT appears when it is complete.

    A text file is one document; in JSONL and Parquet each record is one. Chats are lists of
    {"role": ..., "content": ...} and pass through the model's chat template.

    Example: jaxserve data prepare corpus.jsonl --out data/corpus --tokenizer smollm2-135m-instruct
    """
    config = PrepareConfig(
        sources=tuple(sources),
        out=out,
        seq_len=seq_len,
        kind=kind,
        file_format=file_format,
        field=field,
        eval_fraction=eval_fraction,
        overlong=overlong,
        pack=pack,
        num_workers=workers,
        force=force,
    )
    with ProgressView(f"Preparing {out.name}") as view:

        def show(done: Progress) -> None:
            view.show(done.done_bytes, done.total_bytes, done.num_tokens)

        prepare_data(config, load_tokenizer(tokenizer), show)
    for split in TokenDataset(out).manifest.splits:
        typer.echo(describe(TokenDataset(out, split)))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that `data prepare` made.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare digests.")
    ] = False,
    show: Annotated[int, typer.Option(min=0, help="Print this many examples of a split.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest, for programs.")] = False,
) -> None:
    """Print what a prepared data set holds: splits, sizes, fill, sources, what was left out.

    Example: jaxserve data inspect data/corpus --verify --show 1
    """
    splits = [TokenDataset(folder, split) for split in TokenDataset(folder).manifest.splits]
    if verify:
        for dataset in splits:
            with ProgressView(f"Verifying {dataset.split}") as view:
                dataset.verify(lambda done, total, view=view: view.show(done, total, None))  # type: ignore[misc]
    if as_json:
        fields = asdict(splits[0].manifest)
        fields["fingerprints"] = {dataset.split: dataset.fingerprint for dataset in splits}
        typer.echo(json.dumps(fields, indent=1, sort_keys=True))
        return
    manifest = splits[0].manifest
    typer.echo(
        f"{folder}: {manifest.kind}, rows of {manifest.seq_len}, vocabulary {manifest.vocab_size}"
    )
    for dataset in splits:
        typer.echo(describe(dataset))
    for source in manifest.sources:
        typer.echo(f"source {source['name']}: {source['num_bytes']} bytes, {source['sha256']}")
    for reason, number in manifest.counts.items():
        typer.echo(f"{reason}: {number}")
    if verify:
        typer.echo("all digests are right")
    if show:
        tokenizer = load_tokenizer(str(folder))
        for dataset in splits:
            for example in range(min(show, dataset.num_examples)):
                typer.echo(render_example(dataset, example, tokenizer))
