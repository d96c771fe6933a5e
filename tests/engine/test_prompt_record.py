from __future__ import annotations

import json
from typing import Any

import pytest

from jaxserve.engine.prompt_record import BadRecord, PromptRecord, read_records
from models.tokenizer import Tokenizer
from tests.engine.engine_rig import make_engine
from tests.engine.tiny_model import CHAT_TEMPLATE
from tests.engine.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
CHATTY = Tokenizer(byte_tokenizer().backend, eos_token_ids=(256,), chat_template=CHAT_TEMPLATE)


def read(*lines: Any, tokenizer: Tokenizer = TOKENIZER, chat: bool = False, **defaults: Any):
    engine, _ = make_engine()
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return list(
        read_records(texts, tokenizer, engine.validate, sampling_defaults=defaults, chat=chat)
    )


def test_the_three_kinds_of_prompt() -> None:
    records = read(
        {"id": "a", "prompt": "hey"},
        {"id": 7, "prompt_token_ids": [1, 2]},
        "",
        {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "stop": "y"},
        tokenizer=CHATTY,
    )
    assert all(isinstance(record, PromptRecord) for record in records)
    assert [record.id for record in records] == ["a", 7, 4]
    assert [bytes(record.request.prompt_token_ids) for record in records] == [
        b"hey",
        b"\1\2",
        b"[user]x[assistant]",
    ]
    assert records[2].request.sampling.stop == ("y",)


def test_a_prompt_goes_through_the_template_when_asked() -> None:
    (record,) = read({"prompt": "x"}, tokenizer=CHATTY, chat=True)
    assert bytes(record.request.prompt_token_ids) == b"[user]x[assistant]"


def test_a_lines_own_fields_beat_the_defaults() -> None:
    records = read({"prompt": "a"}, {"prompt": "a", "top_k": 3}, top_k=5, seed=1)
    assert [record.request.sampling.top_k for record in records] == [5, 3]
    assert [record.request.sampling.seed for record in records] == [1, 1]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "line"),
        ("[1]", "line"),
        ('{"prompt": "a", "top_p": NaN}', "line"),
        ("[" * 100_000, "line"),
        ({"id": "x"}, "prompt"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 64}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt_token_ids": [300]}, "prompt_token_ids"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages"),
        ({"prompt": "a", "id": 1.5}, "id"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"prompt": "a", "top_p": 3}, "top_p"),
        ({"prompt": "a", "top_k": "3"}, "top_k"),
    ],
)
def test_bad_lines_name_the_field_and_spare_the_others(line: Any, field: str) -> None:
    bad, good = read(line, {"id": "good", "prompt": "a"})
    assert isinstance(bad, BadRecord)
    assert (bad.line_number, bad.error.field) == (1, field)
    assert isinstance(good, PromptRecord)
    assert good.line_number == 2
