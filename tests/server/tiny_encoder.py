"""The tiny BERT of the goldens, with a tokenizer whose words are token ids."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

GOLDEN = Path(__file__).parent.parent / "goldens" / "tiny_bert"
MAX_TOKENS = 20
SIZE = 24


def write_tiny_encoder(folder: Path) -> Path:
    """The golden's weights; the word `w7` is token 7, and no special tokens are added."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, folder / name)
    backend = tokenizers.Tokenizer(
        models.WordLevel({f"w{number}": number for number in range(257)}, unk_token="w0")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def text_of(token_ids: Iterable[int]) -> str:
    """The text that the tokenizer turns into these ids."""
    return " ".join(f"w{token_id}" for token_id in token_ids)
