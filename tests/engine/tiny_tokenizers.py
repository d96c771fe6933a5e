"""Tokenizers small enough to build in a test, of the two kinds there are."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from models.tokenizer import Tokenizer

EOS = 256
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "def main(): return 42 # numbers 1234567890",
    "hello world, hello tokens; stop words stop here.",
    "日本語のテキスト 😀😃 émigré naïve",
]


def byte_tokenizer() -> Tokenizer:
    """One token a byte: id 0..255 is the byte, 256 the end of sequence."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(backend, eos_token_ids=(EOS,))


def byte_level_bpe() -> Tokenizer:
    """A trained byte-level BPE with special and with plain added tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think now>", special=False)])
    return Tokenizer(backend, eos_token_ids=(1,))


def byte_fallback_bpe() -> Tokenizer:
    """Built like Llama 2's: a meta-space for spaces, bytes as <0xNN>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = "\u2581" + "\u2581".join(" ".join(CORPUS[:3]).split())
    pieces += sorted(set(text) | set("語日"))
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("\u2581", "h")]
    pieces += ["\u2581t", "\u2581th", "\u2581the", "\u2581h"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return Tokenizer(backend, bos_token_id=1, eos_token_ids=(2,))
