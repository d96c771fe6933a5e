from __future__ import annotations

import pytest

from jaxserve.engine.detokenizer import DetokenizerFactory
from jaxserve.engine.metrics import EngineMetrics, Histogram
from jaxserve.engine.output import OutputProcessor
from jaxserve.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    TokenLogprobs,
    TokenUpdate,
)
from tests.engine.engine_rig import CollectingSink, request
from tests.engine.tiny_tokenizers import byte_tokenizer


def opened(prompt: bytes = b"hi", **sampling: object) -> tuple[OutputProcessor, Request]:
    outputs = OutputProcessor(DetokenizerFactory(byte_tokenizer()), EngineMetrics())
    generation = request("a", prompt, **sampling)
    record = Request(generation, 100, 0, frozenset(), arrival_s=10.0, first_scheduled_s=11.0)
    outputs.open(record, CollectingSink())
    return outputs, record


def update(
    record: Request,
    text: bytes,
    reason: FinishReason | None = None,
    stop_token_id: int | None = None,
) -> TokenUpdate:
    logprobs = tuple(TokenLogprobs(i, -1.0, 1, ()) for i in text)
    return TokenUpdate(record, tuple(text), logprobs, (), reason, stop_token_id)


def only(outputs: OutputProcessor, change: TokenUpdate, now_s: float = 12.0) -> RequestOutput:
    addressed = outputs.update(change, now_s)
    assert addressed is not None
    return addressed.output


def test_several_tokens_in_one_update_end_at_the_stop_string() -> None:
    outputs, record = opened(stop=("END",))
    output = only(outputs, update(record, b"abENDcd"))
    assert (bytes(output.token_ids), output.text) == (b"abEND", "ab")
    assert len(output.logprobs) == 5
    assert (output.finish_reason, output.stop_match) == (FinishReason.STOP, "END")
    assert output.usage is not None
    assert output.usage.num_output_tokens == 5
    assert outputs.num_open == 0
    assert outputs.update(update(record, b"x"), 13.0) is None


def test_the_last_output_flushes_held_text_and_cut_characters() -> None:
    outputs, record = opened(stop=("END",))
    assert only(outputs, update(record, b"abEN")).text == "ab"
    last = only(outputs, update(record, "é".encode()[:1], FinishReason.LENGTH))
    assert (last.text, last.finish_reason, last.stop_match) == (
        "EN\ufffd",
        FinishReason.LENGTH,
        None,
    )


def test_an_end_from_outside_flushes_too() -> None:
    outputs, record = opened(stop=("END",))
    assert only(outputs, update(record, b"abEN")).text == "ab"
    addressed = outputs.end("a", FinishReason.CANCELLED, 14.0)
    assert addressed is not None
    assert addressed.output.text == "EN"
    assert outputs.end("a", FinishReason.CANCELLED, 15.0) is None


def test_a_stop_string_in_the_very_last_token_beats_length() -> None:
    outputs, record = opened(stop=("END",))
    output = only(outputs, update(record, b"abEND", FinishReason.LENGTH))
    assert (output.text, output.finish_reason) == ("ab", FinishReason.STOP)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "ab!")])
def test_a_stop_token_shows_in_the_text_only_when_asked(include: bool, text: str) -> None:
    outputs, record = opened(include_stop_str_in_output=include)
    output = only(outputs, update(record, b"ab!", FinishReason.STOP, ord("!")))
    assert (output.text, bytes(output.token_ids), output.stop_match) == (text, b"ab!", ord("!"))


def test_stop_token_id_zero_is_reported() -> None:
    outputs, record = opened()
    assert only(outputs, update(record, b"\0", FinishReason.STOP, 0)).stop_match == 0


def test_updates_of_another_request_with_the_same_id_are_ignored() -> None:
    outputs, record = opened()
    other = Request(record.generation, 100, 0, frozenset(), arrival_s=0.0)
    assert outputs.update(update(other, b"x"), 12.0) is None
    assert outputs.is_open(record)


def test_usage_of_a_request_that_never_ran() -> None:
    outputs = OutputProcessor(DetokenizerFactory(byte_tokenizer()), EngineMetrics())
    record = Request(request("a"), 100, 0, frozenset(), arrival_s=10.0)
    outputs.open(record, CollectingSink())
    addressed = outputs.end("a", FinishReason.DEADLINE, 15.0)
    assert addressed is not None
    usage = addressed.output.usage
    assert usage is not None
    assert (usage.num_output_tokens, usage.queue_s, usage.ttft_s, usage.e2e_s) == (0, 5.0, 0.0, 5.0)


def test_first_token_is_no_inter_token_latency() -> None:
    outputs, record = opened()
    metrics = outputs._metrics
    only(outputs, update(record, b"a"), 12.0)
    assert metrics.inter_token_latency_seconds.count == 0
    assert metrics.time_to_first_token_seconds.sum == 2.0
    only(outputs, update(record, b"bc"), 14.0)
    assert metrics.inter_token_latency_seconds.count == 2
    assert metrics.inter_token_latency_seconds.sum == 2.0


def test_histogram_bounds_are_inclusive_like_prometheus() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.counts == [1, 2, 1]
    assert (histogram.count, histogram.sum) == (4, 7.5)
