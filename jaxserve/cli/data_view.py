"""What `jaxserve data` shows: a progress bar, a split's sizes, an example's text."""

from __future__ import annotations

import time
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxserve.trainer.data.dataset import TokenDataset
from models.tokenizer import Tokenizer


class ProgressView:
    """A bar on standard error: bytes, rate, time left, and tokens a second where known."""

    def __init__(self, title: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[tokens]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(title, total=None, tokens="")
        self._begin: tuple[float, int] | None = None

    def show(self, done_bytes: int, total_bytes: int, num_tokens: int | None) -> None:
        """Moves the bar. Tokens a second count from the first call: resumed work is not new."""
        tokens = "" if num_tokens is None else self._rate(num_tokens)
        self._bar.update(self._task, completed=done_bytes, total=total_bytes, tokens=tokens)

    def _rate(self, num_tokens: int) -> str:
        now_s = time.monotonic()
        if self._begin is None:
            self._begin = (now_s, num_tokens)
        elapsed_s = now_s - self._begin[0]
        rate = (num_tokens - self._begin[1]) / elapsed_s if elapsed_s > 0 else 0.0
        return f"{num_tokens / 1e6:.1f}M tokens, {rate / 1e3:.0f}k/s"

    def __enter__(self) -> ProgressView:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


def describe(dataset: TokenDataset) -> str:
    """One line on a split."""
    split = dataset.manifest.splits[dataset.split]
    room = dataset.num_examples * dataset.seq_len
    fill = min(split.num_tokens, room) / room
    return (
        f"{dataset.split}: {split.num_examples} examples, {split.num_documents} documents, "
        f"{split.num_tokens} tokens, {split.num_targets} targets, {fill:.1%} filled, "
        f"fingerprint {dataset.fingerprint[:16]}"
    )


def render_example(dataset: TokenDataset, example: int, tokenizer: Tokenizer) -> str:
    """An example's text: runs of targets that are learnt stand between » and «."""
    rows = dataset.read(np.array([example], np.int64))
    is_learnt = rows.weights[0].astype(bool)
    is_used = rows.segment_ids[0] > 0
    tokens = rows.targets[0][is_used]
    edges = np.flatnonzero(np.diff(is_learnt[is_used].astype(np.int8), prepend=0, append=0))
    text, place = "", 0
    for begin, end in edges.reshape(-1, 2).tolist():
        text += tokenizer.decode(tokens[place:begin].tolist(), skip_special_tokens=False)
        learnt = tokenizer.decode(tokens[begin:end].tolist(), skip_special_tokens=False)
        text += f"»{learnt}«"
        place = end
    text += tokenizer.decode(tokens[place:].tolist(), skip_special_tokens=False)
    return f"--- {dataset.split} {example}\n{text}"
