"""A service on real sockets: the server, engine, scheduler and pages are the
real ones; only the device is a script, so that a test decides when a step ends.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.client import Client
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.engine.executor import StepOutOfMemory
from jaxserve.engine.memory_recovery import MemoryRecovery
from jaxserve.engine.plan import SampleRow, SlotLoad, StepPlan, StepResults
from jaxserve.engine.sampling_params import MAX_TOP_LOGPROBS
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.server.config import ServerConfig
from jaxserve.server.lifecycle import Server
from jaxserve.server.prompt_limits import PromptLimits
from jaxserve.server.state import ModelCard, Serving
from models.config import ModelConfig
from models.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. "
"""The script: the token at position p is the letter TEXT[p % len(TEXT)]."""

MODEL_CONFIG = ModelConfig(
    family="llama",
    vocab_size=258,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=512,
    bos_token_id=256,
    eos_token_ids=(257,),
)
SCHEDULER_CONFIG = SchedulerConfig(
    num_pages=128,
    max_model_len=512,
    max_num_seqs=4,
    token_budget=32,
    buckets=(4, 32),
    max_queued_requests=8,
    max_queued_tokens=2048,
)
CHAT_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text_from(position: int, num_tokens: int) -> str:
    """What the script says for a prompt of `position` tokens."""
    return "".join(TEXT[(position + offset) % len(TEXT)] for offset in range(num_tokens))


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then a BOS (256, never added) and an EOS (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    return Tokenizer(backend, bos_token_id=256, eos_token_ids=(257,), chat_template=CHAT_TEMPLATE)


class ScriptedExecutor:
    """Samples the script, or `script` if there is one; a slot with a mask gets that token if it
    is allowed, else the first one that is. A step ends after `step_s`, when `gate` is open."""

    depth = 2

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.step_s = 0.0
        self.fails = False
        self.num_out_of_memory = 0
        """Steps that find no memory, from now on."""
        self.failure = "the secret prompt broke the device"
        self.plans: list[StepPlan] = []
        self.script: list[int] | None = None
        """Token ids that every request says, one after the other."""
        self._in_flight: deque[StepPlan] = deque()
        self._ids = [tokenizer.encode(letter)[0] for letter in TEXT]
        self._slots: dict[int, SlotLoad] = {}
        self._masks: dict[int, np.ndarray] = {}
        self._tokens: deque[list[int]] = deque()

    def can_accept(self) -> bool:
        return len(self._in_flight) < self.depth

    def submit(self, plan: StepPlan) -> None:
        if not self.can_accept():
            raise RuntimeError("too many plans in flight")
        self.plans.append(plan)
        self._in_flight.append(plan)
        for load in plan.slot_loads:
            self._slots[load.slot] = load
            self._masks.pop(load.slot, None)
        for mask in plan.mask_loads:
            bits = np.unpackbits(np.frombuffer(mask.words, np.uint8), bitorder="little")
            self._masks[mask.slot] = np.flatnonzero(bits)
        self._tokens.append([self._token(row) for row in plan.sample_rows()])

    def restart(self) -> None:
        self._in_flight.clear()
        self._tokens.clear()

    def _token(self, row: SampleRow) -> int:
        if row.target >= 0:
            return row.target
        token = self._ids[(row.position + 1) % len(TEXT)]
        if self.script is not None:
            index = row.position + 1 - len(self._slots[row.slot].prompt_token_ids)
            token = self.script[min(index, len(self.script) - 1)]
        allowed = self._masks.get(row.slot)
        return token if allowed is None or token in allowed else int(allowed[0])

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        plan = self._in_flight.popleft()
        time.sleep(self.step_s)
        self.gate.wait()
        if self.num_out_of_memory:
            self.num_out_of_memory -= 1
            raise StepOutOfMemory
        if self.fails:
            raise RuntimeError(self.failure)
        ids = self._tokens.popleft()
        n = len(ids)
        return plan, StepResults(
            step_id=plan.step_id,
            token_ids=np.array(ids, np.int32),
            logprobs=np.full(n, -0.5, np.float32),
            ranks=np.ones(n, np.int32),
            top_ids=np.tile(np.arange(MAX_TOP_LOGPROBS, dtype=np.int32), (n, 1)),
            top_logprobs=np.tile(-np.arange(MAX_TOP_LOGPROBS, dtype=np.float32), (n, 1)),
        )


@dataclass
class Service:
    server: Server
    client: Client
    engine: Engine
    scheduler: Scheduler
    executor: ScriptedExecutor | None
    loop: asyncio.AbstractEventLoop

    def will_say(self, text: str) -> None:
        """Every answer from now on is this text and an end, as far as a constraint allows it."""
        assert self.executor is not None
        tokenizer = byte_tokenizer()
        self.executor.script = [*tokenizer.encode(text), *tokenizer.eos_token_ids]

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.grpc_port}"

    def call(self, coroutine):
        """Runs a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=30)

    def make_ready(self) -> None:
        self.call(self._make_ready())

    async def _make_ready(self) -> None:
        await self.server.become_ready(
            Serving(
                engine=self.engine,
                async_engine=AsyncEngine(self.engine, self.loop),
                tokenizer=byte_tokenizer(),
                card=_card(self.scheduler.config),
                limits=PromptLimits.of_model(MODEL_CONFIG.vocab_size, self.engine.max_model_len),
                num_startup_compiles=2,
                weights_name=lambda: "scripted@7",
                grammars=self.engine.grammars,
            )
        )

    def num_streams(self) -> int:
        serving = self.server.state.serving
        return 0 if serving is None else serving.async_engine.num_streams

    def close(self) -> None:
        if self.executor is not None:
            self.executor.gate.set()
        self.client.close()
        self.call(self.server.stop())
        self.engine.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def held_pages(self) -> int:
        load = self.engine.snapshot()
        return load.num_pages_total - load.num_pages_free - load.num_pages_cached

    def assert_idle(self, timeout_s: float = 5.0) -> None:
        """Nothing runs or waits, and every page is accounted for."""
        wait_for(lambda: self.is_idle(), timeout_s)
        self.scheduler.pages.check_integrity([])

    def is_idle(self) -> bool:
        load = self.engine.snapshot()
        return load.num_running == 0 and load.num_waiting == 0 and self.held_pages() == 0


def wait_for(condition, timeout_s: float = 5.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.002)


def _card(config: SchedulerConfig) -> ModelCard:
    return ModelCard(
        name="script",
        family="llama",
        vocab_size=MODEL_CONFIG.vocab_size,
        max_model_len=config.max_model_len,
        bos_token_id=MODEL_CONFIG.bos_token_id,
        eos_token_ids=MODEL_CONFIG.eos_token_ids,
        dtype="float32",
        page_size=config.page_size,
        num_pages=config.num_pages,
        max_num_seqs=config.max_num_seqs,
        token_budget=config.token_budget,
        buckets=config.buckets,
        policy=config.policy,
    )


class SetClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def start_server_loop(**settings: Any) -> tuple[Server, asyncio.AbstractEventLoop]:
    """A server that answers on free ports, and the event loop it runs on."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    settings = {"drain_timeout_s": 5.0} | settings
    config = ServerConfig(grpc_port=0, http_port=0, **settings)
    server = asyncio.run_coroutine_threadsafe(_new_server(config), loop).result(timeout=10)
    return server, loop


def start_service(
    *,
    clock: Callable[[], float] = time.monotonic,
    server_settings: Mapping[str, Any] = MappingProxyType({}),
    **limits: Any,
) -> Service:
    """A service whose ports answer; `make_ready` hands it the engine."""
    tokenizer = byte_tokenizer()
    scheduler = Scheduler(replace(SCHEDULER_CONFIG, **limits))
    executor = ScriptedExecutor(tokenizer)
    recovery = MemoryRecovery(scheduler, executor)
    engine = Engine(scheduler, executor, tokenizer, MODEL_CONFIG, clock=clock, recovery=recovery)
    server, loop = start_server_loop(**server_settings)
    server.state.clock = clock
    engine.start()
    client = Client(f"127.0.0.1:{server.grpc_port}")
    return Service(server, client, engine, scheduler, executor, loop)


@contextmanager
def ready_service() -> Iterator[Service]:
    """A service for several tests, which must leave it idle."""
    service = start_service()
    service.make_ready()
    yield service
    service.assert_idle()
    service.close()


async def _new_server(config: ServerConfig) -> Server:
    server = Server(config)
    await server.start()
    return server
