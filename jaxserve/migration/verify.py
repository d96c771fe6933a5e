"""Verify: whether a model on disk is what was written, as far as anything can tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.migrate.manifest import file_problems, load_manifest
from checkpoint.migrate.parts import FileParts
from checkpoint.migrate.plan import Plan
from checkpoint.store import StoreError, StoreReader
from jaxserve.migration.arrays import kept_dtype, problems, raw_array
from jaxserve.migration.source import SourceModel, open_source
from models.checkpoint_model import CHECKPOINTS, is_model_folder, read_model_config
from models.model_path import split_step

ZERO_RUN_BYTES = 64 << 10
"""A float tensor with so many zero bytes on end looks like a hole of a download."""
WINDOW_BYTES = 16 << 20


class Verdict(StrEnum):
    """The outcome."""

    VERIFIED = "verified"
    """Digests vouch for every byte."""
    SOUND = "sound"
    """The structure is right; nothing vouches for the values."""
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        verdict: the outcome.
        problems: what is wrong.
        warnings: what looks odd and may be right.
        checked: what was compared with what.
    """

    verdict: Verdict
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    checked: str


def verify_model(path: Path) -> Verification:
    """Check a model in any format; changes nothing.

    Raises:
        FileNotFoundError: nothing is there.
        StoreUnreadable, OSError: the system refuses to read.
    """
    folder, step = split_step(path)
    if not folder.exists():
        raise FileNotFoundError(f"nothing is at {folder}")
    try:
        manifest = load_manifest(folder)
    except FormatError as error:
        return Verification(Verdict.DAMAGED, (str(error),), (), "the manifest")
    found: list[str] = [] if manifest is None else file_problems(folder, manifest)
    checked = [] if manifest is None else [f"{len(manifest.files)} files with the manifest"]
    if is_model_folder(folder):
        found += _config_problems(folder)
        found += _step_problems(folder, step)
        checked.append("every array of the checkpoint with its digest")
        return _verification(found, (), checked, is_vouched=True)
    if manifest is not None:
        return _verification(found, (), checked, is_vouched=True)
    try:
        source = open_source(path)
    except (FormatError, StoreError) as error:
        return Verification(Verdict.DAMAGED, (str(error),), (), "the structure")
    try:
        found += problems(source)
        warnings = [] if found else list(_oddities(source))
    except FormatError as error:
        found.append(str(error))
        warnings = []
    finally:
        source.close()
    return _verification(found, tuple(warnings), ["the structure"], is_vouched=False)


def _verification(
    found: list[str], warnings: tuple[str, ...], checked: list[str], *, is_vouched: bool
) -> Verification:
    verdict = Verdict.VERIFIED if is_vouched else Verdict.SOUND
    return Verification(
        Verdict.DAMAGED if found else verdict, tuple(found), warnings, ", ".join(checked)
    )


def _config_problems(folder: Path) -> list[str]:
    try:
        read_model_config(folder)
    except FormatError as error:
        return [str(error)]
    return []


def _step_problems(folder: Path, step: int | None) -> Iterator[str]:
    """Of one step, or of the newest."""
    try:
        reader = StoreReader(folder / CHECKPOINTS)
        steps = reader.steps() if step is None else [step]
        if not steps:
            yield "there is no checkpoint"
            return
        report = reader.verify(steps[-1])
    except StoreError as error:
        yield str(error)
        return
    for problem in report.problems:
        yield f"step {steps[-1]}: {problem}"


def _oddities(source: SourceModel) -> Iterator[str]:
    """NaN, infinity and long runs of zero bytes."""
    assert isinstance(source.parts, FileParts)
    names = {piece.array for piece in source.pieces.values()}
    for name in sorted(names):
        array = raw_array(source, name, name)
        array = type(array)(name, array.shape, kept_dtype(source, name), array.parts)
        num_odd, longest = 0, 0
        plan = Plan((array,), {}, (), WINDOW_BYTES)
        for window in plan.windows(source.parts):
            rows = (slice(window.start, window.stop),) if array.shape else ()
            index = (*rows, *(slice(0, size) for size in array.shape[1:]))
            values = np.ascontiguousarray(source.parts.read_part(name, index))
            num_odd += int(values.size - np.isfinite(values.astype(np.float32)).sum())
            longest = max(longest, _longest_zero_run(values.reshape(-1).view(np.uint8)))
        if num_odd:
            yield f"{name}: {num_odd} values are NaN or infinite"
        if longest >= ZERO_RUN_BYTES:
            yield f"{name}: {longest} zero bytes on end; was the download whole?"


def _longest_zero_run(data: npt.NDArray[np.uint8]) -> int:
    """In whole pages of 4096 bytes."""
    pages = data[: len(data) // 4096 * 4096].reshape(-1, 4096)
    longest = run = 0
    for is_zero in (pages.max(axis=1, initial=0) == 0).tolist():
        run = run + 1 if is_zero else 0
        longest = max(longest, run)
    return longest * 4096
