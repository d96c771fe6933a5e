"""encode_sources: the long part of a preparation, from records to token files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.trainer.data.blocks import Block, read_blocks
from jaxserve.trainer.data.cache_format import SPLITS
from jaxserve.trainer.data.encode_pool import EncodePool
from jaxserve.trainer.data.encoding import LEFT_OUT, Encoded, EncoderSettings
from jaxserve.trainer.data.journal import Journal
from jaxserve.trainer.data.mixing import GOLDEN_64, mix64_int
from jaxserve.trainer.data.prepare_config import PrepareConfig
from jaxserve.trainer.data.sources import SourceFile
from jaxserve.trainer.data.token_files import SplitSizes, SplitWriter


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done: bytes of the sources (as they lie on the disk) and tokens written."""

    done_bytes: int
    total_bytes: int
    num_tokens: int


ShowProgress = Callable[[Progress], None]
Writers = Mapping[str, SplitWriter]


def encode_sources(
    config: PrepareConfig,
    sources: Sequence[SourceFile],
    work: Path,
    token_type: np.dtype[Any],
    journal: Journal,
    show: ShowProgress,
    commit_every_s: float,
) -> Journal:
    """Encodes everything after the journal's position into `work`.

    Returns the journal of the finished token files. Raises DataError, with the place, for
    a malformed record; what came before it stays for the next run.
    """
    settings = EncoderSettings(config.kind, config.seq_len + 1, config.overlong)
    done_bytes = sum(source.num_bytes for source in sources[: journal.position.source])
    total_bytes = sum(source.num_bytes for source in sources)
    committed_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                SplitWriter(
                    work / split,
                    token_type,
                    has_weights=config.kind == "chat",
                    sizes=journal.sizes.get(split, SplitSizes()),
                )
            )
            for split in splits_of(config)
        }
        pool = stack.enter_context(EncodePool(config.num_workers, work / "tokenizer", settings))
        blocks = read_blocks(sources, config.value_field, journal.position)
        for block, encoded in pool.encode(blocks):
            journal = _append(writers, journal, block, encoded, config.eval_fraction)
            num_tokens = sum(writer.sizes.num_tokens for writer in writers.values())
            show(Progress(done_bytes + block.bytes_read, total_bytes, num_tokens))
            if block.source_sha256 is not None:
                done_bytes += block.bytes_read
            if time.monotonic() - committed_s >= commit_every_s:
                _commit(work, writers, journal)
                committed_s = time.monotonic()
        _commit(work, writers, journal)
    return journal


def splits_of(config: PrepareConfig) -> tuple[str, ...]:
    """The splits that a preparation makes."""
    return SPLITS if config.eval_fraction > 0 else SPLITS[:1]


def split_of(document: int, eval_fraction: float) -> str:
    """Where the `document`-th document of all goes: a pseudo-random share of them to eval."""
    is_eval = mix64_int((document + 1) * GOLDEN_64) < eval_fraction * 2**64
    return SPLITS[1] if is_eval else SPLITS[0]


def _append(
    writers: Writers, journal: Journal, block: Block, encoded: Encoded, eval_fraction: float
) -> Journal:
    num_documents = journal.num_documents
    stops = np.cumsum(np.maximum(encoded.lengths, 0))
    for is_start, length, stop in zip(
        block.starts, encoded.lengths.tolist(), stops.tolist(), strict=True
    ):
        num_documents += is_start
        if length == LEFT_OUT:
            continue
        split = split_of(num_documents - 1, eval_fraction)
        span = slice(stop - length, stop)
        writers[split].append(encoded.tokens[span], encoded.weights[span], is_start=is_start)
    counts = dict(journal.counts)
    for reason, number in encoded.counts.items():
        counts[reason] = counts.get(reason, 0) + number
    digest = block.source_sha256
    return replace(
        journal,
        position=block.end,
        num_documents=num_documents,
        counts=counts,
        source_sha256=journal.source_sha256 if digest is None else (*journal.source_sha256, digest),
    )


def _commit(work: Path, writers: Writers, journal: Journal) -> None:
    """Files first, then the journal that vouches for them."""
    for writer in writers.values():
        writer.sync()
    sizes = {split: writer.sizes for split, writer in writers.items()}
    replace(journal, sizes=sizes).write(work)
