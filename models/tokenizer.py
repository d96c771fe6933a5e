"""Tokenizer: text to token ids and back, with the model's chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from checkpoint.errors import FormatError
from models.chat_template import ChatTemplate
from models.inert_messages import InertMessages

_MAX_JSON_BYTES = 1 << 26


class TokenizerError(ValueError):
    """Text that cannot be encoded, ids that cannot be decoded, or a chat without a template."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with what serving needs to know around it.

    Encoding behaves as in Hugging Face: special tokens spelled out in the text
    become their ids. Thread-safe.

    Args:
        backend: the tokenizer proper; its truncation and padding are taken off.
        bos_token_id: put before a prompt by the backend's post-processor, if at all.
        eos_token_ids: ids after which a model has finished.
        chat_template: Jinja source of the model's chat template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_token_ids))
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_token_ids: frozenset[int] = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self._template_source = chat_template

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a Hugging Face folder: tokenizer.json, and where they exist
        tokenizer_config.json, generation_config.json and chat_template.jinja.

        Raises FormatError when tokenizer.json is missing or malformed.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FormatError(
                f"{folder} has no tokenizer.json; save it there with the fast tokenizer's "
                "save_pretrained, or use a GGUF file, which carries its own"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(_read_text(file))
        except Exception as error:  # the library raises bare Exception
            raise FormatError(f"{file} is not a valid tokenizer: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        bos_token_id = _token_id(backend, config.get("bos_token"))
        eos_token_ids = _as_ids(generation.get("eos_token_id"))
        eos_token_id = _token_id(backend, config.get("eos_token"))
        if eos_token_id is not None:
            eos_token_ids = (eos_token_id, *eos_token_ids)
        return cls(
            backend,
            bos_token_id=bos_token_id,
            eos_token_ids=eos_token_ids,
            chat_template=_folder_chat_template(folder, config),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; a BOS in front when the model wants one and
        `add_special_tokens` is set. Raises TokenizerError for text that is not
        valid Unicode (a lone surrogate)."""
        _check_text(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. An id beyond the vocabulary has no text and gives none,
        since a model's table may be padded; a negative one raises TokenizerError."""
        try:
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise TokenizerError("token ids must be integers from 0 to 2**32 - 1") from None
        return text

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, if the model has one."""
        return self._template_source

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: `{"role": …, "content": …}` from first to last.
            add_generation_prompt: open the assistant's turn at the end.
            tools: functions that the assistant may call, for the template to tell it of.
            now: what a template that asks for the date gets; without it the
                template finds no clock and uses its own fixed date.

        Raises:
            ChatTemplateError: the template refuses the messages or breaks a limit.
            TokenizerError: the model has no chat template.
        """
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, now=now
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
        as_text: bool = False,
    ) -> list[int]:
        """Token ids of `render_chat`. The template writes its own BOS, so none is added.

        Args:
            as_text: control tokens that a message or a tool spells out stay text, for messages of
                people who are not trusted: only the template's own count.
        """
        told = [*messages, *(tools or ())]
        inert = InertMessages(told, self._control_tokens if as_text else ())
        text = self.render_chat(
            inert.messages[: len(messages)],
            add_generation_prompt=add_generation_prompt,
            tools=None if tools is None else inert.messages[len(messages) :],
            now=now,
        )
        ids: list[int] = []
        for part in inert.parts(text):
            ids += self.encode(part, add_special_tokens=False)
        return ids

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        return tuple(map(self._token, self.special_token_ids))

    @cached_property
    def _template(self) -> ChatTemplate:
        """Compiled when first asked for: a model whose template is broken still completes text."""
        if self._template_source is None:
            raise TokenizerError("this model has no chat template; send a plain prompt instead")
        return ChatTemplate(
            self._template_source,
            bos_token=self._token(self.bos_token_id),
            eos_token=self._token(self.eos_token_ids[0] if self.eos_token_ids else None),
        )

    def _token(self, token_id: int | None) -> str:
        token = None if token_id is None else self.backend.id_to_token(token_id)
        return token or ""


def cut(token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """The first `max_tokens` ids at most, of which the last stays the text's own last one:
    an encoder's closing special token."""
    if len(token_ids) <= max_tokens:
        return tuple(token_ids)
    return (*token_ids[: max_tokens - 1], token_ids[-1])


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text is not valid Unicode at character {error.start}: {error.reason}"
        ) from None


def _read_text(file: Path) -> str:
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise FormatError(f"{file} is larger than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is not valid UTF-8: {error.reason}") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file} must hold a JSON object")
    return value


def _token_id(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    """The id of a token given as in tokenizer_config.json: text, or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(content) if isinstance(content, str) else None


def _as_ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _folder_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None
