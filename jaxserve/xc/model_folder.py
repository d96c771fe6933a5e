"""A run of extreme classification as a model: what lies beside its checkpoints, and is read back.

DIR/
    model.json      stage, encoder's shape, number of labels, and the run that has the encoder
    tokenizer/      of points and labels
    labels.txt      a label's text a line
    fusion.json     how much the labels' embeddings count beside their classifiers
    checkpoints/    params/...: the encoder's, or params/classifiers
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.param_loading import unflatten
from checkpoint.store import StoreReader
from checkpoint.store.durable import fsync_path
from checkpoint.store_source import StoreSource
from jaxserve.xc.config import Stage
from jaxserve.xc.dataset import LABEL_FILE, XcDataset
from jaxserve.xc.encoders import EncoderSpec, Tree
from models.json_file import read_json

FORMAT = "jaxserve-xc-model-1"
MODEL_FILE = "model.json"
FUSION_FILE = "fusion.json"
CLASSIFIERS = "classifiers"


@dataclass(frozen=True)
class XcModel:
    """A model folder that has been read, without its arrays.

    Attributes:
        folder: of the run.
        stage: which of the two it trained.
        encoder: the shape.
        encoder_run: folder of the run that has the encoder's parameters; `folder` for stage
            "encoder".
        encoder_digest: of those parameters; None for stage "encoder".
        num_labels: L.
    """

    folder: Path
    stage: Stage
    encoder: EncoderSpec
    encoder_run: Path
    encoder_digest: str | None
    num_labels: int

    def read_encoder(self, step: int | None = None) -> Tree:
        """The encoder's parameters on the host.

        Args:
            step: of stage "encoder": which checkpoint; None: the newest good one.

        Raises:
            FormatError: they are not those that the classifiers were trained on.
            StoreError: no checkpoint is whole.
        """
        params = read_params(self.encoder_run, step if self.stage == "encoder" else None)
        if self.encoder_digest is not None and digest_of(params) != self.encoder_digest:
            raise FormatError(
                f"{self.folder} has classifiers of another encoder than {self.encoder_run} has "
                "now: bring that run back as it was, or train the classifiers anew"
            )
        return params

    def read_classifiers(self, step: int | None = None) -> npt.NDArray[np.float32]:
        """The labels' vectors as trained, float32[L, D]; of stage "classifiers" only."""
        kernel: npt.NDArray[np.float32] = read_params(self.folder, step)[CLASSIFIERS]
        return kernel

    def label_texts(self) -> list[str]:
        """One a label."""
        return (self.folder / LABEL_FILE).read_text(encoding="utf-8").split("\n")[:-1]

    def fusion_weight(self) -> float:
        """What was chosen on validation data; 0, classifiers alone, unless it was."""
        fields = read_json(self.folder / FUSION_FILE)
        return 0.0 if fields is None else float(fields["weight"])


def is_xc_model(folder: Path) -> bool:
    """Whether a folder says that it is one."""
    fields = read_json(folder / MODEL_FILE)
    return fields is not None and fields.get("format") == FORMAT


def open_xc_model(folder: str | Path) -> XcModel:
    """Reads a model folder.

    Raises:
        FormatError: it is none.
    """
    folder = Path(folder)
    fields = read_json(folder / MODEL_FILE)
    if fields is None or fields.get("format") != FORMAT:
        raise FormatError(
            f"{folder} is no run of extreme classification: `jaxserve train` with task = "
            '"extreme_classification" makes one'
        )
    run = fields.get("encoder_run")
    return XcModel(
        folder=folder,
        stage=fields["stage"],
        encoder=EncoderSpec.from_json(fields["encoder"]),
        encoder_run=folder if run is None else Path(run),
        encoder_digest=fields.get("encoder_digest"),
        num_labels=fields["num_labels"],
    )


def write_xc_model(
    folder: Path,
    stage: Stage,
    encoder: EncoderSpec,
    dataset: XcDataset,
    encoder_run: Path | None,
    encoder_digest: str | None,
) -> None:
    """Makes a run's folder a model folder; `model.json` comes last."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        shutil.copytree(dataset.tokenizer_folder, tokenizer)
    shutil.copyfile(dataset.folder / LABEL_FILE, folder / LABEL_FILE)
    fields: dict[str, Any] = {
        "format": FORMAT,
        "stage": stage,
        "encoder": encoder.to_json(),
        "num_labels": dataset.num_labels,
    }
    if encoder_run is not None:
        fields |= {"encoder_run": str(encoder_run), "encoder_digest": encoder_digest}
    write_json(folder / MODEL_FILE, fields)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(json.dumps(fields, indent=2) + "\n")
    fsync_path(staged)
    staged.replace(path)
    fsync_path(path.parent)


def read_params(run: Path, step: int | None = None) -> Tree:
    """The parameters in a run's checkpoint, verified; by default in the newest good one."""
    opened = StoreReader(run / "checkpoints").open_step(step)
    try:
        tensors = StoreSource(opened)
        return unflatten({name: tensors.read(name) for name in tensors.names()})
    finally:
        opened.close()


def digest_of(params: Tree) -> str:
    """SHA-256, hex, of all arrays with their names."""
    digest = hashlib.sha256()
    for name, array in sorted(_leaves(params).items()):
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _leaves(tree: Tree, prefix: str = "") -> dict[str, npt.NDArray[Any]]:
    leaves: dict[str, npt.NDArray[Any]] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{name}/")
        else:
            leaves[prefix + name] = np.asarray(value)
    return leaves
