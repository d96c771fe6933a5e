"""prepare: from source files to a data set, resumable, published whole or not at all.

Work happens in `.OUT.preparing` beside OUT. Blocks of records are encoded by worker processes
and appended in order; every few seconds the files are forced to the disk and the journal says
how far they are good. A later run with the same plan cuts the files back to that point and
goes on. Rows are made from the finished token files, digests are taken, and the folder is
renamed to OUT.

Memory is bounded whatever the sources' size: a reader holds one line or piece, the pool
BLOCKS_A_WORKER blocks a worker, the writers their buffers, packing one chunk of rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxserve.trainer.data.cache_format import Manifest
from jaxserve.trainer.data.encode_sources import ShowProgress, encode_sources
from jaxserve.trainer.data.encoding import check_tokenizer, tokenizer_digest
from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.journal import (
    JOURNAL_NAME,
    PLAN_NAME,
    Journal,
    check_plan,
    read_journal,
    sync_folder,
    write_durably,
)
from jaxserve.trainer.data.prepare_config import PrepareConfig
from jaxserve.trainer.data.seal import seal, token_type_of
from jaxserve.trainer.data.sources import SourceFile, find_sources
from models.tokenizer import Tokenizer
from models.tokenizer_files import save_tokenizer

COMMIT_EVERY_S = 2.0


def prepare(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    show: ShowProgress = lambda _: None,
    commit_every_s: float = COMMIT_EVERY_S,
) -> Manifest:
    """Makes `config.out`, going on where an earlier, unfinished run stopped.

    Args:
        config: what to do.
        tokenizer: encodes; stored beside the tokens.
        show: called now and then.
        commit_every_s: how much work a kill may cost.

    Raises:
        DataError: `out` exists, malformed sources (the message names file and line), other
            unfinished work there, the disk is full.
        TokenizerError: a tokenizer without end token or chat template.
    """
    if config.out.exists() and not config.force:
        raise DataError(f"{config.out} exists; give another --out, or --force to replace it")
    check_tokenizer(tokenizer, config.kind)
    sources = find_sources(config.sources, config.file_format)
    work = config.out.parent / f".{config.out.name}.preparing"
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(work):
            return _prepare(config, tokenizer, sources, work, show, commit_every_s)
    except OSError as error:
        raise DataError(
            f"{config.out} cannot be written: {error.strerror or error}; mend that, and the same "
            f"command goes on with what is in {work}"
        ) from None


def _prepare(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    sources: list[SourceFile],
    work: Path,
    show: ShowProgress,
    commit_every_s: float,
) -> Manifest:
    journal = _open_work(work, _plan(config, sources, tokenizer), tokenizer, config.force)
    token_type = token_type_of(tokenizer.vocab_size)
    journal = encode_sources(config, sources, work, token_type, journal, show, commit_every_s)
    manifest = seal(config, sources, work, tokenizer, token_type, journal)
    _publish(work, config.out)
    return manifest


def _plan(config: PrepareConfig, sources: list[SourceFile], tokenizer: Tokenizer) -> dict[str, Any]:
    """All that unfinished work must have been begun with, to be gone on with."""
    files = [[str(source.path.resolve()), source.num_bytes, source.mtime_ns] for source in sources]
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "kind": config.kind,
        "seq_len": config.seq_len,
        "options": config.content_options(),
        "format": config.file_format,
        "sources": files,
    }


def _open_work(work: Path, plan: dict[str, Any], tokenizer: Tokenizer, force: bool) -> Journal:
    """The journal to go on from; makes the work folder if there is none."""
    if (work / PLAN_NAME).is_file():
        try:
            check_plan(work, plan)
            return read_journal(work)
        except DataError:
            if not force:
                raise
    if work.exists():
        shutil.rmtree(work)
    (work / "tokenizer").mkdir(parents=True)
    save_tokenizer(tokenizer, work / "tokenizer")
    write_durably(work / PLAN_NAME, plan)  # last: a folder with a plan is complete
    return Journal()


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One preparation of the same folder at a time; a dead one's lock is gone."""
    lock = work.with_name(work.name + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process prepares {work}; wait for it") from None
        yield
        # Only the holder removes it, and only after the work is published.
        lock.unlink(missing_ok=True)


def _publish(work: Path, out: Path) -> None:
    """Gives the finished folder its name, in place of an older one that --force allows."""
    old = work.with_name(f".{out.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    work.rename(out)
    for name in (PLAN_NAME, JOURNAL_NAME):
        (out / name).unlink(missing_ok=True)
    sync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)
