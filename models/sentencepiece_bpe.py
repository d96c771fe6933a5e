"""SentencePiece's BPE, as Llama 2 and Mistral use it, as a `tokenizers.Tokenizer`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

SPACE = "\u2581"
"""What a space is written as inside a piece."""
MAX_PIECE_CHARACTERS = 512


def sentencepiece_bpe(
    vocab: Mapping[str, int],
    scores: Sequence[float],
    mergeable: Collection[str],
    *,
    unknown_token: str | None,
    add_space_prefix: bool,
) -> tokenizers.Tokenizer:
    """A tokenizer that cuts text as SentencePiece does.

    SentencePiece joins, again and again, the two neighbours that make the
    piece of the highest score. That is byte-pair encoding whose merges are all
    cuts of all pieces in two, best piece first.

    Args:
        vocab: piece to id.
        scores: by id; higher is joined sooner.
        mergeable: pieces that text may join into; no control or byte pieces.
        unknown_token: what stands for a character without piece or bytes.
        add_space_prefix: put a space before the text, as before any word.

    Raises ValueError when the pieces are too long or the library refuses them.
    """
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=dict(vocab),
            merges=_merges(vocab, scores, mergeable),
            unk_token=unknown_token,
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in vocab for byte in range(256)),
        )
    )
    to_piece = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), to_piece])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = to_piece
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(
    vocab: Mapping[str, int], scores: Sequence[float], mergeable: Collection[str]
) -> list[tuple[str, str]]:
    allowed = frozenset(mergeable)
    merges: list[tuple[str, str]] = []
    for piece in sorted(allowed, key=lambda piece: (-scores[vocab[piece]], vocab[piece])):
        if len(piece) > MAX_PIECE_CHARACTERS:
            raise ValueError(f"a piece has {len(piece)} characters")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in allowed and right in allowed:
                merges.append((left, right))
    return merges
