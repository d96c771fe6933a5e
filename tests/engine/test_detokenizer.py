from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.engine.detokenizer import DetokenizerFactory, WindowDetokenizer
from models.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import byte_fallback_bpe, byte_level_bpe, byte_tokenizer

BYTE_LEVEL = byte_level_bpe()
BYTES = byte_tokenizer()
FALLBACK = byte_fallback_bpe()
TEXTS = [
    "plain words",
    "def f(x):\n    return x  # two  spaces",
    "日本語 and 😀👩‍👩‍👧 mixed, naïve 1234",
    "é",
]


def pieces(
    tokenizer: Tokenizer, ids: list[int], *, skip: bool = True, prompt: tuple[int, ...] = ()
):
    detokenizer = DetokenizerFactory(tokenizer).create(prompt, skip_special_tokens=skip)
    return [*(detokenizer.push((i,)) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTES, FALLBACK], ids=["bpe", "bytes", "spm"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_join_to_what_decoding_at_once_gives(skip: bool, data: st.DataObject) -> None:
    for tokenizer in (BYTE_LEVEL, BYTES):
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
        expected = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(pieces(tokenizer, ids, skip=skip)) == expected


@settings(max_examples=150, deadline=None)
@given(chunks=st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=12))
@example(chunks=[[0xF0, 0x9F], [0x98], [0x80, 0x41]])
@example(chunks=[[0xED, 0xA0, 0x80], [0xC0], [0xF4, 0x90]])
def test_text_does_not_depend_on_how_tokens_arrive(chunks: list[list[int]]) -> None:
    ids = [i for chunk in chunks for i in chunk]
    detokenizer = DetokenizerFactory(BYTES).create(())
    text = "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.flush()
    assert text == bytes(ids).decode("utf-8", "replace") == BYTES.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["bytes", "spm"])
def test_an_emoji_leaves_whole_with_its_last_byte(tokenizer: Tokenizer) -> None:
    offset = 0 if tokenizer is BYTES else 3
    ids = [offset + byte for byte in "😀".encode()]
    assert pieces(tokenizer, ids) == ["", "", "", "😀", ""]


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["bytes", "spm"])
def test_a_cut_character_becomes_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    offset = 0 if tokenizer is BYTES else 3
    ids = [offset + byte for byte in "😀".encode()[:2]]
    *before, last = pieces(tokenizer, ids)
    assert before == ["", ""]
    assert last.strip("\ufffd") == ""
    assert last


def test_a_leading_space_after_the_prompt_is_kept() -> None:
    prompt = tuple(FALLBACK.encode("hello", add_special_tokens=False))
    ids = FALLBACK.encode("the fox", add_special_tokens=False)
    assert "".join(pieces(FALLBACK, ids, prompt=prompt)) == " the fox"


def test_a_character_that_the_prompt_began_is_not_the_outputs() -> None:
    smile = "😀".encode()
    assert "".join(pieces(BYTES, [*b"ab"], prompt=tuple(smile[:2]))) == "ab"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, FALLBACK], ids=["bpe", "spm"])
def test_special_tokens_are_left_out_or_shown(tokenizer: Tokenizer) -> None:
    special = max(tokenizer.special_token_ids)
    ids = [*tokenizer.encode("the", add_special_tokens=False), special]
    name = tokenizer.backend.id_to_token(special)
    assert "".join(pieces(tokenizer, ids)) == "the"
    assert "".join(pieces(tokenizer, ids, skip=False)) == "the" + name


def test_bytes_that_never_become_a_character_do_not_hold_text_for_ever() -> None:
    ids = [3 + 0xFF] * 200
    detokenizer = WindowDetokenizer(FALLBACK, (), skip_special_tokens=True)
    lags = []
    num_out = 0
    for index, token_id in enumerate(ids):
        num_out += len(detokenizer.push((token_id,)))
        lags.append(index + 1 - num_out)
    assert max(lags) <= 16


def test_the_window_stays_short() -> None:
    detokenizer = WindowDetokenizer(FALLBACK, (), skip_special_tokens=True)
    ids = FALLBACK.encode(TEXTS[0] * 20, add_special_tokens=False)
    for token_id in ids:
        detokenizer.push((token_id,))
        assert len(detokenizer._window) <= 4


def test_a_token_costs_the_same_however_long_the_text_is() -> None:
    detokenizer = DetokenizerFactory(BYTE_LEVEL).create(())
    ids = BYTE_LEVEL.encode(" ".join(TEXTS) * 50, add_special_tokens=False)
    started = time.process_time()  # Which a busy machine does not stretch.
    for token_id in ids:
        detokenizer.push((token_id,))
    assert (time.process_time() - started) / len(ids) < 100e-6
