"""MaskWorker: after each token of a constrained request, which ones may follow.

A thread of its own does this beside the steps: a request whose mask is not there yet is left out
of a step, and nobody else notices.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxserve.engine.failure_log import log_failure
from jaxserve.engine.grammar.compiler import (
    Grammar,
    GrammarCompiler,
    GrammarStuck,
    shown,
)
from jaxserve.errors import ConstraintFailed

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)

COMPUTING = -1


class RequestMasks:
    """The masks of one request, in turn. Implements the scheduler's `TokenMasks`."""

    def __init__(
        self,
        grammar: Grammar,
        worker: MaskWorker,
        on_stuck: Callable[[ConstraintFailed | None], object],
    ) -> None:
        """`on_stuck` is called in the worker's thread if the grammar goes no further, with what
        the client may know of it."""
        self.index = 0
        self.words = grammar.first_words
        self.loaded: bytes | None = None
        self.on_stuck = on_stuck
        self._grammar: Grammar | None = grammar
        self._matcher: LLMatcher | None = None
        self._worker = worker
        self._num_tokens = 0

    def push(self, token_id: int) -> None:
        """The request got this token. The next mask will be there some time after."""
        self.index = COMPUTING
        self._worker.put(self, token_id)

    def advance(self, token_id: int, compiler: GrammarCompiler) -> None:
        """Called by the worker alone. Raises GrammarStuck."""
        if self._matcher is None:
            assert self._grammar is not None
            self._matcher, self._grammar = self._grammar.matcher.deep_copy(), None
        if not self._matcher.consume_token(token_id):
            raise GrammarStuck(f"token {token_id} was not allowed: {self._matcher.get_error()}")
        self.words = compiler.reader.words(self._matcher)
        self._num_tokens += 1
        # Last: whoever sees the index may read the words.
        self.index = self._num_tokens


class MaskWorker:
    """Takes tokens by the step and tells when their masks are there.

    Args:
        compiler: of the grammars.
        on_ready: called in the worker's thread when all the masks of a step are there.
    """

    def __init__(self, compiler: GrammarCompiler, on_ready: Callable[[], None]) -> None:
        self._compiler = compiler
        self._on_ready = on_ready
        self._changed = threading.Condition()
        self._new: list[tuple[RequestMasks, int]] = []
        """Of the step that is being committed; in the engine's thread alone."""
        self._queued: list[tuple[RequestMasks, int]] = []
        self._num_pending = 0
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def num_pending(self) -> int:
        """Masks that are being computed."""
        return self._num_pending

    def put(self, masks: RequestMasks, token_id: int) -> None:
        """Called in the engine's thread, as tokens are committed."""
        self._new.append((masks, token_id))

    def start_batch(self) -> None:
        """The tokens of a step are complete. Called in the engine's thread."""
        if not self._new:
            return
        with self._changed:
            self._queued += self._new
            self._num_pending += len(self._new)
            self._new = []
            if self._thread is None and not self._stopping:
                # Most engines never see a constraint.
                self._thread = threading.Thread(
                    target=self._run, name="jaxserve-masks", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Waits until no mask is being computed; False if the time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_pending == 0, timeout_s)

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queued) or self._stopping)
                if self._stopping:
                    return
                batch, self._queued = self._queued, []
            for masks, token_id in batch:
                self._advance(masks, token_id)
            with self._changed:
                self._num_pending -= len(batch)
                self._changed.notify_all()
            self._on_ready()

    def _advance(self, masks: RequestMasks, token_id: int) -> None:
        try:
            masks.advance(token_id, self._compiler)
        except Exception as error:
            log_failure(logger, "a request's grammar goes no further; the request ends", error)
            # The library's words repeat nothing of the grammar (`LIMITS`).
            masks.on_stuck(
                ConstraintFailed(shown(str(error))) if isinstance(error, GrammarStuck) else None
            )
