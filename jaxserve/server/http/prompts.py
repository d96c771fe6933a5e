"""Prompts of a body: one or several texts or lists of token ids, made token ids off the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from jaxserve.errors import InvalidRequest
from jaxserve.server.state import Serving
from models.chat_sandbox import ChatTemplateError
from models.tokenizer import TokenizerError

Prompt = str | list[int]


def as_prompts(
    field: str, value: str | list[str] | list[int] | list[list[int]]
) -> Sequence[Prompt]:
    """The list of prompts that the value stands for. Raises InvalidRequest if it is empty."""
    if not value:
        raise InvalidRequest(field, "must not be empty")
    if isinstance(value, str):
        return [value]
    if isinstance(value[0], int):
        return [value]
    return value


def check_prompts(field: str, prompts: Sequence[Prompt], serving: Serving) -> None:
    """Raises InvalidRequest naming a prompt that is empty, too large, or no token ids."""
    for index, prompt in enumerate(prompts):
        name = field if len(prompts) == 1 else f"{field}[{index}]"
        if isinstance(prompt, str):
            serving.limits.check_text(name, prompt)
            continue
        serving.limits.check_token_ids(name, prompt)
        check_vocabulary(name, prompt, serving)


def check_vocabulary(field: str, token_ids: Sequence[int], serving: Serving) -> None:
    """Raises InvalidRequest for an id that the model does not have."""
    vocab_size = serving.limits.vocab_size
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequest(field, f"every id must be in [0, {vocab_size})")


async def encode_prompts(
    field: str,
    prompts: Sequence[Prompt],
    serving: Serving,
    encode: Callable[[str], list[int]],
    workers: Executor,
) -> list[list[int]]:
    """Token ids of each prompt. Raises InvalidRequest."""
    check_prompts(field, prompts, serving)

    def encode_all() -> list[list[int]]:
        return [encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    return await run_tokenizer(field, encode_all, workers)


async def run_tokenizer(
    field: str, work: Callable[[], list[list[int]]], workers: Executor
) -> list[list[int]]:
    """Runs `work` on a worker. Raises InvalidRequest for text that it refuses."""
    try:
        return await asyncio.get_running_loop().run_in_executor(workers, work)
    except (ChatTemplateError, TokenizerError) as error:
        raise InvalidRequest(field, str(error)) from error
