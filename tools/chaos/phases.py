"""The phases of a soak: each does something to the server and notes what it found."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from tools.chaos.crowd import Crowd, Watch, whole_per_s
from tools.chaos.nuisances import read_nothing, send_rubbish
from tools.chaos.questions import Answer, End, Questions
from tools.chaos.soaked_server import SoakedServer
from tools.chaos.verdicts import Verdict, judge_overload, judge_pace

NUM_CLIENTS = 200
NUM_SLOW_READERS = 8
NUM_PEAK_CLIENTS = 48
"""More than the slots and fewer than the queue holds: busy, and nobody refused."""
NUM_PACE_CLIENTS = 8
OVERLOAD = 5.0
MAX_OVERLOAD_ROUNDS = 5
MIN_ROUND_S = 8.0
"""Of a peak or an overload: a fifth of it, in which the queue fills, does not count."""
LEAVING_FRACTION = 0.15
MAX_TRIES = 3
"""Of a measured phase, when the machine stood still in it."""

_T = TypeVar("_T")


@dataclass(slots=True)
class Findings:
    """What a soak found."""

    verdicts: list[Verdict] = field(default_factory=list)
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    """By phase: CPU share of the clients' process, the fraction of late timers, and for how many
    seconds the machine stood still."""


@dataclass(slots=True)
class Phases:
    """Of one soak, whose findings and answers they gather."""

    server: SoakedServer
    questions: Questions
    rng: random.Random
    on_phase: Callable[[str, float], None]
    """Is told of a phase and how many seconds it will take."""
    findings: Findings = field(default_factory=Findings)
    answers: list[Answer] = field(default_factory=list)

    async def warm_up(self, seconds: float) -> None:
        self.on_phase("warm-up", seconds)
        async with self._crowd() as crowd:
            await crowd.closed_loop(NUM_CLIENTS, seconds, LEAVING_FRACTION)

    async def overload(self, seconds: float) -> None:
        """The peak, then `OVERLOAD` times as many requests, in rounds, since a shared machine's
        speed drifts from one minute to the next. Nothing else may run beside it.

        Args:
            seconds: of all peaks together, and of all overloads.
        """
        num_rounds = max(1, min(MAX_OVERLOAD_ROUNDS, int(seconds / MIN_ROUND_S)))
        round_s = seconds / num_rounds
        peaks_per_s, goods_per_s = [], []
        floods: list[Answer] = []
        watches: list[Watch] = []
        async with self._crowd() as crowd:
            for index in range(1, num_rounds + 1):
                calm, peak = await self._unpaused(
                    f"peak {index}",
                    round_s,
                    lambda _: crowd.closed_loop(NUM_PEAK_CLIENTS, round_s),
                )
                peak_per_s = _settled_rate(calm, peak, round_s)
                rate = OVERLOAD * peak_per_s
                flood, watch = await self._unpaused(
                    f"overload {index}", round_s, partial(crowd.open_loop, rate, round_s)
                )
                peaks_per_s.append(peak_per_s)
                goods_per_s.append(_settled_rate(flood, watch, round_s))
                floods += flood
                watches += (peak, watch)
        self.findings.verdicts += judge_overload(peaks_per_s, goods_per_s, floods, watches)

    async def pace(self, seconds: float) -> None:
        """A few clients, then the same beside slow readers. Nothing else may run beside it."""
        async with self._crowd() as crowd:
            without, alone = await self._unpaused(
                "pace", seconds, lambda _: crowd.closed_loop(NUM_PACE_CLIENTS, seconds)
            )
            beside, crowded = await self._unpaused(
                "slow readers", seconds, lambda _: self._beside_slow_readers(crowd, seconds)
            )
        self.findings.verdicts.append(judge_pace(without, beside, (alone, crowded)))

    async def _beside_slow_readers(self, crowd: Crowd, seconds: float) -> list[Answer]:
        prompt = self.questions.prompts[0]
        slow = [
            asyncio.create_task(
                read_nothing(self.server, prompt, seconds, over_grpc=index % 2 == 0)
            )
            for index in range(NUM_SLOW_READERS)
        ]
        start_s = min(5.0, seconds / 4)
        await asyncio.sleep(start_s)
        beside = await crowd.closed_loop(NUM_PACE_CLIENTS, seconds - start_s)
        await asyncio.gather(*slow)
        return beside

    async def chaos(self, phase: str, seconds: float) -> None:
        """200 clients of which some leave, slow readers and rubbish, all at once."""
        with self._watched(phase, seconds):
            async with self._crowd() as crowd, self._nuisances():
                await crowd.closed_loop(NUM_CLIENTS, seconds, LEAVING_FRACTION)

    async def restart(self) -> None:
        """SIGTERM while 200 clients ask; they go on asking until the next process answers."""
        self.on_phase("restart", 20)
        is_back = asyncio.Event()
        async with self._crowd() as crowd:
            load = asyncio.create_task(crowd.closed_loop_until(is_back.is_set, NUM_CLIENTS))
            await asyncio.sleep(3.0)
            self.server.terminate()
            try:
                exit_code = await asyncio.to_thread(self.server.wait)
                await asyncio.to_thread(self.server.start)
            finally:
                is_back.set()
            await load
            after = await crowd.closed_loop(NUM_PACE_CLIENTS, 5.0)
        num_cut = sum(answer.end is End.CUT for answer in crowd.answers)
        num_after = sum(answer.end is End.WHOLE for answer in after)
        self.findings.verdicts += [
            Verdict.of(
                "streams cut by SIGTERM",
                f"{num_cut} (exit code {exit_code})",
                "0, and exit code 0",
                num_cut == 0 and exit_code == 0,
            ),
            Verdict.of("answers of the next process", f"{num_after}", "> 0", num_after > 0),
        ]

    async def _unpaused(
        self, phase: str, seconds: float, measure: Callable[[Watch], Awaitable[_T]]
    ) -> tuple[_T, Watch]:
        """Measures again if the machine stood still meanwhile, `MAX_TRIES` times at most."""
        for _ in range(MAX_TRIES):
            with self._watched(phase, seconds) as watch:
                result = await measure(watch)
            if not watch.paused_s:
                break
        return result, watch

    @contextlib.contextmanager
    def _watched(self, phase: str, seconds: float) -> Iterator[Watch]:
        """Notes how busy the clients were."""
        self.on_phase(phase, seconds)
        watch = Watch()
        task = asyncio.create_task(watch.run())
        try:
            yield watch
        finally:
            task.cancel()
            self.findings.clients[phase] = {
                "cpu_share": watch.cpu_share,
                "late_fraction": watch.late_fraction,
                "paused_s": watch.paused_s,
            }

    @asynccontextmanager
    async def _crowd(self) -> AsyncIterator[Crowd]:
        """Its answers are kept."""
        crowd = Crowd(self.server, self.questions, self.rng)
        try:
            yield crowd
        finally:
            await crowd.close()
            self.answers += crowd.answers

    @asynccontextmanager
    async def _nuisances(self) -> AsyncIterator[None]:
        async def rubbish() -> None:
            while True:
                await send_rubbish(self.server, self.rng)
                await asyncio.sleep(0.2)

        async def slow(over_grpc: bool) -> None:
            while True:
                prompt = self.rng.choice(self.questions.prompts)
                await read_nothing(self.server, prompt, 20.0, over_grpc=over_grpc)

        tasks = [asyncio.create_task(rubbish()) for _ in range(4)]
        tasks += [
            asyncio.create_task(slow(index % 2 == 0)) for index in range(NUM_SLOW_READERS // 2)
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _settled_rate(answers: Sequence[Answer], watch: Watch, seconds: float) -> float:
    """Whole answers a second, without the first fifth of the phase."""
    return whole_per_s(answers, watch.started_s + 0.2 * seconds, watch.started_s + seconds)
