"""The server's life: take the ports, start the engine, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc.aio

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.hung_device import leave_hung_device
from jaxserve.server.access.door import Door
from jaxserve.server.access.key_ring import KeyRing
from jaxserve.server.config import ServerConfig
from jaxserve.server.grpc_port import GrpcPort
from jaxserve.server.grpc_server import create_grpc_server
from jaxserve.server.health import HealthReporter
from jaxserve.server.http.http_server import HttpServer
from jaxserve.server.prompt_limits import PromptLimits
from jaxserve.server.state import ModelCard, ServerState, Serving
from jaxserve.server.tls import TlsKeeper
from jaxserve.server.tracing import RequestTracer

if TYPE_CHECKING:
    from jaxserve.engine.encoder.startup import RunningEncoder
    from jaxserve.engine.startup import RunningEngine

    Running = RunningEngine | RunningEncoder

_T = TypeVar("_T")

NUM_TOKENIZER_THREADS = 2
FLUSH_GRACE_S = 5.0
"""For streams to hand their last messages to the client, when the time to drain is over."""
CLOSE_GRACE_S = 1.0
"""For clients to close connections on which nothing comes any more."""
CUT_SHORT = "the server stopped before the answer was whole: send the request elsewhere"
FILES_POLL_S = 1.0
"""How often the files of keys and certificates are looked at."""
LOSS_NOTICE_S = 2.0
"""For health checks to see that the server is degraded, before it ends."""


class Server:
    """Both front ends of one engine, on the running event loop.

    Between `start` and `become_ready` the ports answer: health NOT_SERVING,
    requests UNAVAILABLE.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError if the files of keys or certificates cannot be used, or traces are
        asked for and their packages are not there."""
        self.state = ServerState(degraded_after_s=config.degraded_after_s)
        self.grpc_port = 0
        self.http_port = 0
        self._config = config
        self._ring = KeyRing(config.api_keys_file)
        self._door = Door.of(self._ring, self.state)
        self._tls = None if config.tls is None else TlsKeeper(config.tls)
        self._tracer: RequestTracer | None = None
        if config.otlp_endpoint is not None:
            # The state's clock is looked up each time, since it can be exchanged.
            clock = lambda: self.state.clock()  # noqa: E731, PLW0108
            self._tracer = RequestTracer(config.otlp_endpoint, clock)
        self._health = HealthReporter(self.state)
        self._workers = ThreadPoolExecutor(NUM_TOKENIZER_THREADS, "jaxserve-tokenize")
        self._cleanup = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Takes the ports. Raises ConfigError when one cannot be had."""
        config, cleanup = self._config, self._cleanup
        await self._health.refresh()
        cleanup.callback(self._workers.shutdown, wait=False, cancel_futures=True)
        self._grpc = GrpcPort(config.host, config.grpc_port, self._make_grpc)
        self.grpc_port = self._grpc.port
        cleanup.push_async_callback(self._grpc.stop)
        self._http = HttpServer(config, self.state, self._workers, self._door, self._tls)
        cleanup.push_async_callback(self._http.stop)
        self.http_port = self._http.port
        await self._grpc.start()
        await self._http.start()
        for watch in (self._health.watch(), self._watch_files(), self._grpc.watch()):
            cleanup.callback(asyncio.create_task(watch).cancel)

    def _make_grpc(self, port: int) -> tuple[grpc.aio.Server, int]:
        config = replace(self._config, grpc_port=port)
        return create_grpc_server(
            config, self.state, self._health, self._workers, self._door, self._tls
        )

    async def _watch_files(self) -> None:
        """Takes new keys and certificates. Runs until cancelled."""
        while True:
            await asyncio.sleep(FILES_POLL_S)
            self._ring.reload_if_changed()
            if self._tls is not None:
                self._tls.reload_if_changed()

    async def become_ready(self, serving: Serving) -> None:
        """Raises ConfigError if the engine cannot keep what the keys file promises."""
        self._door.open_to(serving)
        if self._tracer is not None:
            self._tracer.name_model(serving.card.name)
            serving.async_engine.observe_with(self._tracer)
        self.state.serving = serving
        await self._health.refresh()

    async def drain(self) -> bool:
        """Refuses new requests and lets running ones flow to their end, which is when their
        clients have been sent all of it.

        False when some had to be cut short after `drain_timeout_s`.
        """
        self.state.draining = True
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._config.drain_timeout_s
        await self._health.refresh()
        drained = True
        if self.state.serving is not None:
            serving = self.state.serving
            # Before the engine cancels them, so that clients are told why.
            cut = partial(loop.call_soon_threadsafe, serving.async_engine.lose, CUT_SHORT)
            drain = partial(serving.engine.drain, before_cut=cut)
            drained = await asyncio.to_thread(drain, self._config.drain_timeout_s)
        return await self.stop_listening(max(FLUSH_GRACE_S, end_s - loop.time())) and drained

    async def stop_listening(self, grace_s: float = FLUSH_GRACE_S) -> bool:
        """Refuses requests, and lets those that were taken hand over their last messages.

        False when some have not after `grace_s`.
        """
        handed_over = await asyncio.gather(
            self.state.promises.wait(grace_s), self._http.stop(grace_s)
        )
        await self._grpc.stop(CLOSE_GRACE_S)
        return all(handed_over)

    async def lose(self, why: str) -> None:
        """What steps need is gone: streams end as UNAVAILABLE with `why`, health is NOT_SERVING
        (DEGRADED on HTTP), and requests are refused. The ports go on answering."""
        self.end_streams(why)
        await self._health.refresh()

    def end_streams(self, why: str) -> None:
        """The first part of `lose`, at once: what the engine's thread says of its own failure
        would come between, and reads as an error of the request."""
        serving = self.state.serving
        if serving is not None:
            serving.engine.fail(why)
            serving.async_engine.lose(why)

    async def stop(self) -> bool:
        """Ends everything at once, the engine included. Can be called twice.

        False when the engine's thread cannot be ended, since the device hangs.
        """
        self.state.draining = True
        await self._cleanup.aclose()
        stopped = True
        if self.state.serving is not None:
            stopped = await asyncio.to_thread(self.state.serving.engine.stop)
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            await asyncio.to_thread(tracer.close)
        return stopped


def serving_of(running: Running) -> Serving:
    """What the front end needs of a running engine. Call it on the event loop."""
    # Imported late: jax comes with it, and by now it is there.
    from jaxserve.engine.encoder.startup import RunningEncoder

    if isinstance(running, RunningEncoder):
        return _serving_of_encoder(running)
    return _serving_of_generator(running)


def _serving_of_generator(running: RunningEngine) -> Serving:
    settings, model = running.report.settings, running.report.settings.model_config
    scheduler = settings.scheduler
    card = ModelCard(
        name=running.report.model_name,
        family=model.family,
        vocab_size=model.vocab_size,
        max_model_len=scheduler.max_model_len,
        bos_token_id=running.tokenizer.bos_token_id,
        eos_token_ids=tuple(dict.fromkeys(model.eos_token_ids + running.tokenizer.eos_token_ids)),
        dtype=settings.dtype.name,
        page_size=scheduler.page_size,
        num_pages=scheduler.num_pages * settings.mesh.data,
        max_num_seqs=settings.num_seqs,
        token_budget=scheduler.token_budget,
        buckets=scheduler.buckets,
        policy=scheduler.policy,
    )
    return Serving(
        engine=running.engine,
        async_engine=AsyncEngine(running.engine, asyncio.get_running_loop()),
        tokenizer=running.tokenizer,
        card=card,
        limits=PromptLimits.of_model(model.vocab_size, scheduler.max_model_len),
        num_startup_compiles=running.report.num_compiles,
        weights_name=lambda: running.weights.name,
        weight_swaps=lambda: running.weights.swaps,
        grammars=running.engine.grammars,
        adapters=running.adapters,
    )


def _serving_of_encoder(running: RunningEncoder) -> Serving:
    settings, model = running.report.settings, running.report.settings.model
    card = ModelCard(
        name=running.report.model_name,
        family=model.family,
        vocab_size=model.vocab_size,
        max_model_len=settings.max_tokens,
        bos_token_id=running.tokenizer.bos_token_id,
        eos_token_ids=running.tokenizer.eos_token_ids,
        dtype=settings.dtype.name,
        page_size=0,
        num_pages=0,
        max_num_seqs=settings.max_texts,
        token_budget=settings.token_budget,
        buckets=tuple(bucket.num_rows for bucket in settings.buckets),
        policy="",
        embedding_size=model.embedding_size,
        num_classes=model.num_classes,
    )
    return Serving(
        engine=running.engine,
        async_engine=AsyncEngine(running.engine, asyncio.get_running_loop()),
        tokenizer=running.tokenizer,
        card=card,
        limits=PromptLimits.of_model(
            model.vocab_size, settings.max_tokens, settings.max_queued_requests
        ),
        num_startup_compiles=running.report.num_compiles,
        weights_name=lambda: running.report.model_name,
        label_texts=running.label_texts,
    )


async def run_until_signal(
    server: Server,
    start: Callable[[], Running],
    *,
    on_ready: Callable[[Running], None],
    on_drain: Callable[[], None],
    lost: asyncio.Future[str] | None = None,
) -> bool:
    """Serves until SIGTERM or SIGINT, then drains. A second signal is immediate.

    Args:
        server: not started yet.
        start: makes the engine; runs in a thread, while the ports answer.
        lost: says why no step can be done any more, if that happens outside the engine.

    Returns:
        Whether every request came to its own end. Raises what `start` raises.
        Does not return, but ends the process with code 1, when the device hangs or `lost` is
        done.
    """
    signalled = _catch_signals()
    lost = lost or asyncio.get_running_loop().create_future()
    await server.start()
    try:
        starting = _in_daemon_thread(start)
        stop = asyncio.create_task(signalled.wait())
        await _first_of(starting, stop, lost)
        if lost.done() and not starting.done():
            await server.stop()
            leave_hung_device(lost.result())
        if not starting.done():
            # A compilation cannot be interrupted, and a process that ends
            # under it may crash: leave at once, since there is nothing to lose.
            await server.stop()
            os._exit(0)
        running = starting.result()
        await server.become_ready(serving_of(running))
        on_ready(running)
        await _first_of(stop, lost)
        if not lost.done():
            on_drain()
            drain = asyncio.create_task(server.drain())
            await _first_of(drain, lost)
            if drain.done():
                return drain.result()
        await _tell_of_loss(server, lost.result())
    finally:
        if not await server.stop():
            leave_hung_device()


async def _first_of(*awaited: asyncio.Future[Any]) -> None:
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)


async def _tell_of_loss(server: Server, why: str) -> NoReturn:
    """Lets clients and balancers learn of it, then ends the process, whose engine may wait for
    the device for ever."""
    await server.lose(why)
    await asyncio.sleep(LOSS_NOTICE_S)
    await server.stop_listening()
    leave_hung_device(why)


def _catch_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process."""
    signalled = asyncio.Event()

    def handle(number: int) -> None:
        if signalled.is_set():
            os._exit(128 + number)
        signalled.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, handle, number)
    return signalled


def _in_daemon_thread(function: Callable[[], _T]) -> asyncio.Future[_T]:
    """Like `asyncio.to_thread`, but the process can end without waiting for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # Whatever it is, the waiter must get it.
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, name="jaxserve-start", daemon=True).start()
    return future
