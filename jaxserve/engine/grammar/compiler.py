"""GrammarCompiler: constraints made into what tells the allowed tokens, within bounds.

The library that does the work counts its own steps ("fuel") and states, and stops at a limit, so
that neither a hostile constraint nor the tokens that follow it take long or grow without end.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jaxserve.engine.grammar.constraint import Constraint, ConstraintKind
from jaxserve.engine.grammar.readable_values import with_readable_values
from jaxserve.engine.grammar.terms import WHITESPACE
from jaxserve.engine.grammar.vocabulary import grammar_vocabulary
from jaxserve.errors import InvalidRequest, NotAccepting, QueueFull

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

MAX_CACHED_GRAMMARS = 128
MAX_CACHED_BYTES = 1 << 20
"""Of the constraints' sources: compiled, a source takes up to a hundred times its size."""
MAX_WAITING = 64
"""Constraints that wait to be compiled."""
MAX_SHOWN_CHARS = 300
"""Of the library's own words for what is wrong."""

LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=8_000,
    max_grammar_size=200_000,
    max_items_in_row=2_000,
    # Errors would repeat the grammar, which is the client's.
    verbose_errors=False,
)
"""About 20 ms to prepare, 5 ms for a token, and 16 MiB, whatever the constraint."""


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled constraint, which any number of requests may share."""

    matcher: LLMatcher
    """Before the first token. To be copied, never advanced."""
    first_words: bytes
    """uint32 `[ceil(V / 32)]`: bit i of word w allows token 32 w + i as the first one."""


class MaskReader:
    """What a matcher allows next, as words for the device.

    Args:
        vocabulary: of the matchers.
        eos_token_ids: all ids that end a text; the vocabulary knows one of them.
    """

    def __init__(self, vocabulary: LLTokenizer, eos_token_ids: Sequence[int]) -> None:
        self._num_words = -(-vocabulary.vocab_size // 32)
        self._eos_word, self._eos_bit = divmod(vocabulary.eos_token, 32)
        bits = np.zeros(self._num_words * 32, np.uint8)
        bits[list(eos_token_ids)] = 1
        self._eos_words = np.packbits(bits, bitorder="little").view("<u4")

    def words(self, matcher: LLMatcher) -> bytes:
        """uint32 `[ceil(V / 32)]` of the next token. Raises GrammarStuck if there is none."""
        mask: npt.NDArray[np.uint32] = np.empty(self._num_words, np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise GrammarStuck(matcher.get_error())
        if mask[self._eos_word] >> np.uint32(self._eos_bit) & 1:
            # The library also allows the end where it knows no other way on.
            if not matcher.is_accepting():
                raise GrammarStuck("no token of the vocabulary goes on")
            mask |= self._eos_words
        return mask.tobytes()


class GrammarStuck(Exception):
    """A grammar that came to a limit, or to where no token of the vocabulary goes on."""


class GrammarCompiler:
    """Compiles constraints for one model, in a thread of its own, and keeps the latest.

    Thread-safe.

    Args:
        tokenizer, vocab_size: of the model.
        eos_token_ids: ids that end its text; without any nothing can be constrained.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._cached: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._num_cached_bytes = 0
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(1, "jaxserve-grammar")
        self._opening = threading.Lock()
        self._opened: tuple[LLTokenizer, MaskReader] | None = None

    @property
    def reader(self) -> MaskReader:
        """Reads masks of what was compiled here."""
        return self._open()[1]

    def prepare(self) -> Future[object]:
        """Reads the vocabulary, which takes a while, before somebody waits for it."""
        return self._thread.submit(lambda: self._eos_token_ids and self._open())

    def submit(self, constraint: Constraint) -> Future[Grammar]:
        """Compiles in the compiler's thread; what is kept is there at once.

        The future raises InvalidRequest naming the part of `constraint` that is wrong. Raises
        QueueFull if too many wait, NotAccepting after `close`.
        """
        done: Future[Grammar] = Future()
        known = self._find(constraint)
        if known is not None:
            done.set_result(known)
            return done
        with self._lock:
            if self._num_waiting >= MAX_WAITING:
                raise QueueFull(f"{MAX_WAITING} constraints wait to be compiled: retry later")
            self._num_waiting += 1
        try:
            future = self._thread.submit(self._compile_next, constraint)
        except RuntimeError:
            self._count_done(done)
            raise NotAccepting("the engine has stopped: send the request elsewhere") from None
        # Also when whoever waited has left and cancelled it.
        future.add_done_callback(self._count_done)
        return future

    def compile(self, constraint: Constraint) -> Grammar:
        """The same, waiting for it."""
        return self.submit(constraint).result()

    def close(self) -> None:
        """Ends the thread; what waits is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile_next(self, constraint: Constraint) -> Grammar:
        known = self._find(constraint)
        if known is None:
            known = self._compile(constraint)
            self._keep(constraint, known)
        return known

    def _count_done(self, _: Future[Grammar]) -> None:
        with self._lock:
            self._num_waiting -= 1

    def _compile(self, constraint: Constraint) -> Grammar:
        constraint.validate()
        field = f"constraint.{constraint.kind}"
        if not self._eos_token_ids:
            raise InvalidRequest(field, "the model has no end-of-sequence token to end with")
        vocabulary, reader = self._open()
        matcher = LLMatcher(vocabulary, grammar_text(constraint), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise InvalidRequest(field, shown(matcher.get_error()))
        try:
            return Grammar(matcher, reader.words(matcher.deep_copy()))
        except GrammarStuck as stuck:
            raise InvalidRequest(field, f"allows no text: {shown(str(stuck))}") from None

    def _open(self) -> tuple[LLTokenizer, MaskReader]:
        with self._opening:
            if self._opened is None:
                vocabulary = grammar_vocabulary(
                    self._tokenizer,
                    vocab_size=self._vocab_size,
                    eos_token_id=self._eos_token_ids[0],
                )
                self._opened = vocabulary, MaskReader(vocabulary, self._eos_token_ids)
            return self._opened

    def _find(self, constraint: Constraint) -> Grammar | None:
        with self._lock:
            known = self._cached.get(constraint)
            if known is not None:
                self._cached.move_to_end(constraint)
            return known

    def _keep(self, constraint: Constraint, grammar: Grammar) -> None:
        with self._lock:
            self._cached[constraint] = grammar
            self._num_cached_bytes += _num_bytes(constraint)
            while len(self._cached) > 1 and (
                len(self._cached) > MAX_CACHED_GRAMMARS or self._num_cached_bytes > MAX_CACHED_BYTES
            ):
                oldest, _ = self._cached.popitem(last=False)
                self._num_cached_bytes -= _num_bytes(oldest)


def grammar_text(constraint: Constraint) -> str:
    """The constraint in the library's own language. Raises InvalidRequest."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return _of_schema(constraint.source)
        case ConstraintKind.JSON_OBJECT:
            return _of_schema('{"type": "object"}')
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.source)
        case ConstraintKind.CHOICE:
            # One expression: as rules, each text would take the parser's time.
            return LLMatcher.grammar_from_regex("|".join(map(_literal, constraint.choices)))
        case ConstraintKind.GRAMMAR:
            return constraint.source


def _of_schema(source: str) -> str:
    narrowed = json.dumps(with_readable_values(json.loads(source)), ensure_ascii=False)
    return LLMatcher.grammar_from_json_schema(
        narrowed, overrides={"whitespace_pattern": WHITESPACE}
    )


def _literal(text: str) -> str:
    """The regular expression of the text itself."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _num_bytes(constraint: Constraint) -> int:
    return len(constraint.source) + sum(map(len, constraint.choices))


def shown(message: str) -> str:
    """The library's words in one line, at most `MAX_SHOWN_CHARS` long."""
    line = " ".join(message.split())
    return line if len(line) <= MAX_SHOWN_CHARS else f"{line[:MAX_SHOWN_CHARS]}…"
