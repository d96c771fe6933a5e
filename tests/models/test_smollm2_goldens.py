"""SmolLM2 in float32 gives transformers' greedy tokens on the same weights.

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

from models.loading import open_model
from models.ops.attention.dense import dense_attend

GOLDENS_PATH = Path(__file__).parent.parent / "goldens" / "smollm2_greedy.json"
GOLDENS: dict[str, Any] = json.loads(GOLDENS_PATH.read_text(encoding="utf-8"))
PROMPTS = {prompt["name"]: prompt for prompt in GOLDENS["prompts"]}
SIZES = (128, 768)
"""Padded sequence lengths, so that two programs serve all prompts."""
MAX_MARGIN_DIFFERENCE = 5e-4


class DenseModel:
    """The model's dense forward, whole sequence at once."""

    def __init__(self, path: Path) -> None:
        source = open_model(path)
        family, config = source.family, source.config
        num_rows = GOLDENS["num_output_tokens"]
        self.params = source.load_params(jnp.float32)

        @jax.jit
        def forward(params: dict, token_ids: jax.Array, first: jax.Array) -> jax.Array:
            x = family.embed(params, config, token_ids)
            positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
            x, _ = family.run_layers(params, config, x, positions, (), dense_attend(config))
            rows = jax.lax.dynamic_slice_in_dim(x, first, num_rows)
            return family.logits(params, config, rows)

        self._forward = forward

    def output_logits(self, prompt: dict[str, Any]) -> np.ndarray:
        """Logits of the rows that predict the golden output, `float32[48, V]`."""
        token_ids = prompt["prompt_token_ids"] + prompt["output_token_ids"]
        padded = np.zeros(next(size for size in SIZES if size >= len(token_ids)), np.int32)
        padded[: len(token_ids)] = token_ids
        first = len(prompt["prompt_token_ids"]) - 1
        return np.asarray(self._forward(self.params, padded, np.int32(first)))


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> DenseModel:
    digest = hashlib.sha256(smollm2_path.read_bytes()).hexdigest()
    assert digest == GOLDENS["model_sha256"], "the goldens are of another file"
    return DenseModel(smollm2_path)


def test_the_goldens_cover_what_they_should() -> None:
    assert len(PROMPTS) >= 14
    lengths = [len(prompt["prompt_token_ids"]) for prompt in PROMPTS.values()]
    assert min(lengths) <= 2
    assert max(lengths) >= 500
    for prompt in PROMPTS.values():
        assert len(prompt["output_token_ids"]) == len(prompt["margins"]) == 48
    listed = {(tie["prompt"], tie["index"]) for tie in GOLDENS["near_ties"]}
    assert listed == {
        (name, index)
        for name, prompt in PROMPTS.items()
        for index, margin in enumerate(prompt["margins"])
        if margin < GOLDENS["near_tie_margin"]
    }


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_equal_those_of_transformers(model: DenseModel, name: str) -> None:
    prompt = PROMPTS[name]
    logits = model.output_logits(prompt)
    near_ties = {tie["index"] for tie in GOLDENS["near_ties"] if tie["prompt"] == name}
    best = logits.argmax(axis=-1)
    differing = np.flatnonzero(best != prompt["output_token_ids"])
    assert set(differing.tolist()) <= near_ties
    chosen = np.take_along_axis(logits, np.array(prompt["output_token_ids"])[:, None], -1)[:, 0]
    runner_up = np.take_along_axis(logits, np.array(prompt["runner_up_token_ids"])[:, None], -1)[
        :, 0
    ]
    np.testing.assert_allclose(
        chosen - runner_up, prompt["margins"], rtol=0, atol=MAX_MARGIN_DIFFERENCE
    )


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.parametrize("name", [name for name in PROMPTS if "logprobs" in PROMPTS[name]])
def test_logprobs_equal_those_of_transformers(model: DenseModel, name: str) -> None:
    prompt = PROMPTS[name]
    logprobs = np.asarray(jax.nn.log_softmax(model.output_logits(prompt), axis=-1))
    chosen = logprobs[np.arange(48), prompt["output_token_ids"]]
    np.testing.assert_allclose(chosen, prompt["logprobs"], rtol=0, atol=MAX_MARGIN_DIFFERENCE)
