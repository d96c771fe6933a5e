"""What clients send: one class a body. Types are checked here, bounds by `SamplingParams.validate`
and `PromptLimits`, as for gRPC.

A field that is null is absent. A field that a class does not have is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from jaxserve.server.pacing import Pacing

MAX_CHOICES = 128
"""Prompts of one request times `n`."""
MAX_N = 16
MAX_TOOLS = 128
TOOL_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class Body(BaseModel):
    """Nothing is converted (no "1" for 1), and nothing is ignored."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelField(Body):
    model: str | None = None
    """As `/v1/models` names it: the model or an adapter. Absent: the model that is served."""


class SamplingFields(Body):
    """Named and bounded as in `SamplingParams`."""

    temperature: float | None = None
    """[0, 100]; 0 takes the most likely token. Default 1."""
    top_p: float | None = None
    """(0, 1]. Default 1."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 keeps all. Default 0."""
    min_p: float | None = None
    """[0, 1]: drop tokens less likely than this fraction of the most likely one. Default 0."""
    seed: int | None = None
    """Unsigned, 64 bits. The same seed and prompt give the same tokens; choice i of `n` takes
    seed + i. Absent: random."""
    presence_penalty: float | None = None
    """[-2, 2]. Default 0."""
    frequency_penalty: float | None = None
    """[-2, 2]. Default 0."""
    repetition_penalty: float | None = None
    """[0.01, 100]. Default 1."""
    logit_bias: dict[str, float] | None = None
    """{"token id": bias in [-100, 100]}, at most 1024."""
    allowed_token_ids: list[int] | None = None
    """Only these may be drawn. Absent: all."""
    bad_token_ids: list[int] | None = None
    """These are never drawn."""
    stop: str | list[str] | None = None
    """The answer ends just before the first of these: at most 16 of 256 bytes."""
    stop_token_ids: list[int] | None = None
    """The answer ends when one of these is drawn: at most 16."""
    min_tokens: int | None = None
    """No stop token is drawn before this many tokens are out. Default 0."""
    ignore_eos: bool | None = None
    """Go on past the model's end of sequence. Default false."""
    include_stop_str_in_output: bool | None = None
    """Default false."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default true."""
    constraint: dict[str, Any] | None = None
    """The form that the answer must have: an object with one of `json_schema`, `json_object`,
    `regex`, `choice` and `grammar`."""


class StreamOptions(Body):
    include_usage: bool | None = None
    """A last chunk without choices tells the usage."""
    continuous_usage_stats: bool | None = None
    """Every chunk tells the usage so far."""
    include_obfuscation: Literal[False] | None = None
    """Chunks are padded by `pad_bytes`, not by a field."""
    flush_ms: int | None = None
    """[1, 10000]: at least so long between two writes."""
    flush_tokens: int | None = None
    """[1, 256]: at least so many tokens in a write."""
    pad_bytes: int | None = None
    """[64, 16384]: a write is padded by a comment to a multiple of this."""
    strict: bool | None = None
    """A write of `pad_bytes` every `flush_ms`, with or without tokens."""

    def pacing(self) -> Pacing:
        """What these ask for."""
        return Pacing(self.flush_ms, self.flush_tokens, self.pad_bytes, bool(self.strict))


class AnswerFields(ModelField, SamplingFields):
    """What completions and chats have in common."""

    n: int | None = Field(None, ge=1, le=MAX_N)
    """Answers to each prompt, [1, 16]; at most 128 in all. Default 1."""
    stream: bool | None = None
    """Send the answer as server-sent events, as it is made."""
    stream_options: StreamOptions | None = None
    """With `stream` only."""
    return_token_ids: bool | None = None
    """Choices tell the `token_ids` of their text."""
    cache_salt: str | None = None
    """Computed prefixes are shared only between requests of one salt: at most 256 bytes."""
    user: str | None = Field(None, max_length=512)
    """Has no effect on the answer, and is kept nowhere."""


class CompletionRequest(AnswerFields):
    prompt: str | list[str] | list[int] | list[list[int]]
    """A text, its token ids, or a list of either."""
    max_tokens: int | None = None
    """Default 16."""
    logprobs: int | None = None
    """[0, 20]: each token's logprob and this many of the most likely ones."""
    add_special_tokens: bool | None = None
    """What the model's tokenizer adds to a text, such as a BOS. Default true."""
    echo: Literal[False] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str = Field(pattern=TOOL_NAME)
    arguments: str
    """A JSON object, as text."""


class ToolCall(Body):
    id: str = Field(max_length=128)
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Body):
    role: str
    """`system`, `user`, `assistant`, `tool` or what else the model's chat template knows."""
    content: str | list[TextPart] | None = None
    """Parts are joined as they are. May be absent beside tool calls only."""
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    """Calls that the assistant made."""
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None
    """Of a tool's message: which call it answers."""
    refusal: None = None


class Function(Body):
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object. Absent: no arguments."""
    strict: bool | None = None
    """Arguments always fit the schema. Default false; a forced call's always do."""


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    name: str = Field(pattern=TOOL_NAME)
    """Has no effect on the answer."""
    description: str | None = None
    """Has no effect on the answer."""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """Absent: any JSON object."""
    strict: bool | None = None
    """Has no effect: answers always fit the schema."""


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


def _format_of(value: Any) -> str | None:
    """Not the type itself, which could be taken for a field's name where an error lies."""
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{kind} format" if kind in ("text", "json_object", "json_schema") else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("text format")]
    | Annotated[JsonObjectFormat, Tag("json_object format")]
    | Annotated[JsonSchemaFormat, Tag("json_schema format")],
    Discriminator(
        _format_of,
        custom_error_type="unknown_format",
        custom_error_message="its type must be text, json_object or json_schema",
    ),
]


class ChatRequest(AnswerFields):
    messages: list[ChatMessage]
    """From first to last."""
    max_completion_tokens: int | None = None
    """Default: up to the end of the context."""
    max_tokens: int | None = None
    """The older name of `max_completion_tokens`."""
    logprobs: bool | None = None
    """Tell each token's logprob."""
    top_logprobs: int | None = None
    """[0, 20], with `logprobs` only: this many of the most likely tokens. Default 0."""
    response_format: ResponseFormat | None = None
    """The form of the answer: text, any JSON object, or JSON that fits a schema."""
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    """Functions that the model may call; for servers with `--tool-call-parser`."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """`required`: at least one call; a function: just that call. Default auto."""
    parallel_tool_calls: bool | None = None
    """Several calls in one answer. Default true."""
    store: Literal[False] | None = None


class EmbeddingRequest(ModelField):
    input: str | list[str] | list[int] | list[list[int]]
    """A text, its token ids, or a list of either."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: little-endian float32. Default float."""
    truncate: bool | None = None
    """Cut a text that is longer than the model takes, rather than refuse it. Default false."""
    user: str | None = Field(None, max_length=512)
    """Has no effect, and is kept nowhere."""


class ClassifyRequest(ModelField):
    input: str | list[str] | list[int] | list[list[int]]
    """A text, its token ids, or a list of either."""
    top_k: int | None = None
    """Labels of each text, 1 to 100 and at most as many as there are. Default 5."""
    truncate: bool | None = None
    """Cut a text that is longer than the model takes, rather than refuse it. Default false."""


class TokenizeRequest(ModelField):
    prompt: str | None = None
    """This or `messages`."""
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """With `prompt` only. Default true."""


class DetokenizeRequest(ModelField):
    tokens: list[int]


class LoadAdapterRequest(Body):
    lora_name: str
    """1 to 128 letters, digits, dots, hyphens and underscores."""
    lora_path: str
    """Of its folder, relative to the server's --lora-dir."""


class UnloadAdapterRequest(Body):
    lora_name: str


REFUSED_FIELDS = {
    "audio": "answers are text",
    "best_of": "ask for n answers and choose",
    "echo": "put the prompt before the answer yourself",
    "function_call": "send tool_choice",
    "functions": "send tools",
    "guided_choice": 'send constraint: {"choice": […]}',
    "guided_grammar": 'send constraint: {"grammar": …}',
    "guided_json": 'send constraint: {"json_schema": …}',
    "guided_regex": 'send constraint: {"regex": …}',
    "metadata": "nothing is stored",
    "modalities": "answers are text",
    "prediction": "leave it out",
    "prompt_cache_key": "set cache_salt to part caches",
    "prompt_logprobs": "ask for them over gRPC",
    "reasoning_effort": "leave it out",
    "safety_identifier": "leave it out",
    "service_tier": "leave it out",
    "store": "nothing is stored",
    "structured_outputs": "send constraint",
    "suffix": "leave it out",
    "verbosity": "leave it out",
    "web_search_options": "leave it out",
}
"""Fields of other servers that this one refuses, and what to do instead."""
