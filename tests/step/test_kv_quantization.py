"""Keys and values in 8 bits: what is lost, what is promised as without, and who may use them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.settings import resolve_settings
from jaxserve.errors import ConfigError
from models.ops.attention import registry
from models.ops.attention.kv_quantization import FORMATS, SCALE_BYTES, dequantize, quantize
from tests.step.harness import TINY, Driver, dense_logits, make_request, tiny_settings

STEP = {"int8": 0.5 / 127, "fp8_e4m3": 2.0**-4}
"""Most error: of int8 relative to the head's largest value, of fp8 (3 bits behind the point) to the
value itself or, below its smallest normal number, far less of the largest."""


@pytest.mark.parametrize("name", FORMATS)
def test_values_come_back_within_a_code(name: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(50, 3, 64)) * 10.0 ** rng.integers(-6, 6, (50, 3, 1))).astype(np.float32)
    x[7] = 0
    stored = np.asarray(quantize(jnp.asarray(x), FORMATS[name]))
    assert stored.shape == (50, 3, 64 + SCALE_BYTES)
    assert stored.dtype == FORMATS[name]
    largest = np.abs(x).max(-1, keepdims=True)
    allowed = STEP[name] * (largest if name == "int8" else np.maximum(np.abs(x), largest / 1000))
    error = np.abs(np.asarray(dequantize(jnp.asarray(stored))) - x)
    assert (error <= allowed * 1.001).all()
    # As coarse as it may be, and no finer than that by accident: codes are really 8 bits.
    assert len(np.unique(stored[0, 0, :-SCALE_BYTES])) <= 64
    assert error.max() > 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(name: str, bad: float) -> None:
    x = np.ones((2, 8), np.float32)
    x[1, 3] = bad
    back = np.asarray(dequantize(quantize(jnp.asarray(x), FORMATS[name])))
    assert np.isfinite(back[0]).all()
    assert not np.isfinite(back[1]).any()


SCORED = SamplingParams(
    temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=0, prompt_logprobs=0
)
MOST_OFF = {"int8": 0.05, "fp8_e4m3": 0.35}
"""Of a token's log-probability. The tiny model's logits spread widely, so that little hides."""


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", ["int8", pytest.param("fp8_e4m3", marks=pytest.mark.long)])
def test_the_step_is_close_and_bits_do_not_depend_on_company(name: str) -> None:
    settings = tiny_settings(buckets=(24,), kv_cache_dtype=name, num_pages=26)
    prompts = {
        f"r{n}": tuple(np.random.default_rng(n).integers(0, 90, 15 + n).tolist()) for n in range(6)
    }
    alone = {}
    for request_id, prompt in prompts.items():
        driver = Driver(settings)  # Whose free pages and spare page are full of NaN.
        driver.add(make_request(request_id, prompt, SCORED))
        alone[request_id] = driver.run()[request_id]
    crowd = Driver(settings)
    for request_id, prompt in prompts.items():
        crowd.add(make_request(request_id, prompt, SCORED))
    streams = crowd.run()
    assert crowd.scheduler.num_preemptions > 0
    off = []
    for request_id, prompt in prompts.items():
        assert streams[request_id].bits() == alone[request_id].bits()
        tokens = [*prompt, *alone[request_id].token_ids]
        right = np.asarray(jax.nn.log_softmax(dense_logits(tokens), axis=-1))
        reported = [*alone[request_id].prompt_logprobs, *alone[request_id].logprobs]
        off += [
            abs(entry.logprob - right[place, entry.token_id])
            for place, entry in enumerate(reported)
        ]
    assert 1e-4 < max(off) < MOST_OFF[name]


def test_a_pool_of_8_bits_has_room_for_more_tokens() -> None:
    config = replace(TINY, head_dim=64)

    def num_pages(kv_cache_dtype: str) -> int:
        engine_config = EngineConfig("tiny", kv_cache_dtype=kv_cache_dtype, kv_cache_bytes=1 << 22)
        return resolve_settings(engine_config, config, jax.devices()[0]).scheduler.num_pages

    plain = num_pages("auto")
    for name in FORMATS:
        # Of 256 bytes of a head's floats 68 remain; the spare page counts as well.
        assert (num_pages(name) + 1) / (plain + 1) == pytest.approx(256 / 68, rel=0.02)


def test_attention_that_cannot_read_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    (reference,) = (one for one in registry.IMPLEMENTATIONS if one.name == "reference")
    other = replace(reference, name="other", takes_quantized_pool=False)
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (other, reference))
    config = EngineConfig("tiny", attention="other", kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype int8 is not .* --attention other"):
        resolve_settings(config, TINY, jax.devices()[0])
    with pytest.raises(ConfigError, match="--kv-cache-dtype must be one of auto, int8, fp8_e4m3"):
        EngineConfig("tiny", kv_cache_dtype="fp8_e5m2")
