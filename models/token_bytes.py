"""TokenBytes: what a single token stands for, as bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tokenizers import decoders

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Its vocabulary is byte-level BPE, whose texts are their tokens' bytes, joined."""
    return isinstance(tokenizer.backend.decoder, decoders.ByteLevel)


class TokenBytes:
    """Token id -> bytes, looked up as ids turn up.

    An id without a token, as padded vocabularies have, stands for none. A
    token may end within a character. In SentencePiece vocabularies a word
    keeps the space before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._byte_of_character = _byte_of_character() if is_byte_level(tokenizer) else None
        self._added_ids = frozenset(tokenizer.backend.get_added_tokens_decoder())
        self._bytes_of_id: dict[int, bytes] = {}
        self.special_token_ids = tokenizer.special_token_ids

    def __getitem__(self, token_id: int) -> bytes:
        known = self._bytes_of_id.get(token_id)
        if known is None:
            known = self._bytes_of_id[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of_character is None:
            return self._of_sentencepiece(token, token_id)
        try:
            return bytes(self._byte_of_character[character] for character in token)
        except KeyError:  # An added token holds plain text.
            return str(token).encode()

    def _of_sentencepiece(self, token: str, token_id: int) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            return bytes.fromhex(byte[1])
        return (token if token_id in self._added_ids else token.replace(_SPACE, " ")).encode()


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: the printable
    Latin-1 ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in table)
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
