"""Engine: requests in, tokens out."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from jaxserve.engine.adapter_names import AdapterNames
from jaxserve.engine.detokenizer import DetokenizerFactory
from jaxserve.engine.engine_core import STEP_END_TIMEOUT_S, EngineCore, EngineSnapshot
from jaxserve.engine.grammar.compiler import GrammarCompiler
from jaxserve.engine.grammar.masks import MaskWorker, RequestMasks
from jaxserve.engine.loop import StepExecutor
from jaxserve.engine.memory_recovery import MemoryRecovery
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.output import OutputProcessor, OutputSink
from jaxserve.engine.request import FinishReason, GenerationRequest, Request
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.replica_scheduler import ReplicaScheduler
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.errors import ConfigError, ConstraintFailed, InvalidRequest

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.tokenizer import Tokenizer


class Engine(EngineCore):
    """Generates text.

    Context rule: a prompt must leave room for one token (`max_model_len - 1`
    tokens at most); `max_tokens` is cut to the end of the context, where the
    request ends as LENGTH.
    """

    _scheduler: Scheduler | ReplicaScheduler

    def __init__(
        self,
        scheduler: Scheduler | ReplicaScheduler,
        executor: StepExecutor,
        tokenizer: Tokenizer,
        model_config: ModelConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_model_len: int | None = None,
        count_compiles: Callable[[], int] = lambda: 0,
        grammars: GrammarCompiler | None = None,
        max_loras: int = 0,
        recovery: MemoryRecovery | None = None,
    ) -> None:
        """`count_compiles` returns the compilations since the engine was ready; `grammars`, which
        the engine then closes, may have begun to read the vocabulary; the executor's device has
        room for `max_loras` adapters; `recovery` is of this scheduler and executor."""
        config = scheduler.config
        metrics = EngineMetrics()
        self.grammars = grammars or make_grammar_compiler(tokenizer, model_config)
        """Who must not wait gets a constraint's grammar here and puts it into the request."""
        self._mask_worker = MaskWorker(self.grammars, on_ready=self._wake)
        super().__init__(
            scheduler,
            executor,
            OutputProcessor(DetokenizerFactory(tokenizer), metrics),
            metrics,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            clock=clock,
            count_compiles=count_compiles,
            masks=self._mask_worker,
            recovery=recovery,
        )
        self.adapters = AdapterNames(max_loras)
        self._entry = self.adapters.lock
        self.max_model_len = config.max_model_len if max_model_len is None else max_model_len
        self._vocab_size = model_config.vocab_size
        self._eos_token_ids = frozenset(_eos_token_ids(tokenizer, model_config))

    def validate(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest naming the field, or AdapterNotFound, unless it can be served.

        Waits for the grammar of a constraint that the request comes without.
        """
        if request.adapter:
            self.adapters.get(request.adapter)
        sampling = request.sampling
        sampling.validate(vocab_size=self._vocab_size)
        num_prompt_tokens = len(request.prompt_token_ids)
        if not request.request_id:
            raise InvalidRequest("request_id", "must not be empty")
        if num_prompt_tokens == 0:
            raise InvalidRequest("prompt", "must hold at least one token")
        if min(request.prompt_token_ids) < 0 or max(request.prompt_token_ids) >= self._vocab_size:
            raise InvalidRequest("prompt_token_ids", f"every id must be in [0, {self._vocab_size})")
        room = self.max_model_len - num_prompt_tokens
        if room < 1:
            raise InvalidRequest(
                "prompt",
                f"{num_prompt_tokens} tokens leave no room for output: the context holds "
                f"{self.max_model_len} tokens (--max-model-len), so shorten the prompt to at most "
                f"{self.max_model_len - 1}",
            )
        if sampling.min_tokens > room:
            raise InvalidRequest(
                "min_tokens",
                f"{sampling.min_tokens} do not fit: a prompt of {num_prompt_tokens} tokens leaves "
                f"{room} of {self.max_model_len} (--max-model-len)",
            )
        if sampling.min_tokens > 0 and sampling.allowed_token_ids is not None:
            allowed = set(sampling.allowed_token_ids) - set(sampling.bad_token_ids)
            if allowed <= self._stop_token_ids(sampling):
                raise InvalidRequest(
                    "min_tokens",
                    "allowed_token_ids leaves only ids that stop, which min_tokens forbids: "
                    "allow another id or drop min_tokens",
                )
        if sampling.constraint is not None and request.grammar is None:
            self.grammars.compile(sampling.constraint)

    def add(self, request: GenerationRequest, sink: OutputSink) -> Request:
        """As `EngineCore.add`."""
        record = super().add(request, sink)
        if request.adapter:
            self.adapters.count_request(request.adapter)
        return record

    def num_open_of_adapters(self) -> Counter[str]:
        """Requests that run or wait, by the name of their adapter. From any thread."""
        names = (request.generation.adapter for request in self._inbox.live())
        return Counter(name for name in names if name)

    def adapters_in_use(self) -> set[int]:
        """Places of the adapters that live requests run on. From any thread."""
        return {request.adapter_index for request in self._inbox.live()}

    def stop(self, timeout_s: float = STEP_END_TIMEOUT_S) -> bool:
        """As `EngineCore.stop`."""
        self.grammars.close()
        has_ended = super().stop(timeout_s)
        self._mask_worker.close()
        return has_ended

    def snapshot(self) -> EngineSnapshot:
        """May be called from any thread; the figures may be a step apart."""
        scheduler, pages = self._scheduler, self._scheduler.pages
        return replace(
            super().snapshot(),
            num_pages_free=pages.num_free,
            num_pages_cached=pages.num_cached,
            num_pages_total=pages.num_total,
            num_preemptions=scheduler.num_preemptions,
            num_drafts=scheduler.num_drafts,
            num_draft_tokens=scheduler.num_draft_tokens,
            num_accepted_tokens=scheduler.num_accepted_tokens,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
        )

    def share_cache(self, shares: Mapping[str, float]) -> None:
        """As `EngineCore.share_cache`."""
        config = self._scheduler.config
        num_needed = config.max_pages_per_seq + config.num_watermark_pages
        num_reserved = sum(int(share * config.num_pages) for share in shares.values())
        if config.num_pages - num_reserved < num_needed:
            raise ConfigError(
                f"cache_share of all tenants keeps {num_reserved} of {config.num_pages} pages, but "
                f"one sequence of --max-model-len {config.max_model_len} needs {num_needed}: lower "
                "the shares or --max-model-len, or raise --kv-cache-bytes"
            )
        self._scheduler.pages.reserve(shares)

    def _record(self, request: GenerationRequest) -> Request:
        sampling = request.sampling
        adapter_index = 0
        if request.adapter:
            adapter = self.adapters.get(request.adapter)
            adapter_index = adapter.index
            salt = self.adapters.cache_salt(adapter, request.cache_salt)
            request = replace(request, cache_salt=salt)
        room = self.max_model_len - len(request.prompt_token_ids)
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        record = Request(
            generation=request,
            max_tokens=max_tokens,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            stop_token_ids=self._stop_token_ids(sampling),
            arrival_s=self._clock(),
            adapter_index=adapter_index,
        )
        if sampling.constraint is not None:
            grammar = request.grammar or self.grammars.compile(sampling.constraint)
            record.masks = RequestMasks(grammar, self._mask_worker, partial(self._fail, record))
        return record

    def _fail(self, record: Request, why: ConstraintFailed | None) -> None:
        record.failure = why
        self._inbox.end_request(record, FinishReason.ERROR)

    def _wake(self) -> None:
        """A mask is there. The inbox is younger than who calls this."""
        self._inbox.wake()

    def _stop_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        eos_token_ids = frozenset() if sampling.ignore_eos else self._eos_token_ids
        return eos_token_ids | frozenset(sampling.stop_token_ids)


def make_grammar_compiler(tokenizer: Tokenizer, model_config: ModelConfig) -> GrammarCompiler:
    """Of the constraints that a model's requests may have."""
    return GrammarCompiler(
        tokenizer,
        vocab_size=model_config.vocab_size,
        eos_token_ids=_eos_token_ids(tokenizer, model_config),
    )


def _eos_token_ids(tokenizer: Tokenizer, model_config: ModelConfig) -> tuple[int, ...]:
    return tuple(dict.fromkeys(model_config.eos_token_ids + tokenizer.eos_token_ids))
