"""A Tokenizer to a folder that `Tokenizer.from_folder` reads back identically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.tokenizer import Tokenizer, TokenizerError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files of a Hugging Face folder that belong to its tokenizer. The first four are read here."""


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

    `transformers` reads them, too. The tokenizer may have come from a GGUF file.

    Args:
        tokenizer: what to write.
        folder: an existing folder.

    Raises:
        TokenizerError: it could not be read back as it is; the message says what differs.
    """
    backend = tokenizer.backend
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.bos_token_id is not None:
        config["bos_token"] = backend.id_to_token(tokenizer.bos_token_id)
    if tokenizer.eos_token_ids:
        config["eos_token"] = backend.id_to_token(tokenizer.eos_token_ids[0])
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    config = {name: value for name, value in config.items() if value is not None}
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(tokenizer.eos_token_ids),
    }
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=False), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(
        folder / "generation_config.json",
        {name: value for name, value in generation.items() if value not in (None, [])},
    )
    _check_same(tokenizer, Tokenizer.from_folder(folder))


def _check_same(written: Tokenizer, read: Tokenizer) -> None:
    for name in (
        *("bos_token_id", "eos_token_ids", "vocab_size", "special_token_ids", "chat_template"),
    ):
        if getattr(written, name) != getattr(read, name):
            raise TokenizerError(
                f"the tokenizer cannot be stored: its {name} is {getattr(written, name)!r} and "
                f"would be read back as {getattr(read, name)!r}"
            )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
