"""Verdicts: what is checked, what was measured, and whether it holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from tools.chaos.at_rest import AtRest
from tools.chaos.crowd import Watch
from tools.chaos.questions import FLUSH_TOKENS, NUM_OUTPUT_TOKENS, Answer, End, Questions
from tools.chaos.soaked_server import Sample

MAX_RSS_GROWTH_BYTES = 32 << 20
"""Of one server process, as a straight line through its life after its first quarter says."""
MAX_MORE_FDS = 4
MAX_MORE_TASKS = 2
MIN_GOODPUT_RATIO = 0.9
MAX_WAIT_P99_S = 15.0
"""To the first token of an admitted request: the queue of 64 divided by the slowest rate."""
MAX_PACE_RATIO = 1.5
MAX_CPU_SHARE = 0.9
MAX_LATE_FRACTION = 0.01
_ERROR_LINE = re.compile(r"ERROR |CRITICAL |Traceback|[EF]\d{4} ")
"""Of Python's log and of C++'s."""


class Outcome(StrEnum):
    HOLDS = "holds"
    FAILS = "fails"
    VOID = "void"
    """The clients were too slow, so the figure says nothing about the server."""


@dataclass(frozen=True, slots=True)
class Verdict:
    check: str
    measured: str
    limit: str
    outcome: Outcome

    @classmethod
    def of(cls, check: str, measured: str, limit: str, holds: bool, void: bool = False) -> Verdict:
        """`void` only spoils a check of time."""
        outcome = Outcome.HOLDS if holds else Outcome.FAILS
        return cls(check, measured, limit, Outcome.VOID if void else outcome)


def lags(watch: Watch) -> bool:
    """The clients had too little CPU for their times to mean something, or the machine stood
    still."""
    lags = watch.cpu_share > MAX_CPU_SHARE or watch.late_fraction > MAX_LATE_FRACTION
    return lags or watch.paused_s > 0


def judge_tokens(answers: Sequence[Answer], questions: Questions) -> list[Verdict]:
    """Of all answers, whenever they were asked for."""
    ends = Counter(answer.end for answer in answers)
    num_wrong = sum(not questions.is_right(answer) for answer in answers)
    num_bad = ends[End.FAILED] + ends[End.BROKEN]
    details = Counter(a.detail for a in answers if a.end in (End.FAILED, End.BROKEN))
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    return [
        Verdict.of(
            "tokens lost, doubled or wrong",
            f"{num_wrong} of {len(answers)} streams ({told})",
            "0",
            num_wrong == 0 and ends[End.WHOLE] > 0,
        ),
        Verdict.of(
            "streams broken, or failed by the server",
            f"{num_bad} {dict(details) if details else ''}".strip(),
            "0",
            num_bad == 0,
        ),
    ]


def judge_overload(
    peaks_per_s: Sequence[float],
    goods_per_s: Sequence[float],
    answers: Sequence[Answer],
    watches: Sequence[Watch],
) -> list[Verdict]:
    """Args:
    peaks_per_s, goods_per_s: whole answers a second, by round; the rounds count together.
    answers: of the overload.
    watches: of the peaks and the overloads.
    """
    peak_per_s, good_per_s = float(np.mean(peaks_per_s)), float(np.mean(goods_per_s))
    rounds = ", ".join(
        f"{good / peak:.0%}" for good, peak in zip(goods_per_s, peaks_per_s, strict=True)
    )
    void = any(map(lags, watches))
    waits_s = [a.message_s[0] - a.due_s for a in answers if a.message_s]
    p99_s = float(np.percentile(waits_s, 99)) if waits_s else float("inf")
    refused_s = [a.ended_s - a.due_s for a in answers if a.end is End.REFUSED]
    median_ms = 1e3 * float(np.median(refused_s)) if refused_s else float("nan")
    offered = len(answers)
    return [
        Verdict.of(
            "goodput at 5x overload",
            f"{good_per_s:.1f}/s of a peak of {peak_per_s:.1f}/s: {good_per_s / peak_per_s:.0%} "
            f"(rounds: {rounds}; {offered} asked, {len(refused_s)} refused in {median_ms:.0f} ms "
            "at the median)",
            f">= {MIN_GOODPUT_RATIO:.0%}",
            good_per_s >= MIN_GOODPUT_RATIO * peak_per_s,
            void,
        ),
        Verdict.of(
            "first token of an admitted request at overload",
            f"P99 {p99_s:.2f} s",
            f"<= {MAX_WAIT_P99_S:g} s",
            p99_s <= MAX_WAIT_P99_S,
            void,
        ),
    ]


def judge_pace(
    without: Sequence[Answer], beside: Sequence[Answer], watches: Sequence[Watch]
) -> Verdict:
    """Args:
    without, beside: answers of the same load before slow readers came, and beside them.
    watches: of both.
    """
    before_s, after_s = median_s_per_token(without), median_s_per_token(beside)
    return Verdict.of(
        "pace of other streams beside slow readers",
        f"{1e3 * before_s:.1f} ms a token, then {1e3 * after_s:.1f} ms",
        f"<= {MAX_PACE_RATIO:g} times",
        after_s <= MAX_PACE_RATIO * before_s,
        any(map(lags, watches)),
    )


def median_s_per_token(answers: Sequence[Answer]) -> float:
    """After a stream's first message, of whole answers."""
    num_tokens = NUM_OUTPUT_TOKENS - FLUSH_TOKENS
    whole = [a for a in answers if a.end is End.WHOLE]
    took_s = [(a.message_s[-1] - a.message_s[0]) / num_tokens for a in whole]
    return float(np.median(took_s)) if took_s else float("nan")


def judge_memory(life: str, samples: Sequence[Sample]) -> Verdict:
    """Of one server process."""
    steady = samples[len(samples) // 4 :]
    at_s = np.array([sample.at_s for sample in steady])
    rss = np.array([sample.rss_bytes for sample in steady], float)
    growth = float(np.polyfit(at_s - at_s[0], rss, 1)[0] * (at_s[-1] - at_s[0]))
    return Verdict.of(
        f"memory of {life}",
        f"{growth / (1 << 20):+.1f} MiB in {at_s[-1] - at_s[0]:.0f} s "
        f"(at most {rss.max() / (1 << 20):.0f} MiB)",
        f"<= {MAX_RSS_GROWTH_BYTES >> 20} MiB",
        growth <= MAX_RSS_GROWTH_BYTES,
    )


def judge_rest(life: str, before: AtRest, after: AtRest) -> list[Verdict]:
    """Args:
    before, after: of one process, before and after its load.
    """
    return [
        Verdict.of(
            f"pages held by {life}", f"{after.num_pages_held}", "0", not after.num_pages_held
        ),
        Verdict.of(
            f"requests left in {life}", f"{after.num_requests}", "0", not after.num_requests
        ),
        Verdict.of(
            f"descriptors of {life}",
            f"{before.num_fds}, then {after.num_fds}",
            f"<= {MAX_MORE_FDS} more",
            after.num_fds <= before.num_fds + MAX_MORE_FDS,
        ),
        Verdict.of(
            f"tasks of {life}",
            f"{before.num_tasks}, then {after.num_tasks}",
            f"<= {MAX_MORE_TASKS} more",
            after.num_tasks <= before.num_tasks + MAX_MORE_TASKS,
        ),
        Verdict.of(f"compilations of {life}", f"{after.num_compiles}", "0", not after.num_compiles),
    ]


def judge_log(log: str) -> Verdict:
    """Args:
    log: what the server's processes wrote to their standard error.
    """
    found = [line for line in log.splitlines() if _ERROR_LINE.match(line)]
    told = f"{len(found)}" + (f", the first: {found[0][:100]}" if found else "")
    return Verdict.of("errors in the server's log", told, "0", not found)
