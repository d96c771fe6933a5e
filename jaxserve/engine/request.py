"""A request: what the client asked, and how far the engine has got with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from jaxserve.engine.plan import NO_TOKEN
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from jaxserve.engine.grammar.compiler import Grammar
    from jaxserve.engine.scheduler.speculation import Speculation


class FinishReason(StrEnum):
    """Why a request ended. Every request ends with exactly one of these."""

    STOP = "stop"
    """EOS, a stop id or a stop string; an embedding that is complete."""
    LENGTH = "length"
    """max_tokens, or the context is full."""
    CANCELLED = "cancelled"
    """The client cancelled, disconnected or aborted it."""
    DEADLINE = "deadline"
    """The client's deadline passed."""
    ERROR = "error"
    """The engine failed on it; details are in the log, not in the reply."""


@dataclass(frozen=True, slots=True)
class ServiceObjective:
    """How soon a request wants its tokens; a goal, not a limit. In seconds."""

    ttft_s: float
    """Arrival to first token."""
    tbt_s: float
    """Between two tokens after that."""


@dataclass(frozen=True, slots=True)
class Account:
    """Whose request it is, as far as the engine shares itself out."""

    tenant: str = ""
    """Waiting tenants take turns; all requests without one are one tenant's."""
    weight: float = 1.0
    """Of the tenant's share."""
    cache_owner: str = ""
    """Whose part of the prefix cache its pages fill."""


NOBODY = Account()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated, tokenised request as a front end hands it to the engine."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    deadline_s: float | None = None
    """On the engine's monotonic clock; the request ends as DEADLINE then."""
    cache_salt: str = ""
    """Prefix-cache pages are shared only between requests of one salt."""
    priority: int = 0
    """Class of the request: lower ones are admitted first and preempted last."""
    objective: ServiceObjective | None = None
    """For policies and budgets that follow deadlines."""
    account: Account = NOBODY
    trace_parent: str = ""
    """W3C trace context of the client's span, as it was sent; empty without."""
    adapter: str = ""
    """Name of a loaded adapter; the model alone without one."""
    grammar: Grammar | None = None
    """Of `sampling.constraint`, from who has waited for it; else the engine compiles it when the
    request is added."""


class TokenMasks(Protocol):
    """Which tokens a constrained request may get next, computed beside the steps."""

    index: int
    """The output token that `words` are for, counted from 0; -1 while they are computed."""
    words: bytes
    """uint32 `[ceil(V / 32)]`, little-endian: bit i of word w allows token 32 w + i."""
    loaded: bytes | None
    """What the request's slot holds, as the scheduler last planned it."""

    def push(self, token_id: int) -> None:
        """The request got this token."""
        ...


@dataclass(slots=True, eq=False)
class Request:
    """The scheduler's record of a running or waiting request.

    `num_computed_tokens` is advanced when a step is planned, not when it
    completes. Prompt and output never mix: a preemption only sets
    `num_computed_tokens` back to what the prefix cache still holds.
    """

    generation: GenerationRequest
    max_tokens: int
    """Resolved: min(asked, max_model_len - prompt length)."""
    seed: int
    stop_token_ids: frozenset[int]
    """EOS ids (unless ignored) and the request's own."""
    arrival_s: float
    adapter_index: int = 0
    """Place of its adapter in the pool; 0 without one."""

    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_prefill_tokens: int = 0
    """Tokens known when it was last admitted: prefill chunks compute up to
    here, later positions are decodes."""
    max_computed_tokens: int = 0
    """Positions that are ever computed, set at admission: all but that of the last token."""
    num_in_flight_steps: int = 0
    slot: int | None = None
    page_ids: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    """Prefix-cache keys of its full pages, as far as they were needed yet."""
    num_registered_pages: int = 0
    """Leading pages of `page_ids` that were offered to the prefix cache."""
    num_preemptions: int = 0
    is_relegated: bool = False
    """Its deadline was out of reach before it was admitted, so others go first."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache saved at first admission."""
    num_prompt_logprobs: int = 0
    """Prompt logprobs planned so far; each is computed once, whatever happens."""
    special_token_ids: frozenset[int] = field(init=False)
    """Results of a decode that are more than a token: `stop_token_ids` and `NO_TOKEN`."""
    num_plain_outputs: int = 0
    """Output tokens up to which a decode gives a token and nothing else, unless it is a special
    one; those that it has if it has finished. Spares every other question in every step."""
    first_scheduled_s: float | None = None
    last_token_s: float | None = None
    """When its last token was committed."""
    finish_reason: FinishReason | None = None
    failure: JaxserveError | None = None
    """What the client may know of its end as ERROR; None: that the engine failed on it."""
    masks: TokenMasks | None = None
    """Of a constrained request, which samples only when the mask of its next token is there."""
    speculation: Speculation | None = None
    """Of a request whose next tokens are guessed; the scheduler's."""
    request_id: str = field(init=False)
    """That of `generation`; a field, since every step asks each sequence for it."""

    def __post_init__(self) -> None:
        self.request_id = self.generation.request_id
        self.special_token_ids = self.stop_token_ids | {NO_TOKEN}

    @property
    def num_pending_tokens(self) -> int:
        """Output tokens planned in steps that have not been committed yet."""
        if self.slot is None or self.num_computed_tokens < self.num_prefill_tokens:
            return 0
        return self.num_computed_tokens + 1 - self.num_tokens

    @property
    def sampling(self) -> SamplingParams:
        return self.generation.sampling

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.generation.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids the host knows: prompt + committed output."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def has_mask(self) -> bool:
        """It may sample: it is not constrained, or its next token's mask is there."""
        masks = self.masks
        num_output = len(self.output_token_ids) + self.num_pending_tokens
        return masks is None or masks.index == num_output

    @property
    def is_scored(self) -> bool:
        """Its prompt logprobs are asked for."""
        return self.generation.sampling.prompt_logprobs is not None

    @property
    def has_unscored_prompt(self) -> bool:
        """Some of its prompt logprobs have not been planned yet."""
        return self.is_scored and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    def known_token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """Ids at positions [start, end), which must be known."""
        prompt = self.generation.prompt_token_ids
        if end <= len(prompt):
            return prompt[start:end]
        if start >= len(prompt):
            return tuple(self.output_token_ids[start - len(prompt) : end - len(prompt)])
        return prompt[start:] + tuple(self.output_token_ids[: end - len(prompt)])


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprob of one token and of the most likely ones at its position."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class TokenUpdate(NamedTuple):
    """What one committed step did to one request (scheduler -> output)."""

    request: Request
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    """One per token when the request asked for logprobs, else empty."""
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    queue_s: float
    """Arrival to first scheduled."""
    ttft_s: float
    """Arrival to first token committed."""
    e2e_s: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A strict delta for the client: new ids and the new text they gave.

    `text` may lag behind `token_ids` while a stop string could still match or
    a character is incomplete; the last output flushes everything.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    """The stop string or stop token id that ended it."""
    usage: Usage | None = None
    """On the last output only."""
    failure: JaxserveError | None = None
    """With ERROR: the request's `failure`."""
    embedding: npt.NDArray[np.float32] | None = None
    """`[E]`, an encoder's whole answer."""


def joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """One output of a request, with all that these in turn tell; there is at least one."""
    return replace(
        outputs[-1],
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=tuple(entry for output in outputs for entry in output.prompt_logprobs),
    )
