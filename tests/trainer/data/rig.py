"""Small tokenizers, sources and an independent reading of prepared data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from models.tokenizer import Tokenizer

START, END = 256, 257
CHAT_TEMPLATE = json.loads(
    (Path(__file__).parents[2] / "goldens" / "tokenizer" / "smollm2_chat.json").read_text()
)["template"]
"""SmolLM2's own."""


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """One token a byte: id 0..255 is the byte; 256 and 257 begin and end a turn."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ("<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return Tokenizer(backend, eos_token_ids=(END,), chat_template=chat_template)


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(count: int, seed: int = 0, max_words: int = 40) -> list[str]:
    """Documents of different lengths."""
    generator = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "delta", "émigré", "zeta\n", "日本"]
    return [
        " ".join(generator.choice(words, generator.integers(1, max_words))) for _ in range(count)
    ]


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one to three turns; the answers are in capitals, all else is not."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(count):
        messages = []
        for turn in range(generator.integers(1, 4)):
            messages.append({"role": "user", "content": f"what is {number} {turn}?"})
            messages.append({"role": "assistant", "content": "IT IS " + "X" * int(turn * 3 + 1)})
        records.append({"messages": messages})
    return records


def stored_documents(folder: Path, split: str) -> list[list[int]]:
    """All documents of a split's files, read with nothing of ours."""
    manifest = json.loads((folder / "dataset.json").read_text())
    token_type = {"uint16": "<u2", "uint32": "<u4"}[manifest["token_dtype"]]
    tokens = np.fromfile(folder / split / "tokens.bin", token_type)
    starts = np.fromfile(folder / split / "documents.bin", "<i8")
    return [part.tolist() for part in np.split(tokens, starts[1:])] if len(starts) else []


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
