"""Gemma 3 270M in float32 gives transformers' greedy tokens on the same weights.

One forward a prompt, over the prompt and the golden output: the best token at each position
must be the golden's next one, save at the near-ties that the goldens list.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.loading import ModelSource, open_model
from models.ops.attention.dense import dense_attend

FOLDER = Path(__file__).parent.parent / "goldens"
GOLDENS: dict[str, Any] = json.loads((FOLDER / "gemma3_greedy.json").read_text(encoding="utf-8"))
TOKENS: dict[str, Any] = json.loads(
    (FOLDER / "tokenizer" / "gemma3.json").read_text(encoding="utf-8")
)
PROMPTS = {prompt["name"]: prompt for prompt in GOLDENS["prompts"]}
SIZES = (128, 896)
"""Padded sequence lengths, so that two programs serve all prompts."""
MAX_MARGIN_DIFFERENCE = 5e-4
pytestmark = [pytest.mark.long, pytest.mark.real_model]


@pytest.fixture(scope="module")
def source() -> ModelSource:
    from jaxserve import model_store

    path = model_store.resolve("gemma-3-270m")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == GOLDENS["model_sha256"], "the goldens are of another file"
    return open_model(path)


def test_the_config_is_the_published_one(source: ModelSource) -> None:
    config = source.config
    assert (config.family, config.num_layers, config.hidden_size) == ("gemma3", 18, 640)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 1, 256)
    windows = [512 if (layer + 1) % 6 else None for layer in range(18)]
    assert config.layer_windows == tuple(windows)
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert (config.bos_token_id, config.eos_token_ids) == (2, (1,))


def test_greedy_tokens_equal_those_of_transformers(source: ModelSource) -> None:
    family, config = source.family, source.config
    num_rows = GOLDENS["num_output_tokens"]
    params = source.load_params(jnp.float32)

    @jax.jit
    def forward(params: dict, token_ids: jax.Array, first: jax.Array) -> jax.Array:
        x = family.embed(params, config, token_ids)
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        x, _ = family.run_layers(params, config, x, positions, (), dense_attend(config))
        rows = jax.lax.dynamic_slice_in_dim(x, first, num_rows)
        return family.logits(params, config, rows)

    assert max(len(prompt["prompt_token_ids"]) for prompt in PROMPTS.values()) > 512
    for name, prompt in PROMPTS.items():
        token_ids = prompt["prompt_token_ids"] + prompt["output_token_ids"]
        padded = np.zeros(next(size for size in SIZES if size >= len(token_ids)), np.int32)
        padded[: len(token_ids)] = token_ids
        first = np.int32(len(prompt["prompt_token_ids"]) - 1)
        logits = np.asarray(forward(params, padded, first))
        near_ties = {tie["index"] for tie in GOLDENS["near_ties"] if tie["prompt"] == name}
        differing = np.flatnonzero(logits.argmax(axis=-1) != prompt["output_token_ids"])
        assert set(differing.tolist()) <= near_ties, name
        rows = np.arange(num_rows)
        margins = logits[rows, prompt["output_token_ids"]]
        margins = margins - logits[rows, prompt["runner_up_token_ids"]]
        np.testing.assert_allclose(
            margins, prompt["margins"], rtol=0, atol=MAX_MARGIN_DIFFERENCE, err_msg=name
        )


def test_text_becomes_llama_cpps_tokens(source: ModelSource) -> None:
    tokenizer = source.load_tokenizer()
    for case in TOKENS["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
