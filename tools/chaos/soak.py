"""The soak: phases of load on one server, with a restart in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
import urllib.error
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from tools.chaos.clients import GrpcClient
from tools.chaos.crowd import Crowd, Watch, whole_per_s
from tools.chaos.nuisances import read_nothing, send_rubbish
from tools.chaos.questions import Answer, End, Questions, make_prompts
from tools.chaos.soaked_server import Sample, SoakedServer
from tools.chaos.tiny_model import END
from tools.chaos.verdicts import (
    AtRest,
    Verdict,
    judge_memory,
    judge_overload,
    judge_pace,
    judge_rest,
    judge_tokens,
)

NUM_CLIENTS = 200
NUM_SLOW_READERS = 8
NUM_PEAK_CLIENTS = 48
NUM_PACE_CLIENTS = 8
NUM_PROMPTS = 12
OVERLOAD = 5.0
LEAVING_FRACTION = 0.15
MAX_LOOKS = 120
LOOK_PERIOD_S = 0.5
MAX_TRIES = 3
"""Of a measured phase, when the machine stood still in it."""
SAMPLE_PERIOD_S = 0.5

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Seconds of each phase."""

    warm_up_s: float
    peak_s: float
    overload_s: float
    pace_s: float
    """Twice: without slow readers, then beside them."""
    chaos_s: float
    """Twice: before the restart, whose drain falls into its end, and after it."""

    @classmethod
    def of(cls, total_s: float) -> Schedule:
        """Overload is measured for 10 s at least, slow readers for 60 s if there is time."""
        overload_s = min(60.0, max(10.0, 0.1 * total_s))
        pace_s = min(60.0, max(8.0, 0.1 * total_s))
        rest_s = total_s - 2 * overload_s - 2 * pace_s - 5.0
        return cls(5.0, overload_s, overload_s, pace_s, max(10.0, rest_s / 2))

    @property
    def total_s(self) -> float:
        return self.warm_up_s + self.peak_s + self.overload_s + 2 * self.pace_s + 2 * self.chaos_s


@dataclass(slots=True)
class Findings:
    """What a soak found."""

    verdicts: list[Verdict] = field(default_factory=list)
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    """By phase: CPU share of the clients' process, the fraction of late timers, and for how many
    seconds the machine stood still."""


OnPhase = Callable[[str, float], None]
"""Is told of a phase and how many seconds it will take."""


async def soak(
    server: SoakedServer, schedule: Schedule, on_phase: OnPhase, seed: int = 0
) -> Findings:
    """Runs all phases on a server that is READY.

    Between two phases everything is closed and the server is looked at. Leaves it running.
    """
    rng = random.Random(seed)  # noqa: S311  no secrets
    findings = Findings()
    on_phase("expected answers", 0)
    questions = await ask_alone(server)
    answers: list[Answer] = []

    first = await at_rest(server)
    async with _sampled(server) as samples:
        await _measured_phases(server, questions, schedule, rng, findings, answers, on_phase)
        on_phase("chaos", schedule.chaos_s)
        answers += await _chaos(server, questions, rng, schedule.chaos_s, findings, "chaos")
    on_phase("at rest", 5)
    findings.verdicts.append(judge_memory("the first process", samples))
    findings.verdicts += judge_rest("the first process", first, await at_rest(server))

    on_phase("restart", 20)
    answers += await _restart_under_load(server, questions, rng, findings)
    second = await at_rest(server)
    on_phase("chaos after the restart", schedule.chaos_s)
    async with _sampled(server) as samples:
        answers += await _chaos(
            server, questions, rng, schedule.chaos_s, findings, "chaos after the restart"
        )
    on_phase("at rest", 5)
    findings.verdicts.append(judge_memory("the second process", samples))
    findings.verdicts += judge_rest("the second process", second, await at_rest(server))
    findings.verdicts = judge_tokens(answers, questions) + findings.verdicts
    return findings


async def ask_alone(server: SoakedServer, num_prompts: int = NUM_PROMPTS) -> Questions:
    client, prompts = GrpcClient(server.grpc_address), make_prompts(num_prompts, END)
    expected = []
    for index, prompt in enumerate(prompts):
        answer = Answer(index, time.monotonic())
        await client.ask(answer, prompt)
        if answer.end is not End.WHOLE:
            raise RuntimeError(f"an idle server did not answer: {answer.end} {answer.detail}")
        expected.append(answer.token_ids)
    await client.close()
    return Questions(prompts, expected)


async def _measured_phases(
    server: SoakedServer,
    questions: Questions,
    schedule: Schedule,
    rng: random.Random,
    findings: Findings,
    answers: list[Answer],
    on_phase: OnPhase,
) -> None:
    """Peak, overload and pace: nothing else may run beside these."""
    on_phase("warm-up", schedule.warm_up_s)
    async with _crowd(server, questions, rng, answers) as crowd:
        await crowd.closed_loop(NUM_CLIENTS, schedule.warm_up_s, LEAVING_FRACTION)
        on_phase("peak", schedule.peak_s)
        # More than the slots and fewer than the queue holds: busy, and nobody refused.
        calm, peak = await _unpaused(
            lambda _: crowd.closed_loop(NUM_PEAK_CLIENTS, schedule.peak_s), "peak", findings
        )
        peak_per_s = _settled_rate(calm, peak, schedule.peak_s)
        on_phase("overload", schedule.overload_s)
        flood, overload = await _unpaused(
            lambda watch: crowd.open_loop(OVERLOAD * peak_per_s, schedule.overload_s, watch),
            "overload",
            findings,
        )
        good_per_s = _settled_rate(flood, overload, schedule.overload_s)
        findings.verdicts += judge_overload(peak_per_s, good_per_s, flood, (peak, overload))
        on_phase("pace", schedule.pace_s)
        without, alone = await _unpaused(
            lambda _: crowd.closed_loop(NUM_PACE_CLIENTS, schedule.pace_s), "pace", findings
        )
        on_phase("slow readers", schedule.pace_s)
        beside, crowded = await _unpaused(
            lambda _: _beside_slow_readers(server, questions, crowd, schedule.pace_s),
            "slow readers",
            findings,
        )
        findings.verdicts.append(judge_pace(without, beside, (alone, crowded)))


async def _unpaused(
    measure: Callable[[Watch], Awaitable[_T]], phase: str, findings: Findings
) -> tuple[_T, Watch]:
    """Measures again if the machine stood still meanwhile, at most `MAX_TRIES` times in all."""
    for _ in range(MAX_TRIES):
        with watched(phase, findings) as watch:
            result = await measure(watch)
        if not watch.paused_s:
            break
    return result, watch


def _settled_rate(answers: Sequence[Answer], watch: Watch, seconds: float) -> float:
    """Whole answers a second, without the first fifth of the phase."""
    return whole_per_s(answers, watch.started_s + 0.2 * seconds, watch.started_s + seconds)


async def _beside_slow_readers(
    server: SoakedServer, questions: Questions, crowd: Crowd, seconds: float
) -> list[Answer]:
    slow = [
        asyncio.create_task(
            read_nothing(server, questions.prompts[0], seconds, over_grpc=index % 2 == 0)
        )
        for index in range(NUM_SLOW_READERS)
    ]
    start_s = min(5.0, seconds / 4)
    await asyncio.sleep(start_s)
    beside = await crowd.closed_loop(NUM_PACE_CLIENTS, seconds - start_s)
    await asyncio.gather(*slow)
    return beside


async def _chaos(
    server: SoakedServer,
    questions: Questions,
    rng: random.Random,
    seconds: float,
    findings: Findings,
    phase: str,
) -> list[Answer]:
    """200 clients of which some leave, slow readers and rubbish, all at once."""
    answers: list[Answer] = []
    with watched(phase, findings):
        async with (
            _crowd(server, questions, rng, answers) as crowd,
            _nuisances(server, questions, rng),
        ):
            await crowd.closed_loop(NUM_CLIENTS, seconds, LEAVING_FRACTION)
    return answers


async def _restart_under_load(
    server: SoakedServer, questions: Questions, rng: random.Random, findings: Findings
) -> list[Answer]:
    """SIGTERM while 200 clients ask; they go on asking until the next process answers."""
    answers: list[Answer] = []
    is_back = asyncio.Event()
    async with _crowd(server, questions, rng, answers) as crowd:
        load = asyncio.create_task(crowd.closed_loop_until(is_back.is_set, NUM_CLIENTS))
        await asyncio.sleep(3.0)
        server.terminate()
        try:
            exit_code = await asyncio.to_thread(server.wait)
            await asyncio.to_thread(server.start)
        finally:
            is_back.set()
        await load
        after = await crowd.closed_loop(NUM_PACE_CLIENTS, 5.0)
    for answer in answers:
        # gRPC ends calls so that wait for the server's attention when it stops listening.
        if answer.detail.startswith("CANCELLED") and not answer.is_begun:
            answer.end = End.UNREACHABLE
    cut = sum(answer.end is End.CUT for answer in answers)
    whole_after = sum(answer.end is End.WHOLE for answer in after)
    findings.verdicts += [
        Verdict.of(
            "streams cut by SIGTERM",
            f"{cut} (exit code {exit_code})",
            "0, and exit code 0",
            cut == 0 and exit_code == 0,
        ),
        Verdict.of("answers of the next process", f"{whole_after}", "> 0", whole_after > 0),
    ]
    return answers


@asynccontextmanager
async def _crowd(
    server: SoakedServer, questions: Questions, rng: random.Random, answers: list[Answer]
) -> AsyncIterator[Crowd]:
    """Adds to `answers` what the crowd got."""
    crowd = Crowd(server, questions, rng)
    try:
        yield crowd
    finally:
        await crowd.close()
        answers += crowd.answers


@asynccontextmanager
async def _nuisances(
    server: SoakedServer, questions: Questions, rng: random.Random
) -> AsyncIterator[None]:
    async def rubbish() -> None:
        while True:
            await send_rubbish(server, rng)
            await asyncio.sleep(0.2)

    async def slow(over_grpc: bool) -> None:
        while True:
            await read_nothing(server, rng.choice(questions.prompts), 20.0, over_grpc=over_grpc)

    tasks = [asyncio.create_task(rubbish()) for _ in range(4)]
    tasks += [asyncio.create_task(slow(index % 2 == 0)) for index in range(NUM_SLOW_READERS // 2)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def watched(phase: str, findings: Findings) -> Iterator[Watch]:
    """Notes how busy the clients were."""
    watch = Watch()
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        findings.clients[phase] = {
            "cpu_share": watch.cpu_share,
            "late_fraction": watch.late_fraction,
            "paused_s": watch.paused_s,
        }


@asynccontextmanager
async def _sampled(server: SoakedServer) -> AsyncIterator[list[Sample]]:
    samples: list[Sample] = []

    async def watch() -> None:
        while True:
            sample = server.sample()
            if sample is not None:
                samples.append(sample)
            await asyncio.sleep(SAMPLE_PERIOD_S)

    task = asyncio.create_task(watch())
    try:
        yield samples
    finally:
        task.cancel()


async def at_rest(server: SoakedServer) -> AtRest:
    """Waits until nothing runs and the connections are closed, for `MAX_LOOKS` looks at most.

    Not for a time, since the machine may stand still.
    """
    gc.collect()  # gRPC's channels are closed, but keep their sockets until then.
    calm: list[AtRest] = []
    for _ in range(MAX_LOOKS):
        try:
            now = await asyncio.to_thread(_look, server)
        except (OSError, urllib.error.URLError):
            calm.clear()
            continue
        calm = [*calm, now] if not calm or calm[-1] == now else [now]
        if len(calm) >= 5 and now.num_requests == now.num_pages_held == 0:
            return now
        await asyncio.sleep(LOOK_PERIOD_S)
    if not calm:
        raise RuntimeError("the server gives no figures any more")
    return calm[-1]


def _look(server: SoakedServer) -> AtRest:
    figures, sample = server.metrics(), server.sample()
    assert sample is not None, "the server is gone"
    num_pages = figures["kv_cache_pages_total"]
    held = num_pages - figures["kv_cache_pages_free"] - figures["kv_cache_pages_cached"]
    return AtRest(
        num_fds=sample.num_fds,
        num_tasks=int(figures["event_loop_tasks"]),
        num_pages_held=int(held),
        num_requests=int(figures["num_requests_running"] + figures["num_requests_waiting"]),
        num_compiles=int(figures["unexpected_compiles_total"]),
    )


def worst(verdicts: Sequence[Verdict]) -> int:
    """The exit code: 0 if all hold, 1 if one fails, 3 if none fails and some are void."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return 1 if "fails" in outcomes else 3 if "void" in outcomes else 0
