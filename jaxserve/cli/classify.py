"""`jaxserve classify`: labels of texts without a server, and how good a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
DataOption = Annotated[Path, typer.Option(help="The data set that it was trained on.")]


@app.callback()
def classify() -> None:
    """Use a run of extreme classification.

    Examples:

    jaxserve classify texts runs/wordnet "an animal that barks"

    jaxserve classify fuse runs/wordnet-labels --data data/wordnet

    jaxserve classify measure runs/wordnet-labels --data data/wordnet

    jaxserve classify index runs/wordnet-labels --data data/wordnet
    """


@app.command()
def texts(
    run: RunArgument,
    text: Annotated[list[str], typer.Argument(help="Texts, each for a line of JSON.")],
    top_k: Annotated[int, typer.Option(min=1, help="Labels of each text.")] = 5,
) -> None:
    """Print the best labels of texts."""
    from jaxserve.model_store import resolve
    from jaxserve.xc.dataset import tokenise
    from jaxserve.xc.evaluation import embed
    from jaxserve.xc.retrieval import retrieve
    from jaxserve.xc.served import open_served
    from models.tokenizer import Tokenizer

    served = open_served(Path(resolve(str(run))))
    params = served.load_params("float32")
    tokenizer = Tokenizer.from_folder(served.path / "tokenizer")
    spec = served.model.spec
    points = embed(spec, params["encoder"], tokenise(tokenizer, text, spec.max_tokens))
    num_labels = min(top_k, served.model.num_labels)
    ranking = served.load_ranking()
    if ranking is None:
        scores, ids = retrieve(points, params["labels"], num_labels)
    else:
        scores, ids = ranking.index.search(points, num_labels)
    names = served.label_texts()
    for one, own_scores, own_ids in zip(text, scores.tolist(), ids.tolist(), strict=True):
        labels = [
            {"id": label, "text": names[label], "score": score}
            for label, score in zip(own_ids, own_scores, strict=True)
            if label >= 0
        ]
        typer.echo(json.dumps({"text": one, "labels": labels}))


@app.command()
def fuse(run: RunArgument, data: DataOption) -> None:
    """Choose on validation data how much the labels' embeddings count; the run keeps it."""
    from jaxserve.xc.dataset import XcDataset
    from jaxserve.xc.evaluation import fuse as choose
    from jaxserve.xc.model_folder import FUSION_FILE, open_xc_model, write_json

    fusion = choose(open_xc_model(run), XcDataset(data))
    for weight, precision in fusion.tried.items():
        typer.echo(f"weight {weight}: P@1 {precision:.2f} % of the validation points")
    write_json(run / FUSION_FILE, {"weight": fusion.weight})
    typer.echo(f"{run} now has weight {fusion.weight}")


@app.command()
def index(
    run: RunArgument,
    data: Annotated[
        Path | None,
        typer.Option(help="The data set: how much the index finds is measured on its validation."),
    ] = None,
    num_links: Annotated[int, typer.Option(min=1, help="Neighbours of a label.")] = 16,
    build_width: Annotated[
        int, typer.Option(min=1, help="Labels in view while one is linked.")
    ] = 128,
    search_width: Annotated[
        int, typer.Option(min=1, help="Labels in view in a search: more is slower, finds more.")
    ] = 300,
    remove: Annotated[bool, typer.Option("--remove", help="Look at all labels again.")] = False,
) -> None:
    """Make an index of the labels, so that a text need not be compared with all of them.

    `serve` and `classify texts` use it from then on. It is worth it beyond a few hundred thousand
    labels. Some labels are missed: --data says how many.
    """
    from jaxserve.xc.index_building import build_index
    from jaxserve.xc.label_index import IndexSettings, remove_index

    if remove:
        typer.echo(f"{run} {'has no index any more' if remove_index(run) else 'had no index'}")
        return
    settings = IndexSettings(
        num_links=num_links, build_width=build_width, search_width=search_width
    )
    report = build_index(run, settings, data)
    typer.echo(f"{run}: index of {report.num_labels} labels made in {report.build_s:.1f} s")
    if report.recall is not None:
        typer.echo(
            f"it finds {100 * report.recall:.2f} % of the {report.num_ranked} best labels of "
            f"{report.num_points} validation points"
        )


@app.command()
def measure(
    run: RunArgument,
    data: DataOption,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> None:
    """Print all measures of a run, in percent."""
    from jaxserve.xc.dataset import XcDataset
    from jaxserve.xc.evaluation import measure as measure_run
    from jaxserve.xc.model_folder import open_xc_model
    from jaxserve.xc.raw_data import SPLITS

    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is none of {', '.join(SPLITS)}", param_hint="--split")
    found = measure_run(open_xc_model(run), XcDataset(data), split)
    for name, value in found.items():
        typer.echo(f"{name:12} {value:6.2f}")
