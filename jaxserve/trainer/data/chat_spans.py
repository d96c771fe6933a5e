"""encode_conversation: the token ids of a conversation, and which of them are answers.

An answer is found by rendering: the template's text of the messages before it, with the
assistant's turn opened, must be the beginning of its text with the answer, and the same for
token ids. What lies between is what the model itself would have to produce in serving, the
end-of-turn token included. A template for which this does not hold (one that rewrites
earlier turns, for example) is refused rather than guessed at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.chat_sandbox import ChatTemplateError
from models.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, str]


class ConversationError(ValueError):
    """A conversation that cannot be used; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """Attributes:
    ids: token ids of the whole conversation.
    is_answer: for each id, whether the assistant is to produce it.
    """

    ids: list[int]
    is_answer: list[bool]


def check_messages(value: Any, special_texts: Sequence[str]) -> list[Message]:
    """`value` as messages: `{"role": ..., "content": ...}`, with an answer among them.

    Args:
        value: what the source holds.
        special_texts: texts of the tokenizer's special tokens, which content may not hold:
            they would be read as turns of the conversation.

    Raises ConversationError.
    """
    if not isinstance(value, list) or not value:
        raise ConversationError('a list of messages is needed: [{"role": ..., "content": ...}]')
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise ConversationError(f"message {number} is no object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ConversationError(f"message {number} has role {role!r}; use one of {ROLES}")
        if not isinstance(content, str):
            raise ConversationError(f"message {number} has no content that is a string")
        if special := next((text for text in special_texts if text and text in content), None):
            raise ConversationError(
                f"message {number} holds the control token {special!r}; remove or rewrite it"
            )
    if not any(message["role"] == "assistant" for message in value):
        raise ConversationError("no message is the assistant's, so there is nothing to learn")
    return value


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedConversation:
    """Token ids of `messages` with the spans of the assistant's answers.

    Raises ConversationError: the template refuses the messages, or the answers cannot be
    told apart exactly.
    """
    try:
        return _encode(tokenizer, messages)
    except ChatTemplateError as error:
        raise ConversationError(str(error)) from None


def _encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedConversation:
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    ids = tokenizer.encode(whole, add_special_tokens=False)
    is_answer = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render_chat(messages[:number], add_generation_prompt=True)
        after = tokenizer.render_chat(messages[: number + 1], add_generation_prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ConversationError(
                f"the chat template does not let the answer of message {number} be found: its "
                "text is not what follows the opened turn. Use a model whose template leaves "
                "earlier turns as they are"
            )
        if message["content"].strip() not in after[len(before) :]:
            raise ConversationError(f"the chat template drops or rewrites message {number}")
        start = _prefix_length(tokenizer, before, ids, number)
        stop = _prefix_length(tokenizer, after, ids, number)
        stop = _after_last_end(ids, start, stop, tokenizer.eos_token_ids)
        is_answer[start:stop] = [True] * (stop - start)
    return EncodedConversation(ids, is_answer)


def _prefix_length(tokenizer: Tokenizer, text: str, ids: list[int], number: int) -> int:
    prefix = tokenizer.encode(text, add_special_tokens=False)
    if ids[: len(prefix)] != prefix:
        raise ConversationError(
            f"a token spans the edge of message {number}, so the answer has no exact beginning or "
            "end in tokens; does it begin with blanks?"
        )
    return len(prefix)


def _after_last_end(ids: list[int], start: int, stop: int, end_ids: Sequence[int]) -> int:
    """A model stops at its end token; what the template writes after it is not its own."""
    ends = [place for place in range(start, stop) if ids[place] in end_ids]
    return ends[-1] + 1 if ends else stop
