"""Questions to a server on real sockets, whose device says each token with logprob -0.5."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jaxserve.cli import eval as eval_command
from jaxserve.errors import ConfigError, NotAccepting
from jaxserve.evaluation.run import EvaluationFailed, choice_logprobs, evaluate
from jaxserve.evaluation.task import ChoiceItem, ExactItem
from tests.server.conftest import make_service, service

__all__ = ["make_service", "service"]


def choice(choices, answer=0):
    return ChoiceItem(context="The sky is", choices=choices, answer=answer)


def test_a_choice_has_the_logprobs_of_its_own_tokens(service):
    # One token a byte: only those of the choice count.
    item = choice([" blue", " red", " b"])
    assert choice_logprobs(service.client, item) == pytest.approx([-2.5, -2.0, -1.0])


def test_verdicts_come_in_the_order_of_the_items(service):
    service.will_say(" Cold \nand more")
    items = [
        choice([" blue", " red"], answer=1),
        choice([" blue", " red"], answer=0),
        ExactItem(prompt="x", answers=["warm", "cold"]),
        ExactItem(prompt="x", answers=["col"]),
        ExactItem(prompt="x", answers=["co"], max_tokens=3),
    ]
    judged = []
    verdicts = evaluate(
        service.client, items * 4, concurrency=16, on_judged=lambda: judged.append(1)
    )
    assert [verdict.is_right for verdict in verdicts] == [True, False, True, False, True] * 4
    # Every byte is as likely as any other, so the first choice is taken.
    assert [verdict.is_right_by_byte for verdict in verdicts[:3]] == [False, True, None]
    assert verdicts[2].output.strip() == "Cold"
    assert len(judged) == 20
    service.assert_idle()


def test_a_question_that_cannot_be_asked_is_named(service):
    with pytest.raises(EvaluationFailed, match=r"item 2 cannot be asked: .*610 token ids"):
        evaluate(service.client, [choice([" a", " bc"]), choice([" a", "b" * 600])], concurrency=1)


def test_the_command_prints_shares_and_intervals(service, tmp_path):
    path = tmp_path / "task.jsonl"
    items = [choice([" blue", " red"], answer=int(index % 4 > 0)) for index in range(8)]
    path.write_text("\n".join(item.model_dump_json() for item in items))
    arguments = ["--server", service.address, "--task", str(path)]
    done = CliRunner().invoke(eval_command.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["model"] == "scripted@7"
    result = report["tasks"][str(path)]
    assert (result["num_items"], result["num_right"], result["accuracy"]) == (8, 6, 0.75)
    assert result["by_byte"]["num_right"] == 2
    assert result["interval95"][0] < 0.75 < result["interval95"][1]
    done = CliRunner().invoke(eval_command.app, [*arguments, "--show-wrong", "--limit", "4"])
    assert "75.0%" in done.stdout
    assert "'The sky is': ' red', not ' blue'" in done.stdout


def test_what_does_not_go_together_is_refused(tmp_path):
    def run(*arguments):
        done = CliRunner().invoke(eval_command.app, ["--task", "facts", *arguments])
        raise done.exception

    with pytest.raises(ConfigError, match="leave --max-num-seqs out"):
        run("--server", "127.0.0.1:1", "--max-num-seqs", "2")
    with pytest.raises(ConfigError, match="give --server"):
        run("--tls")
    with pytest.raises(ConfigError, match="given twice"):
        run("--task", "facts")
    with pytest.raises(NotAccepting):
        run("--server", "127.0.0.1:1")
