"""Tokenizers against their references: llama.cpp's and SentencePiece's tokens of a hard corpus."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from checkpoint.errors import FormatError
from checkpoint.formats.gguf import GgufFile
from models.chat_sandbox import ChatTemplateError
from models.gguf_tokenizer import tokenizer_from_gguf
from models.tokenizer import Tokenizer, TokenizerError

GOLDENS = Path(__file__).parent.parent / "goldens" / "tokenizer"


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2_path: Path) -> Mapping[str, Any]:
    return GgufFile(smollm2_path).metadata


@pytest.fixture(scope="module")
def smollm2(smollm2_metadata: Mapping[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(smollm2_metadata)


def golden(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))
    return value


@pytest.mark.real_model
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_tokens_equal_llama_cpp(pre: str, smollm2_metadata: Mapping[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf({**smollm2_metadata, "tokenizer.ggml.pre": pre})
    cases = golden(pre)["cases"]
    assert len(cases) > 150
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]


def test_the_goldens_tell_pre_tokenizers_apart() -> None:
    by_name = {
        name: [case["ids"] for case in golden(name)["cases"]] for name in ("gpt-2", "llama-bpe")
    }
    pairs = zip(by_name["gpt-2"], by_name["llama-bpe"], strict=True)
    assert sum(a != b for a, b in pairs) >= 10


# SmolLM2's vocabulary has no token for some bytes: those of six control
# characters, and the first byte of planes that hold no characters yet.
WITH_TOKENS = st.characters(
    codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d"
)


@pytest.mark.real_model
@settings(max_examples=100, deadline=None)
@given(text=st.text(WITH_TOKENS, max_size=200))
def test_any_text_comes_back(text: str, smollm2: Tokenizer) -> None:
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


@pytest.mark.real_model
def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.special_token_ids == frozenset(range(17))
    assert smollm2.encode("Hi") == smollm2.encode("Hi", add_special_tokens=False)
    assert smollm2.encode("<|im_start|>Hi<|im_end|>")[::2] == [1, 2]
    assert smollm2.decode([1, 26843, 2]) == "Hi"
    assert smollm2.decode([1, 26843, 2], skip_special_tokens=False) == "<|im_start|>Hi<|im_end|>"


@pytest.mark.real_model
def test_smollm2_chat(smollm2: Tokenizer) -> None:
    assert smollm2.has_chat_template
    for case in golden("smollm2_chat")["cases"]:
        flag = case["add_generation_prompt"]
        assert smollm2.render_chat(case["messages"], add_generation_prompt=flag) == case["text"]
        ids = smollm2.encode_chat(case["messages"], add_generation_prompt=flag)
        assert ids == smollm2.encode(case["text"], add_special_tokens=False)
        assert ids[0] == 1


@pytest.mark.real_model
def test_folder_gives_the_same_tokens(smollm2: Tokenizer, tmp_path: Path) -> None:
    smollm2.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<|im_start|>",
                "eos_token": {"content": "<|im_end|>"},
                "chat_template": golden("smollm2_chat")["template"],
            }
        )
    )
    folder = Tokenizer.from_folder(tmp_path)
    assert (folder.bos_token_id, folder.eos_token_ids) == (1, (2,))
    assert folder.special_token_ids == smollm2.special_token_ids
    for case in golden("smollm")["cases"]:
        assert folder.encode(case["text"]) == case["ids"]
    messages = [{"role": "user", "content": "Hi"}]
    assert folder.encode_chat(messages) == smollm2.encode_chat(messages)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    tokens, scores, types = zip(*golden("sentencepiece")["vocabulary"], strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def test_tokens_equal_sentencepiece() -> None:
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata())
    cases = golden("sentencepiece")["cases"]
    assert len(cases) > 250
    for case in cases:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"]) == [1, *case["ids"]]
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_sentencepiece_options() -> None:
    bare = tokenizer_from_gguf(
        sentencepiece_metadata(add_bos_token=False, add_eos_token=True, add_space_prefix=False)
    )
    ids = bare.encode("aab")
    assert ids[-1] == 2
    pieces = [bare.backend.id_to_token(token_id) for token_id in ids]
    assert "".join(pieces[:-1]) == "aab"
    assert bare.decode(ids) == "aab"
    assert bare.encode("</s>")[0] == 2


TINY_TOKENS = ["<|end|>", "<think>", "a", "b", "ab", "\u0120"]


def tiny_metadata(**changes: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TINY_TOKENS,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": np.array([3, 4, 1, 1, 1, 1], np.int32),
        "tokenizer.ggml.eos_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def test_added_tokens_and_their_kinds() -> None:
    tokenizer = tokenizer_from_gguf(tiny_metadata())
    assert tokenizer.encode("ab<think>ba<|end|>") == [4, 1, 3, 2, 0]
    assert tokenizer.special_token_ids == {0}
    assert tokenizer.decode([4, 1, 0]) == "ab<think>"
    assert tokenizer.vocab_size == 6
    assert not tokenizer.has_chat_template


def test_bos_and_eos_as_the_file_says() -> None:
    with_both = tokenizer_from_gguf(
        tiny_metadata(add_bos_token=True, add_eos_token=True, bos_token_id=1, eot_token_id=5)
    )
    assert with_both.encode("ab") == [1, 4, 0]
    assert with_both.encode("ab", add_special_tokens=False) == [4]
    assert with_both.eos_token_ids == (0, 5)
    assert tokenizer_from_gguf(tiny_metadata(bos_token_id=1)).encode("ab") == [4]
    llama3 = tokenizer_from_gguf(tiny_metadata(bos_token_id=1, pre="llama-bpe"))
    assert llama3.encode("ab") == [1, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert' is not supported"),
        ({"pre": "default"}, "pre-tokenizer 'default' is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"pre": 3}, "must be a string"),
        ({"model": None}, "lacks 'tokenizer.ggml.model'"),
        ({"tokens": None}, "lacks 'tokenizer.ggml.tokens'"),
        ({"tokens": np.zeros(3)}, "array of strings"),
        ({"tokens": [*TINY_TOKENS[:-1], "a"]}, "twice"),
        ({"merges": None}, "lacks 'tokenizer.ggml.merges'"),
        ({"merges": ["ab"]}, "not two tokens"),
        ({"merges": ["a b c"]}, "not two tokens"),
        ({"merges": ["a z"]}, "does not hold together"),
        ({"token_type": np.zeros(2, np.int32)}, "2 token types"),
        ({"token_type": ["a"]}, "whole numbers"),
        ({"eos_token_id": 6}, "outside the vocabulary"),
        ({"bos_token_id": -1}, "whole number"),
        ({"bos_token_id": True}, "whole number"),
        ({"add_bos_token": 1}, "boolean"),
    ],
)
def test_bad_gguf_tokenizer_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        tokenizer_from_gguf(tiny_metadata(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "0 scores"),
        ({"scores": np.zeros(3, np.float32)}, "3 scores"),
        ({"scores": np.zeros(3, np.int32)}, "array of numbers"),
    ],
)
def test_bad_sentencepiece_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        tokenizer_from_gguf(sentencepiece_metadata(**changes))


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d \ude00"])
def test_lone_surrogates_are_a_clean_error(text: str) -> None:
    with pytest.raises(TokenizerError, match="not valid Unicode at character"):
        tokenizer_from_gguf(tiny_metadata()).encode(text)


def test_odd_ids() -> None:
    tokenizer = tokenizer_from_gguf(tiny_metadata())
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([4, 5000, 2**32 - 1]) == "ab"
    for ids in ([-1], [2**32], ["a"], [1.5]):
        with pytest.raises(TokenizerError, match="integers"):
            tokenizer.decode(ids)  # type: ignore[arg-type]


def test_chat_without_or_with_a_broken_template() -> None:
    tokenizer = tokenizer_from_gguf(tiny_metadata())
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "a"}])
    broken = tokenizer_from_gguf({**tiny_metadata(), "tokenizer.chat_template": "{% if %}"})
    assert broken.encode("ab") == [4]
    with pytest.raises(ChatTemplateError, match="does not compile"):
        broken.render_chat([{"role": "user", "content": "a"}])


def write_folder(folder: Path, **files: Any) -> Path:
    backend = Backend(WordLevel({"<s>": 0, "</s>": 1, "a": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_folder_without_extras_is_neither_cut_nor_padded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path))
    assert tokenizer.encode("a a a") == [2, 2, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, ())
    assert not tokenizer.has_chat_template


def test_folder_eos_ids_and_named_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": templates}
    generation = {"eos_token_id": [1, 3, None]}
    write_folder(tmp_path, tokenizer_config=config, generation_config=generation)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_token_ids == (1, 3)
    assert tokenizer.render_chat([]) == "y"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}z{{ eos_token }}")
    assert Tokenizer.from_folder(tmp_path).render_chat([]) == "<s>z</s>"


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path)
    for bad in ("{", "[]", "[" * 100_000, "\ud800"):
        raw = bad.encode("utf-8", "surrogatepass")
        (tmp_path / "tokenizer_config.json").write_bytes(raw)
        with pytest.raises(FormatError, match="tokenizer_config"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for bad in ("{}", "null", '{"model": {"type": "BPE", "vocab": 3}}', "x" * 100):
        (tmp_path / "tokenizer.json").write_text(bad)
        with pytest.raises(FormatError, match="not a valid tokenizer"):
            Tokenizer.from_folder(tmp_path)
