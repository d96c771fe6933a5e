"""`jaxserve chat`: talk with a model in the terminal."""

from __future__ import annotations

import contextlib
import queue
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from jaxserve.cli.engine_options import with_engine_options
from jaxserve.cli.local_engine import local_engine
from jaxserve.cli.sampling_options import check_options
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.request import FinishReason, GenerationRequest, RequestOutput
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import ConfigError, InvalidRequest, JaxserveError

if TYPE_CHECKING:
    from jaxserve.client import Client
    from jaxserve.engine.startup import RunningEngine

app = typer.Typer(add_completion=False)

_CHAT = "Chat"
_PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages", "chat.messages")
Message = dict[str, str]


class Answerer(Protocol):
    """Answers a conversation; leaving the context early cancels the answer."""

    def answer(
        self, messages: Sequence[Message], settings: dict[str, Any]
    ) -> AbstractContextManager[Iterable[RequestOutput]]: ...


class RemoteAnswerer:
    """Asks a running server. `adapter` is empty for the model alone."""

    def __init__(self, client: Client, adapter: str = "") -> None:
        self._client = client
        self._adapter = adapter or None

    def answer(
        self, messages: Sequence[Message], settings: dict[str, Any]
    ) -> AbstractContextManager[Iterable[RequestOutput]]:
        return self._client.generate(messages, adapter=self._adapter, **settings)


class EmbeddedAnswerer:
    """Asks an engine in this process. `adapter` is empty for the model alone."""

    def __init__(self, running: RunningEngine, adapter: str = "") -> None:
        self._running = running
        self._adapter = adapter
        self._num_answers = 0

    @contextlib.contextmanager
    def answer(
        self, messages: Sequence[Message], settings: dict[str, Any]
    ) -> Iterator[Iterable[RequestOutput]]:
        self._num_answers += 1
        request_id = f"chat-{self._num_answers}"
        outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(self._running.tokenizer.encode_chat(messages)),
            sampling=SamplingParams(**settings),
            adapter=self._adapter,
        )
        added = self._running.engine.add(request, _QueueSink(outputs))
        try:
            yield _until_finished(outputs)
        finally:
            self._running.engine.cancel(added)


class _QueueSink:
    def __init__(self, outputs: queue.SimpleQueue[RequestOutput]) -> None:
        self._outputs = outputs

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self._outputs.put(output)


def _until_finished(outputs: queue.SimpleQueue[RequestOutput]) -> Iterator[RequestOutput]:
    finished = False
    while not finished:
        output = outputs.get()
        finished = output.finish_reason is not None
        yield output


@dataclass(slots=True)
class AnswerTimes:
    """When tokens came, as the person at the terminal sees it."""

    start_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0

    def note(self, output: RequestOutput) -> None:
        if output.token_ids:
            self.last_s = time.perf_counter()
            self.first_s = self.first_s or self.last_s
            self.num_tokens += len(output.token_ids)

    def summary(self) -> str:
        """One line: tokens, TTFT and TPOT."""
        if self.first_s is None:
            return "no tokens"
        parts = [f"{self.num_tokens} tokens", f"TTFT {self.first_s - self.start_s:.2f} s"]
        if self.num_tokens > 1:
            tpot_s = (self.last_s - self.first_s) / (self.num_tokens - 1)
            parts.append(f"TPOT {tpot_s * 1000:.0f} ms")
        return ", ".join(parts)


class Conversation:
    """The history, and one turn of it at a time."""

    def __init__(
        self, answerer: Answerer, settings: dict[str, Any], *, system: str | None, stats: bool
    ) -> None:
        self._answerer = answerer
        self._settings = settings
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._stats = stats
        self.messages: list[Message] = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def ask(self, question: str) -> None:
        """Streams the answer to stdout and keeps both. Ctrl-C ends the answer;
        what came of it stays in the history."""
        asked = [*self.messages, {"role": "user", "content": question}]
        pieces: list[str] = []
        times = AnswerTimes()
        try:
            self._stream(asked, pieces, times)
        except InvalidRequest as error:
            # A new conversation helps against a long one, not against a setting.
            advice = "; /reset starts anew" if error.field in _PROMPT_FIELDS else ""
            typer.echo(f"\nnot answered: {error}{advice}", err=True)
            return
        except KeyboardInterrupt:
            typer.echo(" [stopped]", nl=False)
        typer.echo()
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        if self._stats:
            typer.secho(f"[{times.summary()}]", fg=typer.colors.BRIGHT_BLACK, err=True)

    def _stream(self, messages: list[Message], pieces: list[str], times: AnswerTimes) -> None:
        with self._answerer.answer(messages, self._settings) as outputs:
            for output in outputs:
                times.note(output)
                pieces.append(output.text)
                typer.echo(output.text, nl=False)
                sys.stdout.flush()
                if output.finish_reason is FinishReason.ERROR:
                    raise output.failure or JaxserveError(
                        "the engine failed; the log above says where"
                    )


def talk(conversation: Conversation) -> None:
    """Reads questions until EOF or /exit."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            typer.echo("\n/exit leaves", err=True)
            continue
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
            typer.echo("the conversation starts anew", err=True)
        elif question.startswith("/"):
            typer.echo("there are /reset and /exit", err=True)
        elif question:
            conversation.ask(question)


@app.command()
@with_engine_options
def chat(
    engine_config: EngineConfig,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Talk with the model of a running `jaxserve serve` instead of loading one; the "
            "options of the engine are then the server's.",
            rich_help_panel=_CHAT,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="What the model is told before the first turn.", rich_help_panel=_CHAT),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="0 always takes the likeliest token.", rich_help_panel=_CHAT),
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the likeliest tokens of this mass.", rich_help_panel=_CHAT),
    ] = 0.95,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of one answer.", rich_help_panel=_CHAT)
    ] = 512,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed gives the same answers.", rich_help_panel=_CHAT),
    ] = None,
    adapter: Annotated[
        str,
        typer.Option(
            help="Name of one of --lora, or of one that the server of --server has loaded.",
            show_default="none",
            rich_help_panel=_CHAT,
        ),
    ] = "",
    stats: Annotated[
        bool,
        typer.Option("--stats", help="Show TTFT and TPOT of each answer.", rich_help_panel=_CHAT),
    ] = False,
) -> None:
    """Talk with a model, in this terminal.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops the
    answer. Questions can also be piped in, one a line.

    Examples:
        jaxserve chat
        jaxserve chat --server 127.0.0.1:50051 --stats
        jaxserve chat --lora sql=adapters/sql --adapter sql
    """
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
    settings = {
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    check_options(settings)
    if adapter and server is None and adapter not in dict(engine_config.lora):
        raise ConfigError(f"--adapter {adapter}: no --lora has this name")
    with _answerer(engine_config, server, adapter) as answerer:
        talk(Conversation(answerer, settings, system=system, stats=stats))


@contextlib.contextmanager
def _answerer(engine_config: EngineConfig, server: str | None, adapter: str) -> Iterator[Answerer]:
    if server is not None:
        from jaxserve.client import Client

        with Client(server) as client:
            if not client.is_serving():
                raise ConfigError(f"no server is ready at {server}: start `jaxserve serve` first")
            yield RemoteAnswerer(client, adapter)
        return
    with local_engine(engine_config) as running:
        yield EmbeddedAnswerer(running, adapter)
