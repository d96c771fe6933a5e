"""Many clients at once: closed loops that wait for their answers, and an open one that does not."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tools.chaos.clients import Client, GrpcClient, HttpClient
from tools.chaos.questions import Answer, End, Questions
from tools.chaos.soaked_server import SoakedServer

LAG_PERIOD_S = 0.05
LATE_S = 0.05
"""A timer or a request that comes later than this came late: the clients had too little CPU."""
PAUSE_S = 5.0
"""Later than this: the whole machine stood still (a suspended VM, say)."""


@dataclass(slots=True)
class Watch:
    """How busy the clients' own process is."""

    started_s: float = field(default_factory=time.monotonic)
    cpu_started_s: float = field(default_factory=time.process_time)
    cpu_share: float = 0.0
    """1 is a core."""
    num_ticks: int = 0
    num_late: int = 0
    paused_s: float = 0.0
    """For so long the machine stood still."""

    @property
    def late_fraction(self) -> float:
        return self.num_late / max(1, self.num_ticks)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            due_s = time.monotonic() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            late_s = time.monotonic() - due_s
            self.num_ticks += 1
            self.num_late += late_s > LATE_S
            if late_s > PAUSE_S:
                self.paused_s += late_s
            elapsed_s = time.monotonic() - self.started_s
            self.cpu_share = (time.process_time() - self.cpu_started_s) / elapsed_s


class Crowd:
    """Clients of both protocols, half of the requests each.

    Args:
        num_channels: gRPC connections; HTTP opens one a request.
    """

    def __init__(
        self, server: SoakedServer, questions: Questions, rng: random.Random, num_channels: int = 8
    ) -> None:
        self._questions = questions
        self._rng = rng
        self._grpc = [GrpcClient(server.grpc_address) for _ in range(num_channels)]
        self._http = HttpClient(server.http_port)
        self.answers: list[Answer] = []

    async def close(self) -> None:
        for client in self._grpc:
            await client.close()

    async def closed_loop(
        self, num_clients: int, seconds: float, leaving_fraction: float = 0.0
    ) -> list[Answer]:
        """Each client asks again when it is answered; a refused one waits as it is told."""
        end_s = time.monotonic() + seconds
        return await self.closed_loop_until(
            lambda: time.monotonic() >= end_s, num_clients, leaving_fraction
        )

    async def closed_loop_until(
        self, is_over: Callable[[], bool], num_clients: int, leaving_fraction: float = 0.0
    ) -> list[Answer]:
        """The same, for as long as the clients find that it is not over."""
        before = len(self.answers)

        async def live(index: int) -> None:
            client = self._client(index)
            await asyncio.sleep(self._rng.random() * 0.5)
            while not is_over():
                leaves = self._rng.random() < leaving_fraction
                answer = await self._ask(client, self._rng.randrange(40) if leaves else None)
                if answer.end in (End.REFUSED, End.UNREACHABLE):
                    await asyncio.sleep(max(answer.retry_after_s, 0.2 + 0.3 * self._rng.random()))

        await asyncio.gather(*(live(index) for index in range(num_clients)))
        return self.answers[before:]

    async def open_loop(self, rate: float, seconds: float, watch: Watch) -> list[Answer]:
        """Asks at random times of this rate (a Poisson process), whatever is answered.

        Returns when the last one is answered. After a pause of the machine it asks no more: what
        fell due meanwhile would come all at once.
        """
        before = len(self.answers)
        start_s, due_s = time.monotonic(), 0.0
        tasks: list[asyncio.Task[Answer]] = []
        while (due_s := due_s + self._rng.expovariate(rate)) < seconds:
            delay_s = start_s + due_s - time.monotonic()
            if delay_s < -PAUSE_S:
                break
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            watch.num_ticks += 1
            watch.num_late += -delay_s > LATE_S
            client = self._client(len(tasks))
            tasks.append(asyncio.create_task(self._ask(client, due_s=start_s + due_s)))
        await asyncio.gather(*tasks)
        return self.answers[before:]

    async def _ask(
        self, client: Client, leave_after: int | None = None, due_s: float | None = None
    ) -> Answer:
        question = self._rng.randrange(len(self._questions.prompts))
        answer = Answer(question, time.monotonic() if due_s is None else due_s)
        self.answers.append(answer)
        await client.ask(answer, self._questions.prompts[question], leave_after)
        return answer

    def _client(self, index: int) -> Client:
        return self._http if index % 2 else self._grpc[index // 2 % len(self._grpc)]


def whole_per_s(answers: Sequence[Answer], start_s: float, end_s: float) -> float:
    """Whole answers a second, of those that ended in this time."""
    whole = [a for a in answers if a.end is End.WHOLE and start_s <= a.ended_s < end_s]
    return len(whole) / (end_s - start_s)
