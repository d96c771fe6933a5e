"""One line of an input file, and one line of the output file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from jaxserve.engine.offline import Completion
from jaxserve.engine.request import GenerationRequest, TokenLogprobs
from jaxserve.engine.sampling_json import SAMPLING_FIELDS, checked_sampling
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True, slots=True)
class ParsedLine:
    """A line that is well formed, whatever the model."""

    line_number: int
    id: str | int
    """As the file has it; its line number if it has none."""
    kind: str
    """Which of PROMPT_FIELDS the line has."""
    prompt: Any
    """A text, token ids or messages, as `kind` says."""
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class PromptRecord:
    line_number: int
    id: str | int
    """As the file has it; its line number if it has none."""
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class BadRecord:
    line_number: int
    id: str | int
    error: InvalidRequest


def parse_lines(
    lines: Iterable[str], *, sampling_defaults: Mapping[str, Any]
) -> Iterator[ParsedLine | BadRecord]:
    """Reads JSON lines as far as no model is needed; empty ones are skipped.

    Args:
        sampling_defaults: sampling fields as in JSON, for lines without them.
    """
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record_id: str | int = line_number
        try:
            values = _parse_object(line)
            record_id = _take_id(values, line_number)
            sampling = {k: values.pop(k) for k in SAMPLING_FIELDS if k in values}
            kind, prompt = _take_prompt(values)
            if values:
                raise InvalidRequest(
                    next(iter(values)),
                    f"is unknown; fields are id, {', '.join(PROMPT_FIELDS)} and those of sampling",
                )
            params = checked_sampling({**sampling_defaults, **sampling})
        except InvalidRequest as error:
            yield BadRecord(line_number, record_id, error)
        else:
            yield ParsedLine(line_number, record_id, kind, prompt, params)


def encode_lines(
    lines: Iterable[ParsedLine | BadRecord],
    tokenizer: Tokenizer,
    validate: Callable[[GenerationRequest], None],
    *,
    chat: bool = False,
) -> Iterator[PromptRecord | BadRecord]:
    """Makes requests of parsed lines; bad ones stay as they are.

    Args:
        validate: raises InvalidRequest for what the engine cannot serve.
        chat: puts a `prompt` through the chat template, as the user's message.
    """
    for line in lines:
        if isinstance(line, BadRecord):
            yield line
            continue
        try:
            token_ids = _encode(line, tokenizer, chat=chat)
            request = GenerationRequest(f"line-{line.line_number}", token_ids, line.sampling)
            validate(request)
        except InvalidRequest as error:
            yield BadRecord(line.line_number, line.id, error)
        else:
            yield PromptRecord(line.line_number, line.id, request)


def read_records(
    lines: Iterable[str],
    tokenizer: Tokenizer,
    validate: Callable[[GenerationRequest], None],
    *,
    sampling_defaults: Mapping[str, Any],
    chat: bool = False,
) -> Iterator[PromptRecord | BadRecord]:
    """`parse_lines` and `encode_lines` in one, for who has a model already."""
    parsed = parse_lines(lines, sampling_defaults=sampling_defaults)
    return encode_lines(parsed, tokenizer, validate, chat=chat)


def encode_prompt(tokenizer: Tokenizer, text: str, *, chat: bool) -> tuple[int, ...]:
    """Token ids of a text, as it is or as the user's message of a chat."""
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": text}])
    try:
        return tuple(tokenizer.encode(text))
    except ValueError as error:
        raise InvalidRequest("prompt", str(error)) from error


def encode_messages(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Token ids of a conversation with the assistant's turn opened."""
    try:
        return tuple(tokenizer.encode_chat(messages))
    except ValueError as error:  # The template refuses them, or there is none.
        raise InvalidRequest("messages", str(error)) from error


def completion_record(record_id: str | int, completion: Completion) -> dict[str, Any]:
    """A line of the output. The same job gives the same bytes: no timings."""
    record = {
        "id": record_id,
        "token_ids": list(completion.token_ids),
        "logprobs": _logprobs(completion.logprobs),
        "text": completion.text,
        "finish_reason": completion.finish_reason.value,
        "usage": {
            "num_prompt_tokens": completion.usage.num_prompt_tokens,
            "num_output_tokens": completion.usage.num_output_tokens,
        },
    }
    if completion.prompt_logprobs:
        record["prompt_logprobs"] = _logprobs(completion.prompt_logprobs)
    return record


def _logprobs(entries: Sequence[TokenLogprobs]) -> list[dict[str, Any]] | None:
    if not entries:
        return None
    return [
        {
            "token_id": entry.token_id,
            "logprob": entry.logprob,
            "rank": entry.rank,
            "top": [list(pair) for pair in entry.top],
        }
        for entry in entries
    ]


def _parse_object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("line", f"is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest("line", 'must be an object like {"id": "a", "prompt": "Hello"}')
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _take_id(values: dict[str, Any], line_number: int) -> str | int:
    record_id = values.pop("id", None)
    if record_id is None:
        return line_number
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise InvalidRequest("id", "must be a string or a whole number")
    return record_id


def _take_prompt(values: dict[str, Any]) -> tuple[str, Any]:
    """The member of PROMPT_FIELDS that the line has, and its checked value."""
    given = [name for name in PROMPT_FIELDS if values.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequest("prompt", f"give exactly one of {', '.join(PROMPT_FIELDS)}")
    kind = given[0]
    prompt = {name: values.pop(name, None) for name in PROMPT_FIELDS}[kind]
    if kind == "prompt":
        if not isinstance(prompt, str):
            raise InvalidRequest("prompt", "must be a string")
    elif not isinstance(prompt, list):
        raise InvalidRequest(kind, "must be a list")
    elif not prompt:
        raise InvalidRequest(kind, "must not be empty")
    elif kind == "prompt_token_ids":
        if any(isinstance(item, bool) or not isinstance(item, int) for item in prompt):
            raise InvalidRequest("prompt_token_ids", "must be whole numbers")
    else:
        _check_messages(prompt)
    return kind, prompt


def _check_messages(messages: list[Any]) -> None:
    for message in messages:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise InvalidRequest("messages", 'each must be {"role": …, "content": …}')
        if not all(isinstance(part, str) for part in message.values()):
            raise InvalidRequest("messages", "role and content must be strings")


def _encode(line: ParsedLine, tokenizer: Tokenizer, *, chat: bool) -> tuple[int, ...]:
    if line.kind == "prompt":
        return encode_prompt(tokenizer, line.prompt, chat=chat)
    if line.kind == "messages":
        return encode_messages(tokenizer, line.prompt)
    return tuple(line.prompt)
