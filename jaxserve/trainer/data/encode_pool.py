"""EncodePool: worker processes that encode blocks, answers in the blocks' order."""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from jaxserve.trainer.data.blocks import Block
from jaxserve.trainer.data.encode_worker import read_encoded, write_block, write_start
from jaxserve.trainer.data.encoding import Encoded, EncoderSettings, Item, RecordError
from jaxserve.trainer.data.errors import DataError

BLOCKS_A_WORKER = 2
"""Blocks on their way for each worker: enough that none waits, and what bounds the memory."""

Worker = subprocess.Popen[bytes]


class EncodePool:
    """Workers, as a context manager. They die with this process: their input ends then.

    Args:
        num_workers: processes.
        tokenizer_folder: what Tokenizer.from_folder reads.
        settings: for their encoders.
    """

    def __init__(self, num_workers: int, tokenizer_folder: Path, settings: EncoderSettings) -> None:
        self._threads = ThreadPoolExecutor(num_workers, "encode")
        self._num_workers = num_workers
        self._workers = [_start_worker() for _ in range(num_workers)]
        self._idle: queue.Queue[Worker] = queue.Queue()
        for worker in self._workers:
            assert worker.stdin is not None
            write_start(worker.stdin, tokenizer_folder, settings)
            self._idle.put(worker)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def encode(self, blocks: Iterable[tuple[Block, list[Item]]]) -> Iterator[tuple[Block, Encoded]]:
        """Each block and its encoding, in order; reads only a few blocks ahead.

        Raises DataError: a malformed record (the message has its place), or a worker died.
        """
        waiting: collections.deque[tuple[Block, Future[Encoded]]] = collections.deque()
        for block, items in blocks:
            waiting.append((block, self._threads.submit(self._encode_block, items)))
            if len(waiting) >= BLOCKS_A_WORKER * self._num_workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())

    def _encode_block(self, items: list[Item]) -> Encoded:
        worker = self._idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            write_block(worker.stdin, items)
            encoded = read_encoded(worker.stdout)
        except BrokenPipeError:
            encoded = None
        finally:
            self._idle.put(worker)
        if encoded is None:
            raise DataError(
                f"an encoding process ended (exit code {worker.wait()}); was memory short? Run "
                "the same command to go on, with fewer --workers"
            )
        return encoded

    def __enter__(self) -> EncodePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.wait()
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()


def _result(block: Block, future: Future[Encoded]) -> tuple[Block, Encoded]:
    try:
        return block, future.result()
    except RecordError as error:
        raise DataError(f"{block.places[error.number]}: {error}") from None


def _start_worker() -> Worker:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "jaxserve.trainer.data.encode_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is ours to handle: the worker just ends with us
        # One core a worker: the tokenizer library would start a thread a core in each.
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
    )
