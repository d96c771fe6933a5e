"""Protocol messages <-> the engine's values, with every bound checked.

`Generate`'s settings are grouped in the protocol and flat in `SamplingParams`;
a setting has the same name in both, so the descriptors are the only table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve.engine.grammar.constraint import Constraint, ConstraintKind, constraint_from_json
from jaxserve.engine.request import FinishReason, RequestOutput, TokenLogprobs, Usage
from jaxserve.engine.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from jaxserve.errors import InvalidRequest
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.server.pacing import IMMEDIATE, Pacing
from jaxserve.server.prompt_limits import PromptLimits, at_most, check_cache_salt
from jaxserve.server.ranked_labels import RankedLabel, checked_top_k

if TYPE_CHECKING:
    from jaxserve.engine.encoder.texts import EncodedText

PROMPT_LOGPROBS_A_MESSAGE = 2048
"""Keeps a reply well below the 4 MiB that a gRPC client accepts by default."""

SETTING_GROUPS = ("sampling", "decoding", "stopping", "response")
_FIELDS = pb.GenerateRequest.DESCRIPTOR.fields_by_name
SETTING_PATHS: Mapping[str, str] = {
    field.name: f"{group}.{field.name}"
    for group in SETTING_GROUPS
    for field in _FIELDS[group].message_type.fields  # type: ignore[union-attr]
}
"""Name of a `SamplingParams` field -> its path in a `GenerateRequest`."""

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}


def generate_fields() -> list[str]:
    """Paths of all the fields that `Generate` accepts."""
    paths = []
    for field in pb.GenerateRequest.DESCRIPTOR.fields:
        if field.message_type is None:
            paths.append(field.name)
        else:
            paths.extend(f"{field.name}.{inner.name}" for inner in field.message_type.fields)
    return paths


# Requests


def refuse_unknown_fields(message: Message, path: str = "request") -> None:
    """Raises InvalidRequest when the message, or one inside it, holds a field
    that this version of the protocol does not have."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidRequest(
            path, f"has field number {unknown[0].field_number}, which this server does not know"
        )
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        inner = field.name if path == "request" else f"{path}.{field.name}"
        for item in value if field.is_repeated else (value,):
            refuse_unknown_fields(item, inner)


def check_request(request: pb.GenerateRequest, limits: PromptLimits) -> None:
    """Bounds every count and size, so that no later step works on more.

    Raises InvalidRequest naming the field.
    """
    ids = limits.max_model_len
    at_most("token_ids.ids", len(request.token_ids.ids), ids, "token ids")
    at_most("decoding.logit_bias", len(request.decoding.logit_bias), MAX_LOGIT_BIAS, "entries")
    for name, values in (
        ("allowed_token_ids", request.decoding.allowed_token_ids.ids),
        ("bad_token_ids", request.decoding.bad_token_ids),
    ):
        at_most(f"decoding.{name}", len(values), limits.vocab_size, "entries")
    at_most("stopping.stop", len(request.stopping.stop), MAX_STOP_STRINGS, "entries")
    num_stop_ids = len(request.stopping.stop_token_ids)
    at_most("stopping.stop_token_ids", num_stop_ids, MAX_STOP_TOKEN_IDS, "entries")
    for entry in request.decoding.logit_bias:
        if not (entry.HasField("token_id") and entry.HasField("bias")):
            raise InvalidRequest("decoding.logit_bias", "an entry needs a token_id and a bias")
    check_cache_salt("cache.cache_salt", request.cache.cache_salt)
    check_prompt(request, limits)
    refuse_unknown_fields(request)


def check_embed_request(request: pb.EmbedRequest, limits: PromptLimits) -> None:
    """Bounds the texts. Raises InvalidRequest naming the field."""
    if not request.texts:
        raise InvalidRequest("texts", "must not be empty")
    at_most("texts", len(request.texts), limits.max_texts, "texts")
    for text in request.texts:
        limits.check_text("texts", text, "bytes in one text")
    refuse_unknown_fields(request)


def check_classify_request(
    request: pb.ClassifyRequest, limits: PromptLimits, num_classes: int
) -> int:
    """Bounds texts and labels; how many labels a text gets. Raises InvalidRequest naming the
    field."""
    if not request.texts:
        raise InvalidRequest("texts", "must not be empty")
    at_most("texts", len(request.texts), limits.max_texts, "texts")
    for text in request.texts:
        limits.check_text("texts", text, "bytes in one text")
    refuse_unknown_fields(request)
    return checked_top_k(request.top_k if request.HasField("top_k") else None, num_classes)


def check_prompt(request: pb.GenerateRequest | pb.TokenizeRequest, limits: PromptLimits) -> None:
    """Bounds the prompt. Raises InvalidRequest when there is none or it is too
    large to be tokenised."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "is missing: set one of text, token_ids or chat")
    if kind == "text":
        limits.check_text("text.text", request.text.text)
    elif kind == "token_ids":
        if not request.token_ids.ids:  # type: ignore[union-attr]
            raise InvalidRequest("token_ids.ids", "must not be empty")
    else:
        limits.check_messages("chat.messages", request.chat.messages)


def sampling_params(request: pb.GenerateRequest) -> SamplingParams:
    """The settings that are present; the others keep their defaults. Their
    values are checked by `SamplingParams.validate`."""
    return SamplingParams(
        **{
            field.name: _plain(field, value)
            for group in SETTING_GROUPS
            # ListFields tells "present and 0" from "absent".
            for field, value in getattr(request, group).ListFields()
        }
    )


def _plain(field: FieldDescriptor, value: Any) -> Any:
    if field.name == "logit_bias":
        return tuple((entry.token_id, entry.bias) for entry in value)
    if field.name == "allowed_token_ids":
        return tuple(value.ids)
    if field.name == "constraint":
        return _constraint(value)
    if field.type == FieldDescriptor.TYPE_FLOAT:
        # The number that the client wrote: 0.01 is no float32, and the nearest
        # one would be below a bound of 0.01.
        return float(str(np.float32(value)))
    is_scalar = isinstance(value, bool | int | float | str)
    return value if is_scalar else tuple(value)


def pacing(request: pb.GenerateRequest, of_server: Pacing) -> Pacing:
    """Of this request's stream. Raises InvalidRequest naming the field."""
    asked = Pacing(**{field.name: value for field, value in request.pacing.ListFields()})
    effective = of_server.of_request(asked, lambda field: f"pacing.{field}")
    if effective.strict and request.response.HasField("prompt_logprobs"):
        raise InvalidRequest(
            "response.prompt_logprobs", "would not fit a stream of equal messages (pacing.strict)"
        )
    return effective


def _constraint(message: pb.Constraint) -> Constraint:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("constraint", f"must be one of {', '.join(ConstraintKind)}")
    value: Any = list(message.choice.texts) if kind == "choice" else getattr(message, kind)
    if kind == "json_schema":
        # As the client wrote it; `validate` sees whether it is JSON.
        return Constraint(ConstraintKind.JSON_SCHEMA, value)
    return constraint_from_json("constraint", {kind: value})


def client_field(field: str, request: pb.GenerateRequest | pb.TokenizeRequest) -> str:
    """The path that the client wrote for a field that the engine names."""
    setting, _, part = field.partition(".")
    if setting in SETTING_PATHS:
        return f"{SETTING_PATHS[setting]}.{part}" if part else SETTING_PATHS[setting]
    if field in ("prompt", "prompt_token_ids"):
        return {
            "text": "text.text",
            "token_ids": "token_ids.ids",
            "chat": "chat.messages",
            None: "prompt",
        }[request.WhichOneof("prompt")]
    return field


def generate_request(
    prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
    *,
    request_id: str | None = None,
    cache_salt: str | None = None,
    adapter: str | None = None,
    pacing: Pacing | None = None,
    **settings: Any,
) -> pb.GenerateRequest:
    """What a client sends.

    Args:
        prompt: text, token ids, or chat messages (`{"role", "content"}`).
        settings: fields of `SamplingParams`; None leaves one at its default.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a value that does not fit its field, such as a negative count.
    """
    request = pb.GenerateRequest(request_id=request_id, adapter=adapter, **prompt_fields(prompt))
    if cache_salt is not None:
        request.cache.cache_salt = cache_salt
    if pacing is not None:
        values = {field.name: getattr(pacing, field.name) for field in fields(pacing)}
        request.pacing.CopyFrom(pb.Pacing(**values))
    for name, value in settings.items():
        if name not in SETTING_PATHS:
            known = ", ".join(sorted(SETTING_PATHS))
            raise TypeError(f"unknown setting {name!r}; there are: {known}")
        if value is not None:
            _set(getattr(request, SETTING_PATHS[name].split(".")[0]), name, value)
    return request


def prompt_fields(prompt: str | Sequence[int] | Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The member of the `prompt` oneof for a prompt of any kind."""
    if isinstance(prompt, str):
        return {"text": pb.TextPrompt(text=prompt)}
    if prompt and isinstance(prompt[0], Mapping):
        messages = [pb.ChatMessage(**message) for message in prompt]  # type: ignore[arg-type]
        return {"chat": pb.ChatPrompt(messages=messages)}
    return {"token_ids": pb.TokenIds(ids=prompt)}  # type: ignore[arg-type]


def _set(group: Message, name: str, value: Any) -> None:
    if name == "logit_bias":
        pairs = value.items() if isinstance(value, Mapping) else value
        entries = [pb.LogitBias(token_id=token_id, bias=bias) for token_id, bias in pairs]
        getattr(group, name).extend(entries)
    elif name == "allowed_token_ids":
        getattr(group, name).CopyFrom(pb.TokenIds(ids=value))
    elif name == "constraint":
        getattr(group, name).CopyFrom(_constraint_message(value))
    elif group.DESCRIPTOR.fields_by_name[name].is_repeated:
        getattr(group, name).extend([value] if isinstance(value, str) else value)
    else:
        setattr(group, name, value)


def _constraint_message(value: Mapping[str, Any]) -> pb.Constraint:
    """Of what `constraint_from_json` takes, where a schema may be JSON text as well."""
    fields = dict(value)
    if "choice" in fields:
        fields["choice"] = pb.Choice(texts=fields["choice"])
    schema = fields.get("json_schema")
    if schema is not None and not isinstance(schema, str):
        fields["json_schema"] = json.dumps(schema)
    return pb.Constraint(**fields)


# Replies


def responses(output: RequestOutput, pacing: Pacing = IMMEDIATE) -> Iterator[pb.GenerateResponse]:
    """The messages of one delta, padded: one, or more when prompt logprobs are long. One of
    padding alone stands for an empty delta of a strict stream.

    `finish_reason` must not be ERROR, which is a status, not a reply.
    """
    messages = list(_plain_responses(output))
    if pacing.strict and not messages:
        messages.append(pb.GenerateResponse())
    for message in messages:
        size = message.ByteSize()
        # An empty one has the size of others.
        padded = pacing.padded_size(max(1, size), MIN_PADDING)
        message.pad.extend(_padding(padded - size if pacing.pad_bytes else 0))
        yield message


def fits(output: RequestOutput, pacing: Pacing) -> bool:
    """Whether a delta goes into one message of `pad_bytes`."""
    messages = list(_plain_responses(output))
    sizes = [pacing.padded_size(message.ByteSize(), MIN_PADDING) for message in messages]
    return len(messages) <= 1 and all(size == pacing.pad_bytes for size in sizes)


MIN_PADDING = 2
"""Of a message: the tag of `pad` and its length, 0."""


def _padding(num_bytes: int) -> list[bytes]:
    """Entries of `pad` that take so many bytes on the wire: none, or at least MIN_PADDING."""
    if not num_bytes:
        return []
    for size in range(num_bytes - 2, max(num_bytes - 5, -1), -1):
        if _entry_bytes(size) == num_bytes:
            return [bytes(size)]
    # One entry has no such size, since its length takes another byte from 128 on.
    return [b"", *_padding(num_bytes - MIN_PADDING)]


def _entry_bytes(size: int) -> int:
    """Of an entry of `pad` on the wire: tag, length and content."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


def _plain_responses(output: RequestOutput) -> Iterator[pb.GenerateResponse]:
    for start in range(0, len(output.prompt_logprobs), PROMPT_LOGPROBS_A_MESSAGE):
        part = output.prompt_logprobs[start : start + PROMPT_LOGPROBS_A_MESSAGE]
        yield pb.GenerateResponse(prompt=pb.PromptOutput(logprobs=map(_logprobs_message, part)))
    response = pb.GenerateResponse()
    if output.text or output.token_ids:
        response.output.text = output.text
        response.output.token_ids.extend(output.token_ids)
        response.output.logprobs.extend(map(_logprobs_message, output.logprobs))
    if output.finish_reason is not None:
        response.finished.reason = _REASONS[output.finish_reason]
        if isinstance(output.stop_match, str):
            response.finished.stop_string = output.stop_match
        elif output.stop_match is not None:
            response.finished.stop_token_id = output.stop_match
    if output.usage is not None:
        response.usage.CopyFrom(_usage_message(output.usage))
    if response.ListFields():
        yield response


def embed_response(
    texts: Sequence[EncodedText], outputs: Sequence[RequestOutput], size: int | None = None
) -> pb.EmbedResponse:
    """The reply for texts whose outputs all carry an embedding: the first `size` numbers."""
    response = pb.EmbedResponse()
    for text, output in zip(texts, outputs, strict=True):
        if output.embedding is None or output.usage is None:
            raise ValueError(f"{output.request_id} has no embedding")
        response.embeddings.add(
            values=output.embedding[:size].tolist(),
            num_tokens=len(text.token_ids),
            truncated=text.is_cut,
        )
        response.num_tokens += len(text.token_ids)
        response.queue_s = max(response.queue_s, output.usage.queue_s)
        response.e2e_s = max(response.e2e_s, output.usage.e2e_s)
    return response


def classify_response(
    texts: Sequence[EncodedText],
    outputs: Sequence[RequestOutput],
    ranked: Sequence[Sequence[RankedLabel]],
) -> pb.ClassifyResponse:
    """The reply for texts whose outputs all carry a result."""
    response = pb.ClassifyResponse()
    for text, output, labels in zip(texts, outputs, ranked, strict=True):
        if output.usage is None:
            raise ValueError(f"{output.request_id} has no result")
        one = response.classifications.add(num_tokens=len(text.token_ids), truncated=text.is_cut)
        for label in labels:
            one.labels.add(label_id=label.label_id, text=label.text, score=label.score)
        response.num_tokens += len(text.token_ids)
        response.queue_s = max(response.queue_s, output.usage.queue_s)
        response.e2e_s = max(response.e2e_s, output.usage.e2e_s)
    return response


def request_output(response: pb.GenerateResponse, request_id: str) -> RequestOutput:
    """The delta that a message of the stream holds."""
    finished = response.finished
    match = finished.WhichOneof("stop_match")
    reason = None
    if response.HasField("finished"):
        reason = next(key for key, value in _REASONS.items() if value == finished.reason)
    return RequestOutput(
        request_id=request_id,
        token_ids=tuple(response.output.token_ids),
        text=response.output.text,
        logprobs=tuple(map(_logprobs_value, response.output.logprobs)),
        prompt_logprobs=tuple(map(_logprobs_value, response.prompt.logprobs)),
        finish_reason=reason,
        stop_match=getattr(finished, match) if match else None,
        usage=_usage_value(response.usage) if response.HasField("usage") else None,
    )


def _logprobs_message(value: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=value.token_id,
        logprob=value.logprob,
        rank=value.rank,
        top_token_ids=[token_id for token_id, _ in value.top],
        top_logprobs=[logprob for _, logprob in value.top],
    )


def _logprobs_value(message: pb.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(message.token_id, message.logprob, message.rank, top)


def _usage_message(value: Usage) -> pb.Usage:
    return pb.Usage(
        num_prompt_tokens=value.num_prompt_tokens,
        num_output_tokens=value.num_output_tokens,
        num_cached_tokens=value.num_cached_tokens,
        queue_s=value.queue_s,
        ttft_s=value.ttft_s,
        e2e_s=value.e2e_s,
    )


def _usage_value(message: pb.Usage) -> Usage:
    return Usage(
        num_prompt_tokens=message.num_prompt_tokens,
        num_output_tokens=message.num_output_tokens,
        num_cached_tokens=message.num_cached_tokens,
        queue_s=message.queue_s,
        ttft_s=message.ttft_s,
        e2e_s=message.e2e_s,
    )
