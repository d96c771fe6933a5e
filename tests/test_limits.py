"""Settings and request fields out of their bounds are refused by name."""

from __future__ import annotations

import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.errors import ConfigError, InvalidRequest


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"page_size": 0}, "--page-size"),
        ({"token_budget": 0}, "--token-budget"),
        ({"max_num_seqs": -1}, "--max-num-seqs"),
        ({"dtype": "float16"}, "--dtype"),
        ({"buckets": "two"}, "--buckets"),
        ({"buckets": (1, 2, 3, 4, 5)}, "--buckets"),
        ({"policy": "random"}, "--policy"),
        ({"max_queued_requests": 0}, "--max-queued-requests"),
    ],
)
def test_engine_settings(settings: dict, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 1}, "--max-model-len must be at least 2"),
        ({"max_num_seqs": 200}, "--max-num-seqs 200 must not exceed --token-budget"),
        ({"token_budget": 129}, "largest of --buckets is 128"),
        ({"buckets": (128, 4)}, "--buckets must be ascending"),
        ({"num_pages": 5}, "raise --kv-cache-bytes"),
        ({"watermark": 0.5}, "--watermark"),
        ({"watermark": float("nan")}, "--watermark"),
    ],
)
def test_scheduler_settings(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**{"num_pages": 1000, "max_model_len": 2048} | settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 51),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("seed", -1),
        ("seed", 2**64),
        ("repetition_penalty", 1e-39),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", ((50, 1.0),)),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("allowed_token_ids", (-1,)),
        ("allowed_token_ids", ()),
        ("bad_token_ids", (50,)),
        ("bad_token_ids", tuple(range(50))),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop", ("\ud800",)),
        ("stop", ("a",) * 17),
        ("stop_token_ids", (50,)),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_sampling_fields(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**{field: value}).validate(vocab_size=50)
    assert error.value.field == field


def test_bounds_themselves_are_fine() -> None:
    SamplingParams(
        temperature=100.0,
        top_k=50,
        top_p=1.0,
        min_p=1.0,
        seed=2**64 - 1,
        repetition_penalty=0.01,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((49, -100.0),),
        allowed_token_ids=(0,),
        bad_token_ids=(1,),
        max_tokens=1,
        stop=("x" * 256,),
        logprobs=20,
    ).validate(vocab_size=50)
