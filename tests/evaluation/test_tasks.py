"""Task files: those that come along are sound, and a wrong line is named."""

from __future__ import annotations

import json

import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation.score import Score
from jaxserve.evaluation.task import ChoiceItem, ExactItem, find_task, read_task, task_names

CHOICE = {"context": "a", "choices": [" b", " c"], "answer": 1}


@pytest.mark.parametrize("name", task_names())
def test_a_task_that_comes_along_is_sound(name):
    items = read_task(find_task(name))
    assert len(items) >= 50
    texts = [item.context if isinstance(item, ChoiceItem) else item.prompt for item in items]
    assert len(set(texts)) == len(texts)
    for item in items:
        if isinstance(item, ChoiceItem):
            assert all(choice.startswith(" ") for choice in item.choices)
            assert not item.context.endswith(" ")
    answers = [item.answer for item in items if isinstance(item, ChoiceItem)]
    if answers:
        # One that always takes the same place is right at chance.
        num_choices = len(items[0].choices)
        most = max(answers.count(place) for place in range(num_choices))
        assert most / len(answers) < 1 / num_choices + 0.12


def test_both_kinds_are_read(tmp_path):
    path = tmp_path / "task.jsonl"
    lines = [CHOICE, {"prompt": "p", "answers": ["x"], "max_tokens": 3, "stop": ["."]}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    first, second = read_task(path)
    assert first == ChoiceItem(**CHOICE)
    assert second == ExactItem(prompt="p", answers=["x"], max_tokens=3, stop=["."])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no items"),
        ("[1]", "line 1: Input should be an object"),
        ("{", "line 1: .*JSON"),
        (json.dumps(CHOICE | {"answer": 2}), "line 1: .*answer must be less than 2"),
        (json.dumps(CHOICE | {"answer": -1}), "line 1: answer"),
        (json.dumps(CHOICE | {"choices": [" b"]}), "line 1: choices"),
        (json.dumps(CHOICE | {"choices": [" b", " b"]}), "choices must differ"),
        (json.dumps(CHOICE | {"extra": 1}), "line 1: extra"),
        ('{"prompt": "p", "answers": []}', "line 1: answers"),
        ('{"prompt": "p", "answers": ["x"], "max_tokens": 0}', "line 1: max_tokens"),
        ('{"prompt": "p", "answers": "x"}', "line 1: answers"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_task(path)


def test_a_task_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="agreement, facts, words"):
        find_task("nowhere")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"context": "\xe9"}')
    with pytest.raises(ConfigError, match="UTF-8"):
        read_task(path)


@pytest.mark.parametrize(
    ("num_right", "num_items", "low", "high"),
    # Of scipy.stats.binomtest(...).proportion_ci(method="wilson").
    [(50, 100, 0.40383, 0.59617), (0, 10, 0.0, 0.27753), (9, 10, 0.59585, 0.98212)],
)
def test_intervals_are_wilsons(num_right, num_items, low, high):
    assert Score(num_right, num_items).interval == pytest.approx((low, high), abs=1e-5)
