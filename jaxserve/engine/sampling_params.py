"""What a request asks of the sampler: one schema, validated once at the edge."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.errors import InvalidRequest

MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 16
MAX_LOGIT_BIAS = 1024

GREEDY_TEMPERATURE = 1e-5
"""Below it float32 can no longer tell sampling from taking the most likely."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one request. Defaults follow vLLM's.

    Order of application to the logits `[V]` of a row: allowed / bad ids and
    `min_tokens` mask, logit bias, repetition, presence and frequency
    penalties, temperature, then top-k, top-p and min-p.
    """

    temperature: float = 1.0
    """Below `GREEDY_TEMPERATURE` greedy; otherwise logits are divided by it. [0, 100]."""
    top_k: int = 0
    """Keep the k most likely tokens (and ties of the k-th); 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likely tokens with at least this mass. (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one. [0, 1]."""
    seed: int | None = None
    """Unsigned 64-bit seed. Absent: drawn from the system's CSPRNG."""
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of seen tokens. [0.01, 100]."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of generated tokens. [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logits of generated tokens. [-2, 2]."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) pairs, added to the logits; bias in [-100, 100]."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these ids may be sampled. Absent: all."""
    bad_token_ids: tuple[int, ...] = ()
    """These ids are never sampled."""
    max_tokens: int | None = None
    """Most tokens to generate. Absent: up to the context's end."""
    min_tokens: int = 0
    """Stop ids (EOS included) are masked until this many tokens are out."""
    stop: tuple[str, ...] = ()
    """The output ends just before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The output ends when one of these ids is sampled."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence ids."""
    include_stop_str_in_output: bool = False
    """Emit the stop string that matched."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text (ids always show them)."""
    logprobs: int | None = None
    """Report the sampled token's logprob and this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    constraint: Constraint | None = None
    """The form that the output must have; it then ends where that is complete. Applied as a
    mask after the penalties."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    def validate(self, *, vocab_size: int) -> None:
        """Raises InvalidRequest naming the first field out of its bounds."""
        _bound("temperature", self.temperature, 0.0, 100.0)
        _bound("top_k", self.top_k, 0, vocab_size)
        _bound("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _bound("min_p", self.min_p, 0.0, 1.0)
        _bound("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _bound("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _bound("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _bound("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _bound("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _bound("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens", f"must be at most max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _bound(name, value, 0, min(MAX_TOP_LOGPROBS, vocab_size))
        self._validate_ids(vocab_size)
        self._validate_stop()
        if self.constraint is not None:
            self._validate_constraint(self.constraint)

    def _validate_ids(self, vocab_size: int) -> None:
        _count("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        _count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        seen: set[int] = set()
        for token_id, bias in self.logit_bias:
            _token_id("logit_bias", token_id, vocab_size)
            _bound("logit_bias", bias, -100.0, 100.0)
            if token_id in seen:
                raise InvalidRequest("logit_bias", f"token id {token_id} appears twice")
            seen.add(token_id)
        for name in ("allowed_token_ids", "bad_token_ids", "stop_token_ids"):
            for token_id in getattr(self, name) or ():
                _token_id(name, token_id, vocab_size)
        if self.allowed_token_ids is not None:
            if not set(self.allowed_token_ids) - set(self.bad_token_ids):
                raise InvalidRequest(
                    "allowed_token_ids", "must leave at least one id that bad_token_ids allows"
                )
        elif len(set(self.bad_token_ids)) >= vocab_size:
            raise InvalidRequest("bad_token_ids", "must leave at least one token id")

    def _validate_constraint(self, constraint: Constraint) -> None:
        against = {
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens > 0,
            "allowed_token_ids": self.allowed_token_ids is not None,
            "bad_token_ids": bool(self.bad_token_ids),
        }
        for name, is_set in against.items():
            if is_set:
                raise InvalidRequest(
                    name, "does not go with a constraint, which alone decides what may come next"
                )
        constraint.validate()

    def _validate_stop(self) -> None:
        _count("stop", len(self.stop), MAX_STOP_STRINGS)
        for text in self.stop:
            if not text:
                raise InvalidRequest("stop", "a stop string must not be empty")
            try:
                num_bytes = len(text.encode())
            except UnicodeEncodeError:
                raise InvalidRequest("stop", "a stop string must be valid Unicode") from None
            if num_bytes > MAX_STOP_STRING_BYTES:
                raise InvalidRequest("stop", f"at most {MAX_STOP_STRING_BYTES} bytes per string")


def _bound(field: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    # A NaN fails every comparison, so it is caught here too.
    above = value > low if low_open else value >= low
    if not (above and value <= high) or (isinstance(value, float) and not math.isfinite(value)):
        bracket = "(" if low_open else "["
        raise InvalidRequest(field, f"must be in {bracket}{low}, {high}], not {value}")


def _count(field: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidRequest(field, f"at most {limit} entries, not {value}")


def _token_id(field: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidRequest(field, f"token id {token_id} is outside [0, {vocab_size})")
