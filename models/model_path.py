"""`DIR@STEP`: a model folder and one of its checkpoints, as people write it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_STEP = re.compile(r"(?P<folder>.+)@(?P<step>\d{1,12})")


def split_step(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The path and the step, which is None when none is named.

    A path that exists as it is written is never cut.
    """
    text = os.fspath(path)
    match = _STEP.fullmatch(text)
    if match is None or Path(text).exists():
        return Path(text), None
    return Path(match["folder"]), int(match["step"])
