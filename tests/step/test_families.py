"""Every family through the compiled step: logprobs of transformers, prompt taken in in chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.settings import resolve_settings
from jaxserve.engine.startup import build_executor
from models.loading import open_model
from tests.step.harness import Driver, make_request

TINY = Path(__file__).parent.parent / "goldens" / "tiny"
VARIANTS = sorted(path.name for path in TINY.iterdir() if (path / "logits.npz").is_file())
TOLERANCE = 1e-5
FAST = ("gemma3", "gpt2", "qwen3_moe")
"""One of each kind of layer; the others take their turn in the long run."""


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v in FAST else (pytest.mark.long,)) for v in VARIANTS],
)
def test_chunked_prefill_and_decode_give_the_goldens_logprobs(variant: str) -> None:
    source = open_model(TINY / variant)
    golden = np.load(TINY / variant / "logits.npz", allow_pickle=False)
    expected = np.asarray(jax.nn.log_softmax(golden["logits"], axis=-1))
    token_ids = tuple(golden["token_ids"].tolist())
    engine_config = EngineConfig(
        model="tiny",
        kernels="xla",
        buckets=(12,),
        max_num_seqs=4,
        max_model_len=64,
        page_size=4,
        compilation_cache_dir=Path("unused"),
    )
    settings = resolve_settings(engine_config, source.config, jax.devices()[0])
    settings = replace(settings, scheduler=replace(settings.scheduler, num_pages=64))
    executor = build_executor(settings, source.load_params(jnp.float32), depth=2)
    driver = Driver(settings, executor=executor)
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, logprobs=0)
    # Two at once and one after the other, so that chunks of 12 rows mix with decodes.
    driver.add(make_request("other", token_ids[:5], replace(scored, max_tokens=6)))
    driver.add(make_request("whole", token_ids, scored))
    streams = driver.run()
    for name, length in (("whole", len(token_ids)), ("other", 5)):
        reported = [entry.logprob for entry in streams[name].prompt_logprobs]
        wanted = expected[np.arange(length - 1), token_ids[1:length]]
        np.testing.assert_allclose(reported, wanted, rtol=0, atol=TOLERANCE)
        first = streams[name].logprobs[0]
        assert first.token_id == int(expected[length - 1].argmax())
        assert first.logprob == pytest.approx(expected[length - 1].max(), abs=TOLERANCE)
