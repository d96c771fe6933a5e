"""What the server is doing: shared by servicers, health and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from jaxserve.engine.weight_swaps import WeightSwaps
from jaxserve.errors import (
    AdapterNotFound,
    ConstraintFailed,
    EngineLost,
    Forbidden,
    InvalidRequest,
    NotAccepting,
    NotSupported,
    OverLimit,
    QueueFull,
    Unauthenticated,
)
from jaxserve.server.promises import Promises
from jaxserve.server.prompt_limits import PromptLimits

if TYPE_CHECKING:
    from jaxserve.engine.adapter_loader import AdapterLoader
    from jaxserve.engine.async_engine import AsyncEngine
    from jaxserve.engine.engine_core import EngineCore
    from jaxserve.engine.grammar.compiler import GrammarCompiler
    from models.tokenizer import Tokenizer


class Phase(StrEnum):
    STARTING = "starting"
    """The model loads and the steps compile."""
    READY = "ready"
    DEGRADED = "degraded"
    """The engine failed, had no memory for its last step, or does not come to the end of one."""
    DRAINING = "draining"
    """Running requests finish; new ones are refused."""


class Refusal(StrEnum):
    """Why a request was not taken."""

    INVALID = "invalid"
    QUEUE_FULL = "queue_full"
    OVER_LIMIT = "over_limit"
    """Of its tenant."""
    NO_ACCESS = "no_access"
    """Its API key is missing, not known or not good for this."""
    NOT_ACCEPTING = "not_accepting"
    """The server starts or drains, or its engine has failed."""
    NOT_SUPPORTED = "not_supported"
    """Generate of an encoder, or Embed of a model that generates."""


_REFUSALS = {
    AdapterNotFound: Refusal.INVALID,
    InvalidRequest: Refusal.INVALID,
    OverLimit: Refusal.OVER_LIMIT,
    QueueFull: Refusal.QUEUE_FULL,
    NotAccepting: Refusal.NOT_ACCEPTING,
    NotSupported: Refusal.NOT_SUPPORTED,
    Unauthenticated: Refusal.NO_ACCESS,
    Forbidden: Refusal.NO_ACCESS,
}
"""The first that fits counts."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What clients may know about the model and its limits."""

    name: str
    family: str
    vocab_size: int
    max_model_len: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    page_size: int
    num_pages: int
    max_num_seqs: int
    token_budget: int
    buckets: tuple[int, ...]
    policy: str
    embedding_size: int | None = None
    """Numbers of an embedding; None for a model that generates. An encoder has no
    pages and no policy: those fields are 0 and empty."""
    num_classes: int = 0
    """Most labels of a text; 0 for a model that knows no labels."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A running engine and what the front end needs beside it."""

    engine: EngineCore
    async_engine: AsyncEngine
    tokenizer: Tokenizer
    card: ModelCard
    limits: PromptLimits
    num_startup_compiles: int
    weights_name: Callable[[], str]
    """The version of the weights that a request which comes now will get."""
    weight_swaps: Callable[[], WeightSwaps] = WeightSwaps
    """Of weights that can be exchanged; without any for those that cannot."""
    grammars: GrammarCompiler | None = None
    """Of the engine; None for an encoder, which generates nothing to constrain."""
    label_texts: tuple[str, ...] = ()
    """Of a model that classifies: one a label."""
    adapters: AdapterLoader | None = None
    """Of the engine; None for one that can have no adapters."""

    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that are loaded."""
        if self.adapters is None:
            return ()
        return tuple(one.name for one in self.adapters.names.all())

    def require_adapters(self) -> AdapterLoader:
        """Raises NotSupported if there can be none."""
        if self.adapters is None or not self.adapters.max_loras:
            raise NotSupported(
                "this server has no room for adapters: start it with --max-loras or --lora"
            )
        return self.adapters

    def require_generation(self) -> None:
        """Raises NotSupported if the model is an encoder."""
        if self.card.embedding_size is not None:
            raise NotSupported(
                f"{self.card.name} is an encoder, which generates no text: call Embed, or ask a "
                "server whose --model generates"
            )

    def require_embeddings(self) -> None:
        """Raises NotSupported if the model generates text."""
        if self.card.embedding_size is None:
            raise NotSupported(
                f"{self.card.name} generates text and makes no embeddings: ask a server whose "
                "--model is an encoder, such as all-minilm-l6-v2"
            )

    def require_classes(self) -> None:
        """Raises NotSupported if the model knows no labels."""
        if not self.card.num_classes:
            raise NotSupported(
                f"{self.card.name} knows no labels: ask a server whose --model is a run of "
                "extreme classification"
            )


@dataclass(slots=True)
class ServerState:
    """Changed on the event loop alone; read by any thread."""

    degraded_after_s: float
    clock: Callable[[], float] = time.monotonic
    """The engine's clock, so that deadlines mean the same to both."""
    serving: Serving | None = None
    draining: bool = False
    num_refused: dict[Refusal, int] = field(default_factory=lambda: dict.fromkeys(Refusal, 0))
    """Requests for text or embeddings that were not taken."""
    promises: Promises = field(default_factory=Promises)
    """Requests that were taken over gRPC."""
    started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.clock()

    @property
    def uptime_s(self) -> float:
        return self.clock() - self.started_s

    @property
    def phase(self) -> Phase:
        if self.draining:
            return Phase.DRAINING
        if self.serving is None:
            return Phase.STARTING
        return Phase.DEGRADED if self._is_stuck(self.serving) else Phase.READY

    def require_serving(self) -> Serving:
        """Raises NotAccepting while the engine starts."""
        if self.serving is None:
            raise NotAccepting("the server is starting: wait for health SERVING")
        return self.serving

    def require_accepting(self) -> Serving:
        """Raises NotAccepting while the engine starts or drains, and QueueFull if it has no room:
        what is refused must cost little, or the refusals take the time of those that are served."""
        if self.draining:
            raise NotAccepting("the server is draining: use another one")
        serving = self.require_serving()
        serving.engine.check_room()
        return serving

    def note_refusal(self, error: Exception) -> None:
        """Counts an error that refused a request; others are not refusals."""
        if isinstance(error, EngineLost | ConstraintFailed):
            return  # It was taken, and then lost.
        for kind, reason in _REFUSALS.items():
            if isinstance(error, kind):
                self.num_refused[reason] += 1
                return

    def _is_stuck(self, serving: Serving) -> bool:
        load = serving.engine.snapshot()
        waits_s = max(load.step_in_flight_s or 0.0, load.stalled_s or 0.0)
        return load.failed or load.is_recovering or waits_s > self.degraded_after_s
