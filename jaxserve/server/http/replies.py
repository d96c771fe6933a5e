"""What the server sends: the shapes of OpenAI's replies, which are also those of /openapi.json.

Beyond OpenAI's: `LoadReport`, and the fields `stop_reason`, `token_ids`, `max_model_len`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired

# Not typing's: before Python 3.12 pydantic cannot read that one.
from typing_extensions import TypedDict

from jaxserve.engine.request import RequestOutput
from jaxserve.server.load import Load

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(TypedDict):
    cached_tokens: int
    """Prompt tokens that the prefix cache already held."""


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    finish_reason: FinishReason | None
    stop_reason: NotRequired[str | int | None]
    """The stop string or the stop token's id that ended the answer."""
    token_ids: NotRequired[list[int]]
    """With `return_token_ids`."""
    logprobs: CompletionLogprobs | None


class Completion(TypedDict):
    """A whole completion, or a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    """Which weights answer."""
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class CalledFunction(TypedDict):
    name: str
    arguments: str
    """A JSON object, as text; of an answer that was cut short, its beginning."""


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    """None beside tool calls that no text comes with."""
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoiceEnd(TypedDict):
    finish_reason: ChatFinishReason | None
    stop_reason: NotRequired[str | int | None]
    """The stop string or the stop token's id that ended the answer."""
    token_ids: NotRequired[list[int]]
    """With `return_token_ids`."""
    logprobs: ChatLogprobs | None


class ChatChoice(ChatChoiceEnd):
    index: int
    message: ChatMessage


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str
    """The next piece of it."""


class ToolCallDelta(TypedDict):
    index: int
    """Of the call in its answer."""
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatDelta(ChatChoiceEnd):
    index: int
    delta: Delta


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatDelta]
    usage: NotRequired[Usage | None]


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(TypedDict):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ScoredLabel(TypedDict):
    id: int
    text: str
    score: float


class Classification(TypedDict):
    object: Literal["classification"]
    index: int
    labels: list[ScoredLabel]


class Classifications(TypedDict):
    object: Literal["list"]
    model: str
    data: list[Classification]
    usage: Usage


class Tokens(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(TypedDict):
    prompt: str


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Most tokens of a prompt and its answer together."""
    parent: str | None
    """Of an adapter: the model that it lies beside."""


class LoadedAdapter(TypedDict):
    id: str
    object: Literal["adapter"]
    rank: int
    digest: str
    """SHA-256 of its numbers as they are served."""


class UnloadedAdapter(TypedDict):
    id: str
    object: Literal["adapter.unloaded"]


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Version(TypedDict):
    version: str


class LoadReport(TypedDict):
    state: Literal["starting", "ready", "degraded", "draining"]
    uptime_s: float
    version: str
    model: str
    family: str
    max_num_seqs: int
    """Requests that can run at once."""
    load: Load


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    """The field that is wrong."""
    code: str


class Error(TypedDict):
    error: ErrorDetail


def usage_of(ends: Sequence[RequestOutput], num_choices: int) -> Usage:
    """Of the last outputs of requests, `num_choices` of which in turn share a prompt."""
    usages = [end.usage for end in ends if end.usage is not None]
    num_prompt = sum(usage.num_prompt_tokens for usage in usages[::num_choices])
    num_output = sum(usage.num_output_tokens for usage in usages)
    num_cached = sum(usage.num_cached_tokens for usage in usages[::num_choices])
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_output,
        total_tokens=num_prompt + num_output,
        prompt_tokens_details={"cached_tokens": num_cached},
    )
