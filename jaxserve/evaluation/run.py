"""Asks a server the questions of a task and judges the answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jaxserve.client import Client
from jaxserve.engine.request import RequestOutput, joined
from jaxserve.errors import InvalidRequest, JaxserveError, QueueFull
from jaxserve.evaluation.task import ChoiceItem, ExactItem, Item

RETRY_S = 0.2
TIMEOUT_S = 600.0
"""For one answer."""


class EvaluationFailed(JaxserveError):
    """A question could not be asked."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one item."""

    is_right: bool
    is_right_by_byte: bool | None
    """By log-likelihood over the bytes of a choice, which does not favour short ones. None for an
    item without choices."""
    output: str
    """The choice that was taken, or what was written."""


def evaluate(
    client: Client,
    items: Sequence[Item],
    *,
    concurrency: int,
    on_judged: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """The verdicts, in the order of the items.

    Args:
        concurrency: questions at once.

    Raises EvaluationFailed naming the item; NotAccepting and others as `Client` does.
    """

    def judge(index: int) -> Verdict:
        item = items[index]
        try:
            if isinstance(item, ChoiceItem):
                verdict = _judge_choices(client, item)
            else:
                verdict = _judge_text(client, item)
        except InvalidRequest as error:
            raise EvaluationFailed(f"item {index + 1} cannot be asked: {error}") from error
        on_judged()
        return verdict

    with ThreadPoolExecutor(concurrency) as pool:
        asked = [pool.submit(judge, index) for index in range(len(items))]
        try:
            return [future.result() for future in asked]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def choice_logprobs(client: Client, item: ChoiceItem) -> list[float]:
    """Log-likelihood of each choice after the context, in nats.

    The tokens of a choice are those of the whole text after as many as the context alone has, as
    in EleutherAI's lm-evaluation-harness: a token may join the end of the one and the beginning
    of the other.
    """
    num_given = max(1, len(client.tokenize(item.context)))
    sums = []
    for choice in item.choices:
        token_ids = client.tokenize(item.context + choice)
        output = _ask(client, token_ids, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        # The first entry is of the second token.
        entries = output.prompt_logprobs[num_given - 1 :]
        if len(output.prompt_logprobs) != len(token_ids) - 1 or not entries:
            raise EvaluationFailed(f"the choice {choice!r} has no tokens of its own")
        sums.append(math.fsum(entry.logprob for entry in entries))
    return sums


def _judge_choices(client: Client, item: ChoiceItem) -> Verdict:
    sums = choice_logprobs(client, item)
    by_byte = [
        total / len(choice.encode()) for total, choice in zip(sums, item.choices, strict=True)
    ]
    taken = sums.index(max(sums))
    return Verdict(
        taken == item.answer, by_byte.index(max(by_byte)) == item.answer, item.choices[taken]
    )


def _judge_text(client: Client, item: ExactItem) -> Verdict:
    output = _ask(
        client, item.prompt, temperature=0.0, max_tokens=item.max_tokens, stop=tuple(item.stop)
    )
    wanted = {_plain(answer) for answer in item.answers}
    return Verdict(_plain(output.text) in wanted, None, output.text)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _ask(client: Client, prompt: Any, **settings: Any) -> RequestOutput:
    """The whole answer; a full queue is waited for."""
    end_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return joined(list(client.generate(prompt, timeout_s=TIMEOUT_S, **settings)))
        except QueueFull:
            if time.monotonic() > end_s:
                raise
            time.sleep(RETRY_S)
