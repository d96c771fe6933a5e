"""Chats: the answers, the end of each turn included, are learnt and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.trainer.data.chat_spans import ConversationError, encode_conversation
from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.data.errors import DataError
from models.tokenizer import Tokenizer
from tests.trainer.data.rig import END, START, byte_tokenizer, chats, stored_documents, write_jsonl
from tests.trainer.data.test_prepare import run


def learnt_text(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[str]:
    """The runs of tokens that are learnt, as text."""
    encoded = encode_conversation(tokenizer, messages)
    is_answer = np.array(encoded.is_answer, np.int8)
    edges = np.flatnonzero(np.diff(is_answer, prepend=0, append=0)).reshape(-1, 2)
    return [
        tokenizer.decode(encoded.ids[begin:end], skip_special_tokens=False)
        for begin, end in edges.tolist()
    ]


def test_answers_are_found_in_smollm2s_template() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello. "},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "\nYes?"},
    ]
    assert learnt_text(byte_tokenizer(), messages) == ["Hello. <|im_end|>", "\nYes?<|im_end|>"]


def test_what_is_learnt_follows_what_serving_sends() -> None:
    """Each answer begins where the prompt of a request would end."""
    tokenizer = byte_tokenizer()
    messages = chats(1, seed=3)[0]["messages"]
    encoded = encode_conversation(tokenizer, messages)
    for number in range(1, len(messages), 2):
        prompt = tokenizer.encode_chat(messages[:number])
        answer = tokenizer.encode(messages[number]["content"], add_special_tokens=False)
        assert encoded.ids[: len(prompt)] == prompt
        stop = len(prompt) + len(answer)
        assert encoded.ids[len(prompt) : stop + 1] == [*answer, END]
        assert all(encoded.is_answer[len(prompt) : stop + 1])
        assert not encoded.is_answer[len(prompt) - 1]
        assert encoded.is_answer[stop + 1 : stop + 2] == [False]  # the template's newline


def test_rows_hold_whole_conversations(tmp_path: Path) -> None:
    records = chats(80)
    source = write_jsonl(tmp_path / "a.jsonl", records)
    folder = run(tmp_path / "out", source, kind="chat", seq_len=400)
    dataset, tokenizer = TokenDataset(folder), byte_tokenizer()
    rows = dataset.read(np.arange(dataset.num_examples))
    seen = []
    for row in range(len(rows)):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            is_own = rows.segment_ids[row] == segment
            assert rows.positions[row][is_own].tolist() == list(range(is_own.sum()))
            seen.append(rows.inputs[row][is_own].tolist())
            is_learnt = is_own & rows.weights[row].astype(bool)
            text = bytes(t for t in rows.targets[row][is_learnt].tolist() if t < START).decode()
            assert text == text.upper()
    expected = [tokenizer.encode_chat(r["messages"], add_generation_prompt=False) for r in records]
    # A row's last conversation may end as the last target.
    assert [ids[: len(own)] for ids, own in zip(expected, seen, strict=True)] == seen
    assert all(len(ids) - len(own) <= 1 for ids, own in zip(expected, seen, strict=True))
    num_answers = sum(m["role"] == "assistant" for r in records for m in r["messages"])
    assert (rows.targets[rows.weights > 0] == END).sum() == num_answers
    assert dataset.num_examples < 60  # several share a row


def test_unpacked_rows_hold_one_conversation(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", chats(20))
    folder = run(tmp_path / "out", source, kind="chat", seq_len=400, pack=False)
    dataset = TokenDataset(folder)
    assert dataset.num_examples == 20
    assert dataset.read(np.arange(20)).segment_ids.max() == 1


@pytest.mark.parametrize(
    ("overlong", "num_kept", "counts"),
    [
        ("truncate", 2, {"overlong_truncated": 1, "overlong_before_answer": 1}),
        ("drop", 1, {"overlong_dropped": 2}),
    ],
)
def test_overlong_chats_are_cut_or_left_out_and_counted(
    tmp_path: Path, overlong: str, num_kept: int, counts: dict[str, int]
) -> None:
    def chat(question: str, answer: str) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(roles, (question, answer), strict=True)
            ]
        }

    records = [chat("q", "FITS"), chat("q", "A" * 300), chat("q" * 300, "A")]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    options = {"kind": "chat", "seq_len": 200, "overlong": overlong}
    folder = run(tmp_path / "out", source, **options)
    documents = stored_documents(folder, "train")
    assert len(documents) == num_kept
    assert max(map(len, documents)) <= 201
    assert TokenDataset(folder).manifest.counts == counts


REWRITING = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|im_start|>"
    "{% else %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
DROPPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content[:3] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
NO_PROMPT = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>bot: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (REWRITING, "does not let the answer of message 1 be found"),
        (DROPPING, "drops or rewrites message 1"),
        (NO_PROMPT, "does not let the answer of message 1 be found"),
        ("{{ raise_exception('only tools') }}", "only tools"),
    ],
)
def test_templates_without_exact_answers_are_refused(template: str, words: str) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two three"},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "five"},
    ]
    with pytest.raises(ConversationError, match=words):
        encode_conversation(byte_tokenizer(template), messages)


def test_a_token_across_the_edge_of_an_answer_is_refused() -> None:
    """With a merge of the template's newline and a blank, no token begins with the answer."""
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend
    import json

    state = json.loads(backend.to_str())
    newline, blank = "\u010a", "\u0120"  # byte-level spellings of \n and space
    state["model"]["vocab"][newline + blank] = 258
    state["model"]["merges"] = [[newline, blank]]
    merged = Tokenizer(
        type(backend).from_str(json.dumps(state)),
        eos_token_ids=(END,),
        chat_template=tokenizer.chat_template,
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}]
    assert learnt_text(tokenizer, messages) == [" b<|im_end|>"]
    with pytest.raises(ConversationError, match="a token spans the edge of message 1"):
        encode_conversation(merged, messages)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Hi", "a list of messages"),
        ([], "a list of messages"),
        (["Hi"], "message 0 is no object"),
        ([{"role": "robot", "content": "a"}], "message 0 has role 'robot'"),
        ([{"role": "user", "content": None}], "message 0 has no content"),
        ([{"role": "user", "content": "a"}], "no message is the assistant's"),
        ([{"role": "assistant", "content": "x<|im_end|>"}], "control token '<|im_end|>'"),
    ],
)
def test_malformed_chats_name_the_line(tmp_path: Path, value: Any, words: str) -> None:
    good = chats(2)
    source = write_jsonl(tmp_path / "a.jsonl", [*good, {"messages": value}])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: .*{words}".replace("|", r"\|")):
        run(tmp_path / "out", source, kind="chat")
