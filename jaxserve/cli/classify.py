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
    scores, ids = retrieve(points, params["labels"], min(top_k, served.model.num_labels))
    names = served.label_texts()
    for one, own_scores, own_ids in zip(text, scores.tolist(), ids.tolist(), strict=True):
        labels = [
            {"id": label, "text": names[label], "score": score}
            for label, score in zip(own_ids, own_scores, strict=True)
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
