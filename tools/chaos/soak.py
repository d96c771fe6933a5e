"""The soak: phases of load on one server, with a restart in the middle."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tools.chaos.at_rest import at_rest
from tools.chaos.clients import GrpcClient
from tools.chaos.phases import Findings, Phases
from tools.chaos.questions import Answer, End, Questions, make_prompts
from tools.chaos.soaked_server import Sample, SoakedServer
from tools.chaos.tiny_model import END
from tools.chaos.verdicts import Verdict, judge_memory, judge_rest, judge_tokens

NUM_PROMPTS = 12
SAMPLE_PERIOD_S = 0.5

OnPhase = Callable[[str, float], None]
"""Is told of a phase and how many seconds it will take."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Seconds of each phase."""

    warm_up_s: float
    overload_s: float
    """Twice: for the peak, and for more than that."""
    pace_s: float
    """Twice: without slow readers, then beside them."""
    chaos_s: float
    """Twice: before the restart and after it."""

    @classmethod
    def of(cls, total_s: float) -> Schedule:
        """Overload is measured for 10 s at least, slow readers for 60 s if there is time."""
        overload_s = min(60.0, max(10.0, 0.1 * total_s))
        pace_s = min(60.0, max(8.0, 0.1 * total_s))
        rest_s = total_s - 2 * overload_s - 2 * pace_s - 5.0
        return cls(5.0, overload_s, pace_s, max(10.0, rest_s / 2))

    @property
    def total_s(self) -> float:
        return self.warm_up_s + 2 * (self.overload_s + self.pace_s + self.chaos_s)


async def soak(
    server: SoakedServer,
    schedule: Schedule,
    on_phase: OnPhase,
    seed: int = 0,
    *,
    overload_alone: bool = False,
) -> Findings:
    """Runs all phases on a server that is READY, or peak and overload alone.

    Between two phases everything is closed and the server is looked at. Leaves it running.
    """
    on_phase("expected answers", 0)
    questions = await ask_alone(server)
    phases = Phases(server, questions, random.Random(seed), on_phase)  # noqa: S311  no secrets
    async with _life(phases, "the first process"):
        await phases.warm_up(schedule.warm_up_s)
        await phases.overload(schedule.overload_s)
        if not overload_alone:
            await phases.pace(schedule.pace_s)
            await phases.chaos("chaos", schedule.chaos_s)
    if not overload_alone:
        await phases.restart()
        async with _life(phases, "the second process"):
            await phases.chaos("chaos after the restart", schedule.chaos_s)
    findings = phases.findings
    findings.verdicts = judge_tokens(phases.answers, questions) + findings.verdicts
    return findings


async def ask_alone(server: SoakedServer, num_prompts: int = NUM_PROMPTS) -> Questions:
    """What an idle server answers. Raises RuntimeError if it does not."""
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


@asynccontextmanager
async def _life(phases: Phases, name: str) -> AsyncIterator[None]:
    """Judges what one process of the server holds before and after, and its memory between."""
    before = await at_rest(phases.server)
    samples: list[Sample] = []

    async def watch() -> None:
        while True:
            sample = phases.server.sample()
            if sample is not None:
                samples.append(sample)
            await asyncio.sleep(SAMPLE_PERIOD_S)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
    phases.on_phase("at rest", 5)
    phases.findings.verdicts.append(judge_memory(name, samples))
    phases.findings.verdicts += judge_rest(name, before, await at_rest(phases.server))


def worst(verdicts: Sequence[Verdict]) -> int:
    """The exit code: 0 if all hold, 1 if one fails, 3 if none fails and some are void."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return 1 if "fails" in outcomes else 3 if "void" in outcomes else 0
